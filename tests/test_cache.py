"""The cache of activations: what goes in comes out, once and in order, whatever happens in between."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sauce_hooks.activations import cache as cache_module
from sauce_hooks.activations import cache_format
from sauce_hooks.activations.cache import ActivationCache, CacheRecord, Chunk
from sauce_hooks.errors import ActivationCacheError
from sauce_hooks.hookpoint import HookPoint
from sauce_hooks.hookpoint.families import TokenLayout
from sauce_hooks.hookpoint.fingerprint import TowerRecord

D = 4
POINT = HookPoint("vision.layers.1", 1, 3, D, "llava", "vision", TokenLayout(tiles_in_row=(5, 8)), (1,))
TOWER = TowerRecord((0.5, 1.0, None, 2.0), (0.25, 0.75), layer=1, n_layers=3, d_in=D, image_size=28, patch_size=7)
RECORD = CacheRecord(
    hook_point=POINT.to_dict(),
    tower=TOWER.to_dict(),
    tokens={"read": "patches", "per_image": 2, "seed": 0},
    data="sha256:1234",
    n_images=100,
    processor="sha256:5678",
    dtype="torch.float32",
    order={"seed": 0, "batch_size": 8},
)


def chunk(i, rows=None):
    """Chunk number `i` of the data, always the same."""
    generator = torch.Generator().manual_seed(i)
    rows = int(torch.randint(0, 7, (), generator=generator)) if rows is None else rows
    scale = 10.0 ** torch.randint(-6, 6, (rows, 1), generator=generator)
    return Chunk(torch.randn(rows, D, generator=generator) * scale, torch.arange(100 * i, 100 * i + rows))


def given_back(chunks):
    return [(c.rows_nd.clone(), c.images_n.clone()) for c in chunks]


def same(found, numbers, make=chunk):
    """Whether these are the chunks of these numbers, rounded to bfloat16, bit for bit."""
    wanted = [make(i) for i in numbers]
    return len(found) == len(wanted) and all(
        rows.dtype == torch.bfloat16
        and torch.equal(rows.view(torch.int16), w.rows_nd.to(torch.bfloat16).view(torch.int16))
        and images.dtype == torch.int64
        and torch.equal(images, w.images_n)
        for (rows, images), w in zip(found, wanted, strict=True)
    )


def filled(folder, n=9, every=3, **options):
    """A complete cache of `n` chunks."""
    cache = ActivationCache.open(folder, RECORD, rows_per_shard=8, **options)
    go_on(cache, n, every)
    return cache


def go_on(cache, n, every):
    """Fill it to the end as a training does, from wherever it stands."""
    next_one = (cache.filling_state or {"next": 0})["next"]
    assert next_one == cache.n_chunks
    for i in range(next_one, n):
        cache.append(chunk(i))
        if i % every == every - 1:
            cache.flush({"next": i + 1})
    cache.finish()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(cache_module, "_WAIT_S", 0)


# What comes out. ------------------------------------------------------------------------------------------------------

ACTIONS = st.lists(st.sampled_from(["append"] * 5 + ["flush", "drop", "close"]), max_size=40)


@given(actions=ACTIONS, rows_per_shard=st.integers(1, 20))
def test_every_chunk_once_in_order_and_rounded(actions, rows_per_shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    cache, given_so_far, safe = ActivationCache.open(folder, RECORD, rows_per_shard=rows_per_shard), 0, 0
    for action in actions:
        if action == "append":
            cache.append(chunk(given_so_far))
            given_so_far += 1
        elif action == "flush":
            cache.flush({"next": given_so_far})
            safe = given_so_far
        else:
            if action == "close":
                cache.close()
            del cache  # as good as killed: what was not flushed is lost, and has to be given again
            cache = ActivationCache.open(folder, RECORD, rows_per_shard=rows_per_shard)
            assert cache.filling_state == ({"next": safe} if safe or cache.filling_state else None)
            given_so_far = safe
        assert cache.n_chunks == safe and not cache.complete
        assert cache.n_rows == sum(len(chunk(i).rows_nd) for i in range(safe))
        assert same(given_back(cache.chunks()), range(safe))
    cache.finish()
    for reader in (cache, ActivationCache.open(folder, RECORD)):
        assert reader.complete and reader.filling_state is None
        assert same(given_back(reader.chunks()), range(given_so_far))


@given(
    actions=st.lists(st.sampled_from(["append", "append", "append", "flush"]), max_size=5),
    rows_per_shard=st.integers(1, 12),
)
@settings(max_examples=4)
def test_killed_at_any_moment_it_goes_on_without_gap_or_double(actions, rows_per_shard, tmp_path_factory):
    """The folder is copied at every step of every write, with the file that was being written whole, in part or empty."""
    here, n = tmp_path_factory.mktemp("killed"), len(actions) + 2
    folder, moments = here / "cache", []

    def moment():
        for share in (0.5, 1.0) if any(folder.glob("*.partial")) else (1.0,):
            copy = here / f"copy{len(moments)}"
            moments.append(copy)
            shutil.copytree(folder, copy)
            for partial in copy.glob("*.partial"):
                os.truncate(partial, int(partial.stat().st_size * share))

    def fill():
        cache = ActivationCache.open(folder, RECORD, rows_per_shard=rows_per_shard)
        done = 0
        for action in actions:
            if action == "append":
                cache.append(chunk(done))
                done += 1
            else:
                cache.flush({"next": done})
        for i in range(done, n):
            cache.append(chunk(i))
        cache.finish()

    really_replace = os.replace

    def replace_and_look(source, target):
        moment()
        really_replace(source, target)
        moment()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: moment())
        patch.setattr(os, "replace", replace_and_look)
        fill()
    assert len(moments) > 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for copy in moments:
            cache = ActivationCache.open(copy, RECORD, rows_per_shard=rows_per_shard)
            if not cache.complete:
                assert same(given_back(cache.chunks()), range(cache.n_chunks))
                assert not list(copy.glob("*.partial"))
                go_on(cache, n, every=2)
            assert same(given_back(ActivationCache.open(copy, RECORD).chunks()), range(n))
            listed = {shard["file"] for shard in json.loads((copy / "manifest.json").read_text())["shards"]}
            assert {path.name for path in copy.iterdir()} == listed | {"manifest.json", "filling.lock"}


def _fill(folder, n, begun):
    torch.set_num_threads(1)
    cache = ActivationCache.open(folder, RECORD, rows_per_shard=50)
    os.write(begun, b"x")
    go_on(cache, n, every=20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_for_real_again_and_again(folder):
    chance, n, processes = random.Random(0), 500, multiprocessing.get_context("fork")
    saved, amid_writing = [0], 0
    for patience in itertools.count(1):
        reading, begun = os.pipe()
        process = processes.Process(target=_fill, args=(folder, n, begun))
        process.start()
        os.close(begun)
        assert os.read(reading, 1) == b"x"  # it has the cache open, and is going to write from now on
        os.close(reading)
        process.join(chance.uniform(0, 0.01 * patience))  # more each time, so that any machine gets there
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        manifest = json.loads((folder / "manifest.json").read_text())
        saved.append(sum(shard["chunks"] for shard in manifest["shards"]))
        written = {path.name for path in folder.glob("*.*")} - {"manifest.json", "filling.lock"}
        amid_writing += bool(written - {shard["file"] for shard in manifest["shards"]})
    assert saved == sorted(saved) and len(set(saved)) > 3, saved  # killed between flushes, several times
    assert amid_writing > 0, "no kill left anything unlisted behind"
    cache = ActivationCache.open(folder, RECORD)
    assert cache.complete and same(given_back(cache.chunks()), range(n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_is_rounded_as_torch_rounds(folder, dtype):
    special = torch.tensor([[0.0, -0.0, 1e-30, 3.389e38]], dtype=torch.float64).to(dtype)
    rows_nd = torch.cat([special, torch.randn(50, D, dtype=torch.float64).to(dtype)])
    cache = ActivationCache.open(folder, RECORD)
    cache.append(Chunk(rows_nd.T.contiguous().T, torch.arange(51)))
    cache.finish()
    (rows, _), *rest = given_back(cache.chunks())
    assert not rest and torch.equal(rows.view(torch.int16), rows_nd.to(torch.bfloat16).view(torch.int16))


def test_what_was_appended_may_be_overwritten(folder):
    cache, mine = ActivationCache.open(folder, RECORD), chunk(5, rows=6)
    cache.append(mine)
    mine.rows_nd.zero_()
    mine.images_n.zero_()
    cache.flush()
    assert same(given_back(cache.chunks()), [5], lambda i: chunk(i, rows=6))


def test_what_is_read_may_be_overwritten(folder):
    cache = filled(folder)
    for c in cache.chunks():
        c.rows_nd.fill_(7)
        c.images_n.fill_(7)
    for reader in (cache, ActivationCache.open(folder, RECORD)):
        assert same(given_back(reader.chunks()), range(9))


def test_chunks_are_never_split_and_large_ones_get_a_file_of_their_own(folder):
    cache = ActivationCache.open(folder, RECORD, rows_per_shard=10)
    sizes = [4, 4, 4, 35, 10, 1, 0, 9]
    for i, size in enumerate(sizes):
        cache.append(chunk(i, size))
    cache.finish()
    files = sorted(folder.glob("*.safetensors"))
    assert [load_file(file)["chunk_sizes"].tolist() for file in files] == [[4, 4], [4], [35], [10], [1, 0, 9]]
    assert [len(c.rows_nd) for c in cache.chunks()] == sizes


def test_only_chunks_without_rows(folder):
    cache = ActivationCache.open(folder, RECORD)
    cache.append(chunk(0, 0))
    cache.append(chunk(1, 0))
    cache.finish()
    assert [tuple(c.rows_nd.shape) for c in ActivationCache.open(folder, RECORD).chunks()] == [(0, D), (0, D)]


def test_nothing_at_all(folder):
    ActivationCache.open(folder, RECORD).finish()
    cache = ActivationCache.open(folder, RECORD)
    assert cache.complete and cache.n_chunks == cache.n_rows == 0
    assert not list(cache.chunks()) and not list(cache.shuffled(0))


@given(start=st.integers(0, 40))
def test_reading_begins_anywhere(start, _forty):
    assert same(given_back(_forty.chunks(start)), range(start, 40), four_rows)


@given(seed=st.integers(0, 2**31), start=st.integers(0, 40))
def test_shuffled_is_a_permutation_that_the_seed_decides_and_goes_on_anywhere(seed, start, _forty):
    whole = given_back(_forty.shuffled(seed))
    order = [int(images[0]) // 100 for _, images in whole]
    assert same(whole, order, four_rows) and sorted(order) == list(range(40))
    rest = given_back(ActivationCache.open(_forty.folder, RECORD).shuffled(seed, start))
    assert same(rest, order[start:], four_rows)


@given(seed=st.integers(0, 99), stretch=st.integers(1, 60))
def test_shuffled_goes_a_stretch_after_another(seed, stretch, _forty):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_module, "_STRETCH", stretch)
        order = [int(images[0]) // 100 for _, images in given_back(_forty.shuffled(seed))]
    chunks = max(1, stretch // 4)  # of four rows
    stretches = [number // chunks for number in order]
    assert sorted(order) == list(range(40))
    assert sum(a != b for a, b in itertools.pairwise(stretches)) == len(set(stretches)) - 1


def test_the_order_does_not_depend_on_the_shards(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "cache"
    for where, rows_per_shard in ((folder, 7), (other, 10**6)):
        cache = ActivationCache.open(where, RECORD, rows_per_shard=rows_per_shard)
        for i in range(30):
            cache.append(chunk(i))
        cache.finish()
    one, two = (ActivationCache.open(where, RECORD) for where in (folder, other))
    assert len(list(folder.glob("rows-*"))) > 5 and len(list(other.glob("rows-*"))) == 1
    for (rows, images), (others, others_images) in zip(
        given_back(one.shuffled(3)), given_back(two.shuffled(3)), strict=True
    ):
        assert torch.equal(rows, others) and torch.equal(images, others_images)


def test_other_seeds_give_other_orders(_forty):
    orders = [[int(images[0]) // 100 for _, images in given_back(_forty.shuffled(seed))] for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert len({order[0] // 5 for order in orders}) > 3
    assert len({order[0] % 5 for order in orders}) > 2


def four_rows(i):
    return chunk(i, 4)


@pytest.fixture(scope="module")
def _forty(tmp_path_factory):
    cache = ActivationCache.open(tmp_path_factory.mktemp("forty"), RECORD, rows_per_shard=20)
    for i in range(40):
        cache.append(four_rows(i))
    cache.finish()
    return cache


# The files. -----------------------------------------------------------------------------------------------------------


def test_safetensors_alone_reads_it_as_the_docs_say(folder, monkeypatch):
    filled(folder)
    page = (Path(__file__).parents[1] / "docs" / "cache.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "safe_open" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    monkeypatch.chdir(folder.parent)
    seen = {}
    exec(code.replace("imagenet-cache", "cache"), seen)
    first = shards_of(folder)[0]
    assert tuple(seen["rows"].shape) == (first["rows"], D) and seen["rows"].dtype == torch.bfloat16
    assert len(seen["images"]) == first["rows"] and len(seen["chunk_sizes"]) == first["chunks"]


def test_the_worked_example_in_the_docs_is_what_is_written(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "cache.md").read_text()
    (text,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    example = json.loads(text)
    cache = ActivationCache.open(tmp_path / "c", CacheRecord.from_dict(example["record"]), rows_per_shard=4)
    for i, size in enumerate([2, 2, 1]):
        cache.append(Chunk(torch.full((size, 3), float(i)), torch.arange(size) + 2 * i))
    cache.flush({"next": 3})
    assert json.loads((tmp_path / "c" / "manifest.json").read_text()) == example


def test_every_tensor_is_aligned_and_the_shard_lists_what_the_manifest_says(folder):
    filled(folder)
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        raw = (folder / shard["file"]).read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        assert all((8 + n + entry["data_offsets"][0]) % 8 == 0 for entry in header.values())
        assert {name: entry["dtype"] for name, entry in header.items()} == {
            "rows": "BF16",
            "images": "I64",
            "chunk_sizes": "I64",
        }
        assert len(raw) == shard["bytes"]


def test_a_file_is_opened_once_for_all_its_chunks_and_hashed_once(folder, monkeypatch):
    cache = filled(folder, n=60)
    shards, opened, hashed = len(list(folder.glob("rows-*"))), [], []
    really_hash = cache_format.hashlib.file_digest
    monkeypatch.setattr(cache_format, "safe_open", lambda path, framework: opened.append(path) or safe_open(path, framework))
    monkeypatch.setattr(cache_format.hashlib, "file_digest", lambda *a: hashed.append(a) or really_hash(*a))
    for _ in range(3):
        list(cache.chunks())
    list(cache.shuffled(0))
    assert len(opened) <= 4 * shards + 1 and len(hashed) == shards
    opened.clear()
    list(cache.chunks(start=cache.n_chunks - 1))
    assert len(opened) == 1


# Another cache than the one asked for. --------------------------------------------------------------------------------

OTHERS = {
    "hook_point.layer: stored is 1, asked for is 2": {"hook_point": replace(POINT, layer=2).to_dict()},
    "hook_point.layout.registers: stored is 0, asked for is 4": {
        "hook_point": replace(POINT, layout=replace(POINT.layout, registers=4)).to_dict()
    },
    "tower: the tower's weights are others: of 5 that were compared, 1 differ": {
        "tower": replace(TOWER, linear_values=(0.25, -0.75)).to_dict()
    },
    "tower: this is block 2 (of 0 to 2) of its tower, not block 1 (of 0 to 2)": {"tower": replace(TOWER, layer=2).to_dict()},
    "tower: stored is {": {"tower": None},
    "tokens.read: stored is 'patches', asked for is 'last'": {"tokens": {**RECORD.tokens, "read": "last"}},
    "tokens.seed: stored is 0, asked for is None": {"tokens": {"read": "patches", "per_image": 2}},
    "data: stored is 'sha256:1234', asked for is 'sha256:0'": {"data": "sha256:0"},
    "n_images: stored is 100, asked for is None": {"n_images": None},
    "processor: stored is 'sha256:5678', asked for is None": {"processor": None},
    "dtype: stored is 'torch.float32', asked for is 'torch.bfloat16'": {"dtype": "torch.bfloat16"},
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("line", OTHERS)
def test_another_record_is_refused_by_the_field_that_differs(folder, line, complete):
    cache = ActivationCache.open(folder, RECORD)
    cache.append(chunk(1))
    cache.finish() if complete else cache.flush()
    cache.close()
    before = contents(folder)
    with pytest.raises(ActivationCacheError) as refused:
        ActivationCache.open(folder, replace(RECORD, **OTHERS[line]))
    message = str(refused.value)
    assert line in message and str(folder) in message and "another folder" in message
    assert message.count("stored is") + message.count("tower: th") == 1, message
    assert contents(folder) == before


def test_every_differing_field_is_named(folder):
    filled(folder)
    other = replace(RECORD, data="x", dtype="y", processor="z", tower=replace(TOWER, d_in=5).to_dict())
    with pytest.raises(ActivationCacheError, match=r"(?s)tower: .*data: .*processor: .*dtype: "):
        ActivationCache.open(folder, other)


def test_the_order_of_the_images_matters_only_while_it_fills(folder):
    other = replace(RECORD, order={"seed": 1, "batch_size": 8})
    cache = ActivationCache.open(folder, RECORD)
    cache.append(chunk(0))
    cache.flush()
    cache.close()
    with pytest.raises(ActivationCacheError, match=r"order\.seed: stored is 0, asked for is 1"):
        ActivationCache.open(folder, other)
    ActivationCache.open(folder, RECORD).finish()
    assert same(given_back(ActivationCache.open(folder, other).chunks()), [0])


def test_a_tower_in_another_precision_is_the_same_tower_but_its_dtype_is_not(folder):
    filled(folder)
    rounded = replace(TOWER, values=(0.5, 1.0, 3.0, None)).to_dict()
    assert ActivationCache.open(folder, replace(RECORD, tower=rounded)).complete


def test_a_record_survives_json():
    record = CacheRecord.from_dict(json.loads(json.dumps(RECORD.to_dict())))
    assert record == RECORD and record.differences(RECORD) == () and hash(RECORD.data)
    assert HookPoint.from_dict(record.hook_point) == POINT and TowerRecord.from_dict(record.tower) == TOWER


def test_a_record_that_json_cannot_hold_is_refused():
    with pytest.raises(TypeError):
        replace(RECORD, tokens={"read": torch.zeros(1)})


# Damage, and folders of others. ---------------------------------------------------------------------------------------


def resealed(folder, **changes):
    """A manifest changed by someone who knows how to seal it."""
    path = folder / "manifest.json"
    data = {**json.loads(path.read_text()), **changes}
    data.pop("sha256")
    data["sha256"] = cache_format._digest(data)
    path.write_text(json.dumps(data))


def shards_of(folder):
    return json.loads((folder / "manifest.json").read_text())["shards"]


def flip(path, at=-3):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "a shard altered": lambda f: flip(f / "rows-00001.safetensors"),
    "a shard's header altered": lambda f: flip(f / "rows-00001.safetensors", 40),
    "a shard cut": lambda f: os.truncate(f / "rows-00001.safetensors", 200),
    "a shard longer": lambda f: os.truncate(f / "rows-00001.safetensors", 10_000),
    "a shard missing": lambda f: (f / "rows-00001.safetensors").unlink(),
    "a shard in the place of another": lambda f: shutil.copy(f / "rows-00000.safetensors", f / "rows-00001.safetensors"),
    "a shard that is a folder": lambda f: [(f / "rows-00001.safetensors").unlink(), (f / "rows-00001.safetensors").mkdir()],
    "the manifest cut": lambda f: os.truncate(f / "manifest.json", 300),
    "the manifest empty": lambda f: (f / "manifest.json").write_text(""),
    "the manifest altered": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"patches"', '"last"')
    ),
    "the manifest no text": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "the manifest a list": lambda f: (f / "manifest.json").write_text("[]"),
    "the manifest very deep": lambda f: (f / "manifest.json").write_text("[" * 100_000),
    "the manifest missing": lambda f: (f / "manifest.json").unlink(),
    "the manifest a folder": lambda f: [(f / "manifest.json").unlink(), (f / "manifest.json").mkdir()],
    "a name out of the folder": lambda f: resealed(f, shards=[{**s, "file": "../" + s["file"]} for s in shards_of(f)]),
    "an absolute name": lambda f: resealed(f, shards=[{**s, "file": str(f / s["file"])} for s in shards_of(f)]),
    "a shard twice": lambda f: resealed(f, shards=[shards_of(f)[0]] * 2),
    "a number of a wrong type": lambda f: resealed(f, shards=[{**s, "rows": str(s["rows"])} for s in shards_of(f)]),
    "a negative number": lambda f: resealed(f, shards=[{**s, "chunks": -1} for s in shards_of(f)]),
    "an unknown field": lambda f: resealed(f, shards=[{**s, "size": 1} for s in shards_of(f)]),
    "other numbers of rows": lambda f: resealed(f, shards=[{**s, "rows": s["rows"] + 1} for s in shards_of(f)]),
    "other numbers of chunks": lambda f: resealed(f, shards=[{**s, "chunks": s["chunks"] + 1} for s in shards_of(f)]),
    "completeness of a wrong type": lambda f: resealed(f, complete="yes"),
    "a record without its fields": lambda f: resealed(f, record={"hook_point": {}}),
    "no shards at all": lambda f: resealed(f, shards=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_that_names_the_file(folder, damage):
    filled(folder, n=30)
    assert len(shards_of(folder)) > 2
    DAMAGE[damage](folder)
    with pytest.raises(ActivationCacheError) as refused:
        list(ActivationCache.open(folder, RECORD).chunks())
    name = "rows-00001.safetensors" if damage.startswith("a shard") and "twice" not in damage else "manifest.json"
    name = "rows-00000.safetensors" if damage.startswith("other numbers") else name
    assert str(folder / name) in str(refused.value) and "damaged" in str(refused.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"rows": torch.zeros(4, D), "images": torch.zeros(4, dtype=torch.int64), "chunk_sizes": torch.tensor([4])},
        {"rows": torch.zeros(4, D + 1).bfloat16(), "images": torch.arange(4), "chunk_sizes": torch.tensor([4])},
        {"rows": torch.zeros(4, D).bfloat16(), "images": torch.arange(4), "chunk_sizes": torch.tensor([3])},
        {"rows": torch.zeros(4, D).bfloat16(), "images": torch.arange(3), "chunk_sizes": torch.tensor([4])},
        {"rows": torch.zeros(4, D).bfloat16(), "images": torch.arange(4), "chunk_sizes": torch.tensor([5, -1])},
        {"rows": torch.zeros(4, D).bfloat16(), "images": torch.arange(4)},
    ],
    ids=["dtype", "width", "sizes", "images", "negative", "missing"],
)
def test_a_shard_that_others_made_must_hold_what_it_should(folder, tensors):
    filled(folder, n=1)
    path = folder / "rows-00000.safetensors"
    save_file(tensors, path)
    n_chunks = len(tensors.get("chunk_sizes", [0]))
    stated = {"file": path.name, "rows": 4, "chunks": n_chunks, "bytes": path.stat().st_size}
    digest = cache_format.hashlib.sha256(path.read_bytes()).hexdigest()
    resealed(folder, shards=[{**stated, "sha256": digest}])
    with pytest.raises(ActivationCacheError, match=re.escape(str(path))):
        list(ActivationCache.open(folder, RECORD).chunks())


def test_an_unknown_version_is_named_before_all_else(folder):
    filled(folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({"format": "sauce_hooks activations", "version": 2, "news": []}))
    with pytest.raises(ActivationCacheError, match="format version 2; this library reads version 1"):
        ActivationCache.open(folder, RECORD)
    path.write_text(json.dumps({"format": "something else", "version": 1}))
    with pytest.raises(ActivationCacheError, match="'something else'"):
        ActivationCache.open(folder, RECORD)


@pytest.mark.parametrize("name", ["photo.jpg", "manifest.json.bak", "rows.safetensors", ".hidden"])
def test_a_folder_of_others_is_refused_and_left_alone(folder, name):
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(ActivationCacheError, match=re.escape(name)):
        ActivationCache.open(folder, RECORD)
    assert contents(folder) == {name: b"mine"}


def test_a_file_is_no_folder(folder):
    folder.write_text("mine")
    with pytest.raises(ActivationCacheError, match="is a file"):
        ActivationCache.open(folder, RECORD)
    assert folder.read_text() == "mine"


def test_leftovers_are_removed_and_only_those(folder):
    cache = ActivationCache.open(folder, RECORD, rows_per_shard=4)
    for i in range(10):
        cache.append(chunk(i))
    cache.flush()
    n = len(shards_of(folder))
    cache.close()
    ours = [f"rows-{n:05d}.safetensors", "rows-00000.safetensors.partial", "rows-99999.safetensors", "manifest.json.partial"]
    theirs = ["notes.txt", "rows-1.safetensors", "rows-00000.safetensors.old", "other.partial", "xrows-00009.safetensors"]
    for name in ours + theirs:
        (folder / name).write_text("x")
    (folder / "rows-77777.safetensors").mkdir()
    cache = ActivationCache.open(folder, RECORD)
    left = {path.name for path in folder.iterdir()}
    assert not left & set(ours) and left >= {*theirs, "rows-77777.safetensors"}
    assert same(given_back(cache.chunks()), range(10))


def test_a_complete_cache_is_not_touched_by_reading(folder):
    filled(folder)
    (folder / "rows-99999.safetensors").write_text("x")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.iterdir()]}
    list(ActivationCache.open(folder, RECORD).shuffled(0))
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.iterdir()]}


# A disk that is full, or not to be written to. ------------------------------------------------------------------------


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("moment", ["append", "flush", "manifest", "finish"])
def test_a_full_disk_loses_nothing_and_leaves_nothing(folder, call, moment, monkeypatch):
    cache = ActivationCache.open(folder, RECORD, rows_per_shard=8)
    for i in range(3):
        cache.append(chunk(i, 4))
    cache.flush({"next": 3})
    cache.append(chunk(3, 8))
    if moment == "manifest":  # the shard can still be written, and its list can not
        cache.append(chunk(4, 8))
        cache._write_shard()
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left") as refused:
            {"append": lambda: cache.append(chunk(4, 8)), "finish": cache.finish}.get(moment, cache.flush)()
    assert refused.value.errno == errno.ENOSPC and str(folder) in str(refused.value)
    assert contents(folder) == before and same_sized(cache, 3, [4, 4, 4])
    if moment != "manifest":  # the disk has room again: what was appended is still there
        cache.append(chunk(4, 8))
    cache.finish()
    assert same_sized(ActivationCache.open(folder, RECORD), 5, [4, 4, 4, 8, 8])


def same_sized(cache, n, sizes):
    return same(given_back(cache.chunks()), range(n), lambda i: chunk(i, sizes[i]))


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
def test_a_file_that_cannot_be_written_to_its_end(folder):
    import resource

    cache = ActivationCache.open(folder, RECORD)
    cache.append(chunk(0, 50))
    cache.flush({"next": 1})
    cache.append(chunk(1, 5000))
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError) as refused:
            cache.flush({"next": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.errno == errno.EFBIG and str(folder) in str(refused.value)
    assert contents(folder) == before and cache.filling_state == {"next": 1}
    cache.flush({"next": 2})
    assert same_sized(ActivationCache(folder, cache._manifest, rows_per_shard=8, lock=None), 2, [50, 5000])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError) as refused:
        ActivationCache.open(tmp_path / "file" / "cache", RECORD)
    assert str(tmp_path / "file" / "cache") in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(folder):
    filled(folder)
    folder.chmod(0o500)
    try:
        assert ActivationCache.open(folder, RECORD).complete
        with pytest.raises(PermissionError, match=re.escape(str(folder))):
            ActivationCache.open(folder / "inner", RECORD)
    finally:
        folder.chmod(0o700)


# Who may write, and what. ---------------------------------------------------------------------------------------------


def _hold(folder, ready, done):
    cache = ActivationCache.open(folder, RECORD)
    ready.set()
    done.wait()
    cache.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_do_not_fill_one_cache(folder, no_waiting):
    processes = multiprocessing.get_context("fork")
    ready, done = processes.Event(), processes.Event()
    process = processes.Process(target=_hold, args=(folder, ready, done))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(ActivationCacheError, match="being filled by another process"):
            ActivationCache.open(folder, RECORD)
    finally:
        done.set()
        process.join()
    assert not ActivationCache.open(folder, RECORD).complete


def _hold_with_a_child(folder, ready):
    cache = ActivationCache.open(folder, RECORD)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,))  # as a loader's process
    child.start()
    ready.put((os.getpid(), child.pid))
    time.sleep(60)
    cache.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_process_holds_nothing_even_if_its_loaders_live_on(folder):
    processes = multiprocessing.get_context("fork")
    ready = processes.SimpleQueue()
    process = processes.Process(target=_hold_with_a_child, args=(folder, ready))
    process.start()
    parent, child = ready.get()
    os.kill(parent, signal.SIGKILL)
    process.join()
    os.kill(child, 0)  # it is alive
    filled(folder)
    assert ActivationCache.open(folder, RECORD).complete


def test_nor_does_one_process_twice(folder, no_waiting):
    cache = ActivationCache.open(folder, RECORD)
    with pytest.raises(ActivationCacheError, match="not closed"):
        ActivationCache.open(folder, RECORD)
    cache.close()
    assert ActivationCache.open(folder, RECORD).n_chunks == 0


def test_many_read_a_complete_cache(folder):
    filled(folder)
    readers = [ActivationCache.open(folder, RECORD) for _ in range(3)]
    assert all(same(given_back(reader.chunks()), range(9)) for reader in readers)


@pytest.mark.parametrize("what", ["complete", "closed"])
def test_nothing_is_added_to_a_cache_that_is_complete_or_closed(folder, what):
    cache = ActivationCache.open(folder, RECORD)
    cache.finish() if what == "complete" else cache.close()
    for add in (lambda: cache.append(chunk(1)), lambda: cache.flush({}), cache.finish):
        with pytest.raises(ActivationCacheError, match=f"{what}: nothing can be added"):
            add()


def test_an_incomplete_cache_is_not_shuffled(folder):
    cache = ActivationCache.open(folder, RECORD)
    with pytest.raises(ActivationCacheError, match="not complete"):
        cache.shuffled(0)


def test_a_chunk_of_another_width_is_refused(folder):
    cache = ActivationCache.open(folder, RECORD)
    with pytest.raises(ActivationCacheError, match=r"rows \(2, 5\).*4 wide"):
        cache.append(Chunk(torch.zeros(2, D + 1), torch.arange(2)))
    cache.append(chunk(0))
    cache.finish()
    assert same(given_back(cache.chunks()), [0])


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": torch.zeros(2)}, {"a": float("nan")}])
def test_a_state_that_json_would_change_is_refused(folder, state):
    cache = ActivationCache.open(folder, RECORD)
    cache.append(chunk(0))
    with pytest.raises(TypeError, match="JSON"):
        cache.flush(state)
    assert cache.n_chunks == 0
    cache.flush({"a": [1, {"b": None}]})
    assert cache.n_chunks == 1 and cache.filling_state == {"a": [1, {"b": None}]}


def test_a_shard_needs_room(folder):
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        ActivationCache.open(folder, RECORD, rows_per_shard=0)
    assert not folder.exists()
