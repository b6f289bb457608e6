"""What a long training must bear: kills, signals, full disks, changed settings; and what it says meanwhile."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from sauce_hooks import TokenPolicy, VisionSAE, find_hook_point, train_sae
from sauce_hooks.activations import ImageLoader, MemoryStore, RowStream, ShuffleBuffer
from sauce_hooks.activations import stream as stream_module
from sauce_hooks.errors import (
    ActivationCacheError,
    DivergedError,
    ImagesError,
    PresetError,
    ResumeError,
    SAEFileError,
    TokenPolicyError,
    UnreadableImageWarning,
)
from sauce_hooks.hookpoint import draw
from sauce_hooks.sae import checkpoint as checkpoint_module
from sauce_hooks.sae import loop as loop_module
from sauce_hooks.sae import training as training_module
from sauce_hooks.sae.checkpoint import TrainingFolder, changes
from sauce_hooks.sae.fast_l1 import FastL1TrainingSAE
from sauce_hooks.sae.feed import Feed
from tiny import SIDE, model_inputs, pictures

BATCHES = [{"pixel_values": model_inputs(8, seed=i)["pixel_values"]} for i in range(8)]
"""64 images of 16 patches."""
SMALL = {"preset": "sauce", "expansion": 2, "batch_size": 16, "epochs": 3, "progress": False}
"""12 steps over BATCHES."""


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 files, two of them no images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / f"{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        if i in (7, 31):
            path.write_bytes(b"no image")
        else:
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return folder


def train(model, images=BATCHES, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_sae(model, images, **{**SMALL, **options})


def weights_of(sae):
    return {name: tensor.clone() for name, tensor in sae.sae.state_dict().items()}


def assert_same(one, other):
    assert weights_of(one).keys() == weights_of(other).keys()
    for name, tensor in weights_of(one).items():
        assert torch.equal(tensor, weights_of(other)[name]), name


# Killed at any moment. -----------------------------------------------------------------------------------------------


class Killed:
    """Runs trainings in forked children, which are as far as this process is, and die at the named moment."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, work, owner=None, name=None, calls=0):
        """True if the child came to its end."""

        def child():
            torch.set_num_threads(1)
            if owner is not None:
                real, left = getattr(owner, name), [calls]

                def counted(*args, **kwargs):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                setattr(owner, name, counted)
            work()
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        return process.exitcode == 0


MOMENTS = {
    "in the first step": (loop_module.Training, "_step", 0),
    "in the seventh step": (loop_module.Training, "_step", 6),
    "while the first rows are read": (training_module, "center", 0),
    "while the second checkpoint is written": (torch, "save", 4),
    "before the second checkpoint takes its place": (TrainingFolder, "_place", 1),
    "before the SAE is moved to its place": (checkpoint_module, "sync_folder", 14),
    "before the last checkpoint is removed": (TrainingFolder, "_discard", 0),
    "while the statistics are taken": (training_module, "feature_stats", 0),
    "while it is saved": (VisionSAE, "save", 0),
    "in a push": (ShuffleBuffer, "_move", 20),
}


