"""Several processes train one SAE: the same loss curve as one process with the same global batch."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import PartialState

from sauce_hooks import TokenPolicy, VisionSAE, find_hook_point, train_sae
from sauce_hooks.activations import Chunk, ImageLoader, RowStream, World
from sauce_hooks.errors import ImagesError, PresetError, SauceHooksError
from sauce_hooks.sae import loop as loop_module
from sauce_hooks.sae.parallel import check_divides
from sauce_hooks.sae.presets import PRESETS
from tiny import model_inputs

BATCHES = [{"pixel_values": model_inputs(4, seed=i)["pixel_values"]} for i in range(15)]
SMALL = {"preset": "sauce", "expansion": 2, "batch_size": 24, "epochs": 3, "progress": False, "log_every": 1, "lr": 1e-3}


def train(model, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_sae(model, BATCHES, out=out, **{**SMALL, "tokens": TokenPolicy(read="patches", per_image=5), **options})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "training/metrics.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(size, work):
    """Runs `work(rank)` in forked processes that find each other as torchrun's do; their exit codes."""
    port = str(free_port())

    def child(rank):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            OMP_NUM_THREADS="1",
        )
        torch.set_num_threads(1)
        PartialState._reset_state()  # that of this process, if another test has asked for it, knows of one process only
        work(rank)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    for process in processes:
        process.kill()
    return [process.exitcode for process in processes]


STORES = ("memory", "disk", "none")


@pytest.mark.parametrize("store", STORES)
def test_two_processes_have_the_loss_curve_of_one(cold, tmp_path, store):
    def options(name):
        return {"cache": tmp_path / name if store == "disk" else None, "keep_in_memory": 0 if store == "none" else 2**30}

    train(cold, tmp_path / "one", **options("cache1"))

    def work(rank):
        train(cold, tmp_path / "two", **options("cache2"))

    assert in_processes(2, work) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3 * 60 * 5 // 24
    assert two == pytest.approx(one, rel=1e-4)
    assert one[-1] < 0.9 * one[0]
    first, second = VisionSAE.load(tmp_path / "one"), VisionSAE.load(tmp_path / "two")
    torch.testing.assert_close(second.sae.W_dec, first.sae.W_dec, rtol=1e-3, atol=1e-4)
    assert second.sae.cfg.metadata.l0 == pytest.approx(first.sae.cfg.metadata.l0, rel=1e-3)
    assert second.sae.cfg.metadata.num_dead_features == first.sae.cfg.metadata.num_dead_features


def test_two_processes_that_are_stopped_go_on_together(cold, tmp_path):
    options = {"cache": tmp_path / "cache", "checkpoint_every": 4}

    def whole(rank):
        train(cold, tmp_path / "whole", checkpoint_every=4)

    def stopped(rank):
        real = loop_module.Training._step

        def step(self, batch):
            if rank == 1 and self.trainer.n_training_steps == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, batch)

        loop_module.Training._step = step
        try:
            train(cold, tmp_path / "two", **options)
        except SystemExit:
            os._exit(7)

    def resumed(rank):
        train(cold, tmp_path / "two", resume=True, **options)

    assert in_processes(2, stopped) == [7, 7]  # one got the signal, both saved and left
    assert (tmp_path / "two/training/checkpoints/000000010").is_dir()
    assert in_processes(2, resumed) == [0, 0]
    train(cold, tmp_path / "one", cache=tmp_path / "cache1")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_every_process_gets_the_rows_that_one_would_read(cold, tmp_path):
    tokens = TokenPolicy(read="patches", per_image=3)

    def rows(world):
        loader = ImageLoader(BATCHES, shuffle=True, rank=world.rank, world=world.size)
        return list(RowStream(cold, loader, find_hook_point(cold), tokens, world=world).epoch(1))

    def work(rank):
        torch.save([(c.rows_nd, c.images_n) for c in rows(World.current())], tmp_path / f"{rank}.pt")

    assert in_processes(2, work) == [0, 0]
    alone = [c for c in rows(World()) if len(c.rows_nd)]
    for rank in range(2):
        together = [c for c in torch.load(tmp_path / f"{rank}.pt") if len(c[0])]
        assert len(together) == len(alone)
        for (rows_nd, images_n), chunk in zip(together, alone, strict=True):
            assert torch.equal(rows_nd, chunk.rows_nd) and torch.equal(images_n, chunk.images_n)


def test_a_batch_that_cannot_be_shared_evenly_is_an_error():
    assert check_divides(12, World(1, 3)) == 4
    with pytest.raises(PresetError, match=r"10 rows .* 3 processes"):
        check_divides(10, World(0, 3))


FEW = {"batchtopk": {"k": 4}, "matryoshka": {"k": 4}, "topk": {"k": 4}, "matching_pursuit": {"max_iterations": 4}}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_architecture_learns_the_same_in_two_processes(cold, tmp_path, preset):
    recipe = {"preset": preset, "epochs": 2, "lr_warm_up_steps": 0, "dead_after": 3}
    recipe |= {"options": FEW[preset]} if preset in FEW else {}
    recipe |= {"resample_every": 7} if preset in ("sauce", "gated", "matching_pursuit") else {}
    train(cold, tmp_path / "one", **recipe)

    def work(rank):
        trained = train(cold, tmp_path / "two", **recipe)
        torch.save(trained.sae.state_dict(), tmp_path / f"{rank}.pt")

    assert in_processes(2, work) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = VisionSAE.load(tmp_path / "one").stats, VisionSAE.load(tmp_path / "two").stats
    assert two.l0 == pytest.approx(one.l0, rel=1e-2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("mine", ["rows", "the end"])
def test_what_fails_in_one_process_ends_all_of_them(tmp_path, mine):
    def work(rank):
        given = None if mine == "the end" else Chunk(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))
        try:
            World.current().chunks(
                ImagesError("all broken") if rank == 1 else given, d=3, dtype=torch.float32, device=torch.device("cpu")
            )
        except SauceHooksError as problem:
            (tmp_path / str(rank)).write_text(f"{type(problem).__name__}: {problem}")

    assert in_processes(2, work) == [0, 0]
    assert (tmp_path / "1").read_text() == "ImagesError: all broken"
    assert "process 1 has failed" in (tmp_path / "0").read_text()
    assert "ImagesError: all broken" in (tmp_path / "0").read_text()


def test_processes_agree_to_go_on(tmp_path):
    def work(rank):
        World.current().agree()
        (tmp_path / str(rank)).touch()

    assert in_processes(2, work) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2
    World().agree()
    with pytest.raises(ImagesError, match="none"):
        World().agree(ImagesError("none"))


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no")
ACCELERATE += ("--dynamo_backend", "no", "--num_processes", "2", "--main_process_port")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_a_launcher_and_the_command_line(tmp_path, launcher):
    photos = tmp_path / "photos"
    photos.mkdir()
    from tiny import pictures

    for i, picture in enumerate(pictures(48)):
        picture.resize((64, 64)).save(photos / f"{i}.png")
    command = [sys.executable, "-m", *launcher, str(free_port())]
    arguments = ["-m", "sauce_hooks", "train-sae", "bundled", str(photos), "--out", str(tmp_path / "sae")]
    options = ["--preset", "batchtopk", "--epochs", "4", "--workers", "0", "--image-batch-size", "8"]
    done = subprocess.run(
        [*command, *arguments, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "sae/training/settings.json").read_text())["processes"] == 2
    assert VisionSAE.load(tmp_path / "sae").stats.explained_variance > 0.1