@pytest.mark.parametrize("store", ["memory", "disk", "none"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_killed_at_any_moment_goes_on_bit_for_bit(cold, processor, photos, tmp_path, moment, store):
    options = {
        "keep_in_memory": 0 if store == "none" else 2**30,
        "processor": processor,
        "image_batch_size": 4,
        "tokens": TokenPolicy(read="patches", per_image=5),
        "checkpoint_every": 5,
        "max_broken": 0.5,
        "workers": 0,
        "log_every": 2,
    }
    unbroken = train(cold, photos, cache=tmp_path / "cache1" if store == "disk" else None, **options)

    def work():
        cache = tmp_path / "cache2" if store == "disk" else None
        train(cold, photos, out=tmp_path / "sae", resume=True, cache=cache, **options)

    run = Killed(tmp_path)
    assert not run(work, *MOMENTS[moment])
    assert run(work)
    assert_same(VisionSAE.load(tmp_path / "sae"), unbroken)
    lines = [json.loads(line) for line in (tmp_path / "sae/training/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] >= 32


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_killed_again_and_again_at_random_ends_as_an_unbroken_one(cold, processor, photos, tmp_path, workers):
    options = {
        "processor": processor,
        "image_batch_size": 4,
        "tokens": TokenPolicy(read="patches"),
        "checkpoint_every": 3,
        "max_broken": 0.5,
        "preset": "batchtopk",
        "expansion": 2,
        "options": {"k": 4},
        "batch_size": 32,
        "epochs": 20,
        "workers": workers,
    }
    unbroken = train(cold, photos, **{**options, "workers": 0})
    random = np.random.default_rng(workers)

    def child():
        torch.set_num_threads(1)
        train(cold, photos, out=tmp_path / "sae", resume=True, **options)
        os._exit(0)

    kills = 0
    for _ in range(60):
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(random.uniform(0.1, 0.8) if kills < 6 else 120)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
    assert kills >= 3
    assert_same(VisionSAE.load(tmp_path / "sae"), unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(cold, tmp_path, number, monkeypatch):
    whole = train(cold)
    real = loop_module.Training._step

    def step(self, batch):
        if self.trainer.n_training_steps == 6:
            os.kill(os.getpid(), number)
        return real(self, batch)

    monkeypatch.setattr(loop_module.Training, "_step", step)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as left:
        train(cold, out=tmp_path / "sae")
    assert number == signal.SIGINT or left.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert [path.name for path in (tmp_path / "sae/training/checkpoints").iterdir()] == ["000000007"]
    monkeypatch.undo()
    assert_same(train(cold, out=tmp_path / "sae", resume=True), whole)
    assert not (tmp_path / "sae/training/checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_only_a_second_ctrl_c_does_what_it_always_did(cold, tmp_path, number, monkeypatch):
    """Launchers pass on the SIGTERM that a scheduler has sent to all processes."""
    real = loop_module.Training._step

    def step(self, batch):
        if self.trainer.n_training_steps == 6:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return real(self, batch)

    monkeypatch.setattr(loop_module.Training, "_step", step)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        train(cold, out=tmp_path / "sae", checkpoint_every=5)
    saved = "000000005" if number == signal.SIGINT else "000000007"
    assert [path.name for path in (tmp_path / "sae/training/checkpoints").iterdir()] == [saved]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_while_the_last_checkpoint_is_written_loses_no_step(cold, tmp_path, monkeypatch):
    real = TrainingFolder._place
    monkeypatch.setattr(TrainingFolder, "_place", lambda *a: (os.kill(os.getpid(), signal.SIGINT), real(*a)))
    with pytest.raises(KeyboardInterrupt):
        train(cold, out=tmp_path / "sae")
    assert [path.name for path in (tmp_path / "sae/training/checkpoints").iterdir()] == ["000000012"]


def test_before_the_first_step_ctrl_c_is_what_it_always_was(cold, tmp_path, monkeypatch):
    """There is nothing to save, and reading on until there is could take minutes."""
    real = ShuffleBuffer._move
    monkeypatch.setattr(ShuffleBuffer, "_move", lambda *a: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1), real(*a)))
    with pytest.raises(KeyboardInterrupt):
        train(cold, out=tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_a_signal_that_was_ignored_is_ignored(cold, tmp_path, monkeypatch):
    """As a shell has it for what runs in the background."""
    monkeypatch.setattr(TrainingFolder, "_discard", lambda *a: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(cold, out=tmp_path / "sae")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# After an interrupt that nobody caught Python ends itself by SIGINT, unless any code is compiled from text until then: with
# tabulate around, torch._dynamo imports it at exit, and its named tuples are such code. So it is imported before.
_SCRIPT = """
import importlib, importlib.util, os, signal, sys, torch
torch.set_num_threads(1)
if importlib.util.find_spec("tabulate"):
    importlib.import_module("tabulate")
from sauce_hooks import train_sae
from sauce_hooks.sae.loop import Training
from tiny import build_llava, build_processor
folder, how = sys.argv[1:]
real = Training._step
def step(self, batch):
    if self.trainer.n_training_steps == 5:
        if how == "error":
            raise ValueError("an error")
        os.killpg(os.getpid(), int(how))
    return real(self, batch)
Training._step = step
processor = build_processor()
signal.signal(signal.SIGINT, signal.default_int_handler)
train_sae(build_llava(len(processor.tokenizer)), folder, processor=processor, out=folder + "/../sae", workers=2,
          batch_size=4, expansion=2, image_batch_size=2, keep_in_memory=0, max_broken=0.5, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM), ("error", 1)]
)
def test_a_program_ends_with_its_workers(photos, tmp_path, how, code):
    """Whatever ends it: an error, or a signal to the whole group of processes, as terminals and schedulers send it."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    command = [sys.executable, "-c", _SCRIPT, str(folder), str(how if how == "error" else int(how))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == code, said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    if how != "error":
        assert [path.name for path in (tmp_path / "sae/training/checkpoints").iterdir()] == ["000000006"]


def test_without_a_folder_ctrl_c_is_what_it_always_was(cold, monkeypatch):
    monkeypatch.setattr(loop_module.Training, "_step", lambda *args: (os.kill(os.getpid(), signal.SIGINT), time.sleep(5)))
    with pytest.raises(KeyboardInterrupt):
        train(cold)


# Resuming what was changed. ------------------------------------------------------------------------------------------


def stop_after(monkeypatch, steps):
    real = loop_module.Training._step

    def step(self, batch):
        if self.trainer.n_training_steps == steps:
            raise RuntimeError("stopped")
        return real(self, batch)

    monkeypatch.setattr(loop_module.Training, "_step", step)


@pytest.fixture
def unfinished(cold, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 6)
        with pytest.raises(RuntimeError, match="stopped"):
            train(cold, out=tmp_path / "sae", checkpoint_every=2)
    return tmp_path / "sae"


def interrupted(model, at, **options):
    """A training that is killed by an error in step `at`."""
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, at)
        with pytest.raises(RuntimeError, match="stopped"):
            train(model, **options)


def test_it_may_be_interrupted_again_before_it_reads_on(cold, tmp_path):
    """After the first time, the next batches come from what the buffer held."""
    options = {"tokens": TokenPolicy(read="patches"), "batch_size": 32, "keep_in_memory": 0, "checkpoint_every": 1}
    interrupted(cold, 5, out=tmp_path / "sae", **options)
    interrupted(cold, 6, out=tmp_path / "sae", resume=True, **options)
    assert_same(train(cold, out=tmp_path / "sae", resume=True, **options), train(cold, **options))


@pytest.mark.parametrize("cache", ["removed", "of another order", "left out", "added"])
def test_a_resume_with_another_cache(cold, tmp_path, cache):
    whole = train(cold, cache=tmp_path / "cache")
    train(cold, cache=tmp_path / "other", seed=5)
    interrupted(cold, 6, out=tmp_path / "sae", checkpoint_every=2, cache=None if cache == "added" else tmp_path / "new")
    if cache == "removed":  # and so made again
        shutil.rmtree(tmp_path / "new")
        assert_same(train(cold, out=tmp_path / "sae", resume=True, cache=tmp_path / "new"), whole)
        return
    given = {"of another order": tmp_path / "other", "left out": None, "added": tmp_path / "new"}[cache]
    with pytest.raises(ResumeError, match="order" if cache == "of another order" else "cache was"):
        train(cold, out=tmp_path / "sae", resume=True, cache=given)


def streamed(kind, photos, folder):
    """The photos as a stream of four shards."""
    files = sorted(photos.rglob("*.png"))
    if kind == "hub":
        from datasets import Dataset
        from datasets import Image as Feature

        rows = Dataset.from_dict({"image": [{"bytes": file.read_bytes(), "path": None} for file in files]})
        return rows.cast_column("image", Feature()).to_iterable_dataset(num_shards=4)
    if not folder.exists():
        folder.mkdir()
        for i in range(4):
            with tarfile.open(folder / f"{i}.tar", "w") as shard:
                for file in files[i::4]:
                    shard.add(file, arcname=file.name)
    return str(folder)


@pytest.mark.parametrize("store", ["memory", "none", "disk"])
@pytest.mark.parametrize(("kind", "workers"), [("hub", 0), ("webdataset", 2)])
def test_a_training_on_a_stream_goes_on_and_refuses_other_workers(cold, processor, photos, tmp_path, kind, workers, store):
    options = {
        "processor": processor,
        "image_batch_size": 4,
        "tokens": TokenPolicy(read="patches"),
        "max_broken": 0.5,
        "n_images": 36,
        "batch_size": 32,
        "keep_in_memory": 0 if store == "none" else 2**30,
        "workers": workers,
    }
    data = streamed(kind, photos, tmp_path / "shards")
    kept = {"cache": tmp_path / "cache"} if store == "disk" else {}
    whole = train(cold, data, **options, **kept)
    for at in (3, 18, 30):  # an epoch is 17 steps
        out = tmp_path / f"sae{at}"
        kept = {"cache": tmp_path / f"cache{at}"} if store == "disk" else {}
        interrupted(cold, at, images=data, out=out, checkpoint_every=1, **options, **kept)
        with pytest.raises(ResumeError, match=r"data\.workers was"):
            train(cold, data, out=out, resume=True, **{**options, **kept, "workers": workers + 1})
        assert_same(train(cold, data, out=out, resume=True, **options, **kept), whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "preset.batch_size was 16, is 8"),
        ({"lr": 0.5}, "preset.lr was 0.0004, is 0.5"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"image_batch_size": 3}, "image_batch_size was 64, is 3"),
        ({"options": {"l1_coefficient": 1.0}}, "preset.options.l1_coefficient was 8e-05, is 1.0"),
        ({"tokens": TokenPolicy(read="patches")}, "preset.tokens.read was 'last', is 'patches'"),
        ({"images": BATCHES[1:]}, "data.fingerprint was .* data.n_images was 64, is 56"),
        ({"hook_point": -1}, "hook_point.* was "),
        ({"autocast": True}, "autocast was False, is True"),
    ],
)
def test_a_resume_with_changed_settings_names_them(cold, unfinished, change, named):
    if "hook_point" in change:
        change = {"hook_point": find_hook_point(cold, change["hook_point"])}
    with pytest.raises(ResumeError, match=named):
        train(cold, out=unfinished, resume=True, **change)
    assert (unfinished / "training/checkpoints/000000006").is_dir()


def test_a_resume_with_another_tower_says_so(cold, unfinished):
    with torch.no_grad():
        for parameter in cold.model.vision_tower.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ResumeError, match="tower"):
        train(cold, out=unfinished, resume=True)


def test_what_does_not_change_the_result_may_change(cold, unfinished):
    resumed = train(cold, out=unfinished, resume=True, checkpoint_every=1, log_every=1)
    assert_same(resumed, train(cold))


@pytest.mark.parametrize("name", ["sae.pt", "trainer_state.pt", "state.pt", "activation_scaler.json"])
@pytest.mark.parametrize("damage", ["foreign", "empty", "cut", "gone"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(cold, unfinished, name, damage):
    file = unfinished / "training/checkpoints/000000006" / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"foreign": b"\x80a file of others", "empty": b"", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ResumeError, match=r"cannot be read.*Remove it"):
        train(cold, out=unfinished, resume=True)


@pytest.mark.parametrize("text", ["[1]", "", "5"])
def test_damaged_settings_are_an_error(cold, unfinished, text):
    (unfinished / "training/settings.json").write_text(text)
    with pytest.raises(ResumeError, match=r"settings.json cannot be read"):
        train(cold, out=unfinished, resume=True)


def test_what_others_put_beside_a_checkpoint_is_none(cold, unfinished):
    (unfinished / "training/checkpoints/lost+found").mkdir()
    (unfinished / "training/checkpoints/.DS_Store").write_text("")
    assert_same(train(cold, out=unfinished, resume=True), train(cold))


def test_checkpoints_go_at_once(cold, tmp_path):
    """Half a checkpoint, left by a kill after the SAE was saved, would be taken for a damaged one."""
    whole = train(cold)
    real = shutil.rmtree

    def killed(path, **options):
        for file in sorted(Path(path).rglob("*.pt"))[:1]:
            if "000000012" in file.parts:
                file.unlink()
                raise SystemExit
        real(path, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            train(cold, out=tmp_path / "sae")
    assert_same(train(cold, out=tmp_path / "sae", resume=True), whole)


def test_two_trainings_do_not_share_a_folder(cold, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_WAIT_S", 0.1)
    real, tried = loop_module.Training._step, []

    def step(self, batch):
        if not tried:
            for resume in (True, False):
                tried.append(resume)
                with pytest.raises(SAEFileError, match="another process"):
                    train(cold, out=tmp_path / "sae", resume=resume)
        return real(self, batch)

    monkeypatch.setattr(loop_module.Training, "_step", step)
    trained = train(cold, out=tmp_path / "sae", checkpoint_every=3)
    assert tried == [True, False]
    assert_same(VisionSAE.load(tmp_path / "sae"), trained)


@pytest.mark.parametrize("resume", [True, False])
def test_an_sae_is_not_overwritten(cold, tmp_path, resume):
    """It may have taken days, and hold concepts."""
    train(cold).save(tmp_path / "sae")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SAEFileError, match="holds an SAE already"):
        train(cold, out=tmp_path / "sae", resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["", "sae"])
def test_the_folder_itself_stays_where_it_is_with_all_that_is_in_it(cold, tmp_path, monkeypatch, out):
    """It may be the working directory or a mounted disk."""
    folder = tmp_path / "here" / out
    (folder / "notes").mkdir(parents=True)
    (folder / "notes/1.txt").write_text("mine")
    inode = folder.stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    trained = train(cold, out=out or ".")
    assert folder.stat().st_ino == inode and (folder / "notes/1.txt").read_text() == "mine"
    assert_same(VisionSAE.load(folder), trained)
    assert {path.name for path in (folder / "training").iterdir()} == {"settings.json", "metrics.jsonl", "lock"}


def test_a_finished_training_is_loaded_not_made_again(cold, tmp_path, monkeypatch):
    first = train(cold, out=tmp_path / "sae")
    stop_after(monkeypatch, 0)
    assert_same(train(cold, out=tmp_path / "sae", resume=True), first)
    with pytest.raises(ResumeError, match="lr was"):
        train(cold, out=tmp_path / "sae", resume=True, lr=1.0)


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.one_of(st.integers(0, 2), st.dictionaries(st.sampled_from("xy"), st.integers(0, 2)))
    )
)
def test_no_settings_differ_from_themselves_and_every_other_is_named(settings_):
    assert changes(settings_, settings_) == []
    for name in settings_:
        assert any(line.startswith(name) for line in changes(settings_, {**settings_, name: "other"}))
        assert any(line.startswith(name) for line in changes({k: v for k, v in settings_.items() if k != name}, settings_))


# Bad luck. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk_loses_nothing_that_was_saved(cold, tmp_path, monkeypatch, problem):
    real, calls = torch.save, [0]

    def full(*args, **kwargs):
        calls[0] += 1
        if calls[0] > 4:
            raise problem
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 8 cannot be written.*checkpoint at step 4 is whole"):
            train(cold, out=tmp_path / "sae", checkpoint_every=4)
    assert [path.name for path in (tmp_path / "sae/training/checkpoints").iterdir()] == ["000000004"]
    assert_same(train(cold, out=tmp_path / "sae", resume=True, checkpoint_every=4), train(cold))


def test_a_full_disk_at_the_end_is_gone_on_with(cold, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(VisionSAE, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match=r"cannot be saved .*No space left.*resume=True"):
            train(cold, out=tmp_path / "sae")
    assert_same(train(cold, out=tmp_path / "sae", resume=True), train(cold))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_trained(cold, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SAEFileError, match="cannot be written"):
        train(cold, out=tmp_path / "sae")


def test_a_file_in_the_place_of_the_folder_is_an_error_before_anything_is_trained(cold, tmp_path):
    (tmp_path / "sae").write_text("mine")
    with pytest.raises(SAEFileError, match="cannot be written"):
        train(cold, out=tmp_path / "sae")
    assert (tmp_path / "sae").read_text() == "mine"


@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_a_loss_that_is_not_a_number_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    cold, tmp_path, monkeypatch, log_every
):
    real = FastL1TrainingSAE.training_forward_pass

    def forward(self, step_input):
        output = real(self, step_input)
        if step_input.n_training_steps == 6:
            output.loss = output.loss * math.nan
        return output

    monkeypatch.setattr(FastL1TrainingSAE, "training_forward_pass", forward)
    with pytest.raises(DivergedError, match=r"loss at step 7 .* checkpoint at step 5 is good"):
        train(cold, out=tmp_path / "sae", checkpoint_every=5, log_every=log_every)
    monkeypatch.undo()
    assert_same(train(cold, out=tmp_path / "sae", resume=True, checkpoint_every=5), train(cold))


def test_weights_that_are_not_numbers_are_never_saved(cold, tmp_path, monkeypatch):
    """A gradient can be NaN where the loss is not."""
    real, calls = torch.nn.utils.clip_grad_norm_, [0]

    def clip(parameters, *args, **kwargs):
        parameters, calls[0] = list(parameters), calls[0] + 1
        if calls[0] == 5:
            parameters[0].grad.fill_(math.nan)
        return real(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(DivergedError, match=r"step 5 or a weight after it .* checkpoint at step 4 is good"):
        train(cold, out=tmp_path / "sae", checkpoint_every=1)
    assert [path.name for path in (tmp_path / "sae/training/checkpoints").iterdir()] == ["000000004"]


def test_too_many_broken_images_stop_it_and_are_named_in_a_log(cold, processor, photos, tmp_path):
    with pytest.raises(ImagesError):
        train(cold, photos, processor=processor, out=tmp_path / "sae", max_broken=0.01)
    logged = [json.loads(line) for line in (tmp_path / "sae/training/broken_images.jsonl").read_text().splitlines()]
    assert sorted(Path(line["name"]).name for line in logged) == ["007.png", "031.png"]


def test_a_cache_of_another_training_is_refused_and_named(cold, tmp_path):
    train(cold, cache=tmp_path / "cache")
    with pytest.raises(ActivationCacheError, match="patches"):
        train(cold, cache=tmp_path / "cache", tokens=TokenPolicy(read="patches"))
    with pytest.raises(ActivationCacheError, match="hook_point"):
        train(cold, cache=tmp_path / "cache", hook_point=find_hook_point(cold, -1))


@pytest.mark.parametrize("log_to", ["excel", "tensorboard", "wandb"])
def test_a_dashboard_that_is_not_there_is_an_error_before_anything_is_trained(cold, monkeypatch, log_to):
    from accelerate import utils

    monkeypatch.setattr(utils, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(utils, "is_wandb_available", lambda: False)
    with pytest.raises(PresetError, match=f"{log_to}.*(known|pip install)"):
        train(cold, log_to=[log_to])


def test_a_stream_without_a_length_asks_for_one(cold):
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: ({"image": None} for _ in range(3)))
    with pytest.raises(ImagesError, match="n_images"):
        train(cold, stream, processor=object())


# What a training says. -----------------------------------------------------------------------------------------------


def test_metrics_are_written_and_shown(cold, tmp_path, capsys):
    train(cold, out=tmp_path / "sae", log_every=4, progress=True, validation=BATCHES[:2])
    lines = [json.loads(line) for line in (tmp_path / "sae/training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert {"loss", "l0", "explained_variance", "dead_share", "lr", "images/s", "rows/s"} <= line.keys()
        assert {"losses/mse_loss", "losses/l1_loss", "validation/explained_variance", "validation/l0"} <= line.keys()
        assert line["loss"] == pytest.approx(line["losses/mse_loss"] + line["losses/l1_loss"])
    assert lines[-1]["validation/explained_variance"] > lines[0]["validation/explained_variance"]
    shown = capsys.readouterr().err
    assert [word for word in ("images/s", "rows/s", "loss", "L0", "EV", "dead", "12 of 12") if word not in shown] == [], (
        shown
    )


def test_metrics_agree_with_the_trained_sae(cold, tmp_path):
    trained = train(cold, out=tmp_path / "sae", log_every=12, validation=BATCHES)
    line = json.loads((tmp_path / "sae/training/metrics.jsonl").read_text())
    assert line["validation/explained_variance"] == pytest.approx(trained.stats.explained_variance, abs=1e-4)
    assert line["validation/l0"] == pytest.approx(trained.stats.l0, abs=0.01)


def test_validation_takes_no_part_in_training_and_may_be_a_single_row(cold, tmp_path):
    one = [{"pixel_values": BATCHES[0]["pixel_values"][:1]}]
    for preset in ("sauce", "batchtopk"):
        options = {"preset": preset, "options": {"k": 4} if preset == "batchtopk" else {}, "log_every": 1}
        trained = train(cold, out=tmp_path / preset, validation=one, **options)
        assert_same(trained, train(cold, **options))


def test_tensorboard_gets_them(cold, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(cold, out=tmp_path / "sae", log_every=4, log_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "sae/training/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12]


def test_wandb_gets_them_when_asked_and_is_left_alone_otherwise(cold, tmp_path, monkeypatch):
    import wandb

    logged = []
    run = type("Run", (), {"log": lambda self, values, step: logged.append(step), "finish": lambda self: None})()
    run.config = type("Config", (), {"update": lambda self, values, **_: None})()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "config", run.config, raising=False)
    train(cold, out=tmp_path / "sae", log_every=4)
    assert logged == []
    train(cold, out=tmp_path / "sae2", log_every=4, log_to=["wandb"])
    assert logged == [4, 8, 12]


class HostReads(TorchDispatchMode):
    """Counts what makes a host wait for a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("preset", "theirs"), [("sauce", 0), ("batchtopk", 1)])  # SAE-Lens asks whether any feature is dead
def test_no_step_reads_from_the_device_outside_logging(cold, monkeypatch, preset, theirs):
    monkeypatch.setattr(FastL1TrainingSAE, "_is_sparse", lambda self, z: False)  # a question for CPUs only
    real, reads = loop_module.Training._step, []

    def step(self, batch):
        with HostReads() as mode:
            output = real(self, batch)
        reads.append(len(mode.names))
        return output

    monkeypatch.setattr(loop_module.Training, "_step", step)
    small = {"preset": preset, "expansion": 2, "batch_size": 16, "epochs": 3}
    train(cold, log_every=1000, **small, **({"options": {"k": 4}} if preset == "batchtopk" else {}))
    assert reads and set(reads) == {theirs}


def test_firing_rates_and_the_rest_of_a_ragged_end(cold):
    """7 batches of 8 images and a batch of 3: the rest that fills no batch is left out, and rates are per row trained on."""
    ragged = [*BATCHES[:7], {"pixel_values": BATCHES[7]["pixel_values"][:3]}]
    trained = train(cold, ragged, epochs=1, preset="batchtopk", options={"k": 4}, tokens=TokenPolicy(read="patches"))
    assert trained.sae.cfg.metadata.l0 == pytest.approx(4)
    assert trained.stats.n_rows == 59 * 16


def test_the_global_random_state_is_as_it_was(cold):
    before = torch.get_rng_state()
    train(cold)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_autocast_trains(cold):
    plain, low = train(cold), train(cold, autocast=True)
    assert low.sae.W_dec.dtype == torch.float32
    assert low.stats.explained_variance == pytest.approx(plain.stats.explained_variance, abs=0.05)
    assert not torch.equal(low.sae.W_dec, plain.sae.W_dec)


def test_warnings_that_the_caller_silenced_stay_silent(cold, processor, photos):
    options = {**SMALL, "processor": processor, "max_broken": 0.5, "batch_size": 8}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        train_sae(cold, photos, **options)
    assert not told
    with pytest.warns(UnreadableImageWarning, match="skipped 2 of 40"):
        train_sae(cold, photos, **options)


def test_it_trains_in_another_thread(cold, processor, tmp_path):
    images, trained = pictures(20), []
    options = {"processor": processor, "batch_size": 4}
    thread = threading.Thread(target=lambda: trained.append(train(cold, images, out=tmp_path / "sae", workers=2, **options)))
    thread.start()
    thread.join(60)
    assert_same(trained[0], train(cold, images, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_leaves_the_random_state_alone(processor, workers):
    before = torch.get_rng_state()
    list(ImageLoader(pictures(4), processor, workers=workers, shuffle=True).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_precision_that_counts_is_the_towers(cold, tmp_path):
    cold.model.language_model.to(torch.bfloat16)
    interrupted(cold, 6, out=tmp_path / "sae", checkpoint_every=2)
    cold.model.language_model.to(torch.float32)
    cold.model.vision_tower.to(torch.bfloat16)
    with pytest.raises(ResumeError, match=r"dtype was 'torch\.float32', is 'torch\.bfloat16'"):
        train(cold, out=tmp_path / "sae", resume=True)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_the_steps_are_as_many_as_the_rows_allow_where_images_are_ragged(monkeypatch, family):
    """A batch of packed images does not say how many they are; the number of batches is known."""
    from families import build, other_image

    model, inputs = build(family)
    images = [other_image(inputs, seed=i) for i in range(8)]
    planned, real = [], loop_module.Schedule
    monkeypatch.setattr(training_module, "Schedule", lambda steps, *others: (planned.append(steps), real(steps, *others))[1])
    for rows in (8, 16_384):  # before all rows were looked at, and after
        monkeypatch.setattr(training_module, "_SAMPLE_ROWS", rows)
        trained = train(model, images, tokens=TokenPolicy(read="patches"), epochs=1, batch_size=4)
        assert planned.pop() == trained.stats.n_rows // 4


# Tokens drawn. -------------------------------------------------------------------------------------------------------


@given(images=st.integers(1, 5), tokens=st.integers(1, 9), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_drawn_tokens_are_some_of_each_image_none_twice_in_their_order(images, tokens, n, seed):
    acts = torch.arange(images * tokens).reshape(images, tokens, 1).float()
    drawn = draw(acts, n, torch.Generator().manual_seed(seed))
    assert drawn.shape == (images, min(n, tokens), 1)
    for i, row in enumerate(drawn[:, :, 0].tolist()):
        assert row == sorted(set(row)) and set(row) <= set(acts[i, :, 0].tolist())
    assert torch.equal(drawn, draw(acts, n, torch.Generator().manual_seed(seed)))


def test_every_token_is_drawn_as_often_as_another():
    counts = torch.zeros(8)
    for seed in range(400):
        drawn = draw(torch.arange(8.0).reshape(1, 8, 1), 2, torch.Generator().manual_seed(seed))
        counts[drawn.flatten().long()] += 1
    assert counts.min() > 70 and counts.max() < 130


def test_no_tokens_an_image_is_an_error():
    with pytest.raises(TokenPolicyError, match="per_image"):
        TokenPolicy(per_image=0)


def test_the_policy_is_saved(cold, tmp_path):
    trained = train(cold, tokens=TokenPolicy(read="patches", per_image=3), out=tmp_path / "sae")
    assert trained.stats.n_rows == 64 * 3
    assert VisionSAE.load(tmp_path / "sae").tokens == TokenPolicy(read="patches", per_image=3)


# The stream of rows. -------------------------------------------------------------------------------------------------


def stream_of(model, store=None, **options):
    tokens = TokenPolicy(read="patches", per_image=options.pop("per_image", None))
    loader = ImageLoader(BATCHES, shuffle=True, seed=1, **options)
    return RowStream(model, loader, find_hook_point(model), tokens, seed=1, store=store)


@pytest.mark.parametrize("store", [None, MemoryStore])
@pytest.mark.parametrize("per_image", [None, 3])
def test_an_epoch_can_be_gone_on_with_at_any_chunk(cold, store, per_image):
    whole = stream_of(cold, store() if store else None, per_image=per_image)
    epochs = [list(whole.epoch(0)), list(whole.epoch(1))]
    for number, chunks in enumerate(epochs):
        for stop in range(len(chunks)):
            first = stream_of(cold, per_image=per_image)
            position = None
            if store is None and stop:
                for _ in zip(range(stop), first.epoch(number), strict=False):
                    position = json.loads(json.dumps(first.position()))
            again = stream_of(cold, store() if store else None, per_image=per_image)
            rest = list(again.epoch(number, stop, position))
            assert len(rest) == len(chunks) - stop
            for one, other in zip(rest, chunks[stop:], strict=True):
                assert torch.equal(one.rows_nd, other.rows_nd) and torch.equal(one.images_n, other.images_n)


def test_every_epoch_has_every_row_once_in_another_order(cold):
    for store in (None, MemoryStore()):
        stream = stream_of(cold, store)
        epochs = [torch.cat([chunk.rows_nd for chunk in stream.epoch(n)]) for n in range(3)]
        for epoch in epochs[1:]:
            assert not torch.equal(epoch, epochs[0])
            assert torch.equal(epoch.sum(1).sort().values, epochs[0].sum(1).sort().values)


def test_rows_say_whose_they_are(cold):
    plain = torch.cat([c.rows_nd for c in stream_in_order(cold)]).split(16)
    for chunk in stream_of(cold).epoch(0):
        for image in chunk.images_n.unique().tolist():
            assert torch.equal(chunk.rows_nd[chunk.images_n == image], plain[image])


def stream_in_order(model):
    loader = ImageLoader(BATCHES)
    return RowStream(model, loader, find_hook_point(model), TokenPolicy(read="patches")).epoch(0)


@settings(max_examples=15)
@given(batch=st.integers(1, 9), capacity=st.integers(1, 40), epochs=st.integers(1, 3), data=st.data())
def test_a_feed_can_be_gone_on_with_at_any_batch(cold, batch, capacity, epochs, data):
    def feed():
        buffer = ShuffleBuffer(batch_size=batch, capacity=capacity, generator=torch.Generator().manual_seed(3))
        stream = stream_of(cold, per_image=1)
        return Feed(stream, buffer, epochs, torch.device("cpu"))

    whole = list(feed())
    assert len(whole) == epochs * 64 // batch
    stop = data.draw(st.integers(0, len(whole) - 1))
    first = feed()
    for _ in zip(range(stop), first, strict=False):
        pass
    rest = feed()
    if stop:
        rest.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[stop:], strict=True))


# What else a user does. ----------------------------------------------------------------------------------------------


def test_a_training_does_not_mind_that_gradients_are_off(cold):
    whole = train(cold)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert_same(train(cold), whole)


def test_dead_features_are_restarted_when_asked(cold, tmp_path, monkeypatch):
    """At a penalty so high that most features die."""
    options = {"resample_every": 8, "dead_after": 2, "options": {"l1_coefficient": 10.0}, "lr": 0.05, "expansion": 4}
    options |= {"tokens": TokenPolicy(), "epochs": 1}
    plain = train(cold, **{**options, "resample_every": 0})
    whole = train(cold, **options)
    assert whole.stats.explained_variance > plain.stats.explained_variance + 0.1
    with monkeypatch.context() as patched:
        stop_after(patched, 30)
        with pytest.raises(RuntimeError):
            train(cold, out=tmp_path / "sae", checkpoint_every=10, **options)
    assert_same(train(cold, out=tmp_path / "sae", resume=True, **options), whole)


def test_a_cache_is_no_place_for_a_tower_with_adapters(cold, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(cold, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ActivationCacheError, match="adapters"):
        train(adapted, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_an_interrupted_training_began_is_used_by_the_next(cold, tmp_path, monkeypatch):
    whole = train(cold, cache=tmp_path / "whole")
    reads = []
    real = stream_module.read_batch
    monkeypatch.setattr(stream_module, "read_batch", lambda *a, **k: (reads.append(1), real(*a, **k))[1])
    monkeypatch.setattr(stream_module, "_FLUSH_ROWS", 16)
    monkeypatch.setattr(training_module, "_SAMPLE_ROWS", 8)
    with monkeypatch.context() as patched:
        patched.setattr(
            stream_module, "read_batch", lambda *a, **k: 1 / 0 if len(reads) > 4 else (reads.append(1), real(*a, **k))[1]
        )
        with pytest.raises(ZeroDivisionError):
            train(cold, cache=tmp_path / "cache")
    assert len(reads) == 5
    monkeypatch.setattr(training_module, "_SAMPLE_ROWS", 16_384)
    assert_same(train(cold, cache=tmp_path / "cache"), whole)
    assert len(reads) <= 5 + 8 - 4  # of 8 batches, four were safe
    train(cold, cache=tmp_path / "cache", seed=5)  # complete: serves every seed, without the tower
    assert len(reads) <= 9
