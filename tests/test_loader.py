"""The loader of images: every source, every order, every place to go on from."""

import contextlib
import gc
import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sauce_hooks.activations import count_images, iter_images
from sauce_hooks.activations import loader as loader_module
from sauce_hooks.activations.loader import BrokenImage, ImageBatch, ImageLoader
from sauce_hooks.errors import ImagesError, ResumeError, UnreadableImageWarning

N = 23
LIVE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(i):
    """A picture that tells its number."""
    return Image.new("RGB", (6, 4), (i % 256, i // 256, 7))


def encoded(i):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


class Plain:
    """An image processor that does nothing but stack pixels."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])}


def load(images, **options):
    return ImageLoader(images, Plain(), **{"batch_size": 4, **options})


def ids(batch):
    """The numbers of a batch's pictures."""
    return [] if batch.inputs is None else batch.inputs["pixel_values"][:, 0, 0, 0].tolist()


def summary(batches):
    return [(ids(batch), batch.indices.tolist(), [(one.index, one.name) for one in batch.broken]) for batch in batches]


def seen(loader, epoch=0):
    return [i for batch in loader.epoch(epoch) for i in ids(batch)]


# The sources. --------------------------------------------------------------------------------------------------------


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures 0 to N-1 as files, as parquet files and as shards, five of each of these."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    root = tmp_path_factory.mktemp("data")
    for kind in ("files", "parquet", "shards"):
        (root / kind).mkdir()
    for i in range(N):
        (root / "files" / f"class{i // 10}").mkdir(exist_ok=True)
        (root / "files" / f"class{i // 10}" / f"{i:03}.png").write_bytes(encoded(i))
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for s in range(5):
        mine = range(s * 5, min(N, s * 5 + 5))
        rows = {"image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in mine], "label": list(mine)}
        Dataset.from_dict(rows, features=features).to_parquet(root / "parquet" / f"{s}.parquet", batch_size=2)
        members = [(f"{i:03}.{suffix}", content) for i in mine for suffix, content in
                   (("cls", b"1"), ("png", encoded(i)), ("mask.png", encoded(99)))]  # fmt: skip
        write_tar(root / "shards" / f"{s}.tar", members)
    return root


def rows_of(shards):
    for s in shards:
        for i in range(s * 5, min(N, s * 5 + 5)):
            yield {"image": picture(i)}


def source(kind, home):
    import datasets
    import webdataset

    pictures = [picture(i) for i in range(N)]
    stacked = np.stack([np.asarray(one) for one in pictures])
    shards = sorted(str(path) for path in (home / "shards").iterdir())
    parquet = sorted(str(path) for path in (home / "parquet").iterdir())
    match kind:
        case "folder":
            return home / "files"
        case "paths":
            return sorted(str(path) for path in (home / "files").rglob("*.png"))
        case "pictures":
            return pictures
        case "array":
            return stacked
        case "tensors":
            return [torch.from_numpy(one).permute(2, 0, 1) for one in stacked]
        case "bytes":
            return [encoded(i) for i in range(N)]
        case "sized":
            return Sequence(N)
        case "dataset":
            return datasets.Dataset.from_dict({"label": list(range(N)), "photo": pictures}, features=datasets.Features(
                {"label": datasets.Value("int64"), "photo": datasets.Image()}))  # fmt: skip
        case "dataset of paths":
            paths = sorted(str(path) for path in (home / "files").rglob("*.png"))
            return datasets.Dataset.from_dict({"image": paths})
        case "parquet stream":
            return datasets.load_dataset("parquet", data_files=parquet, streaming=True, split="train")
        case "arrow stream":
            return datasets.Dataset.from_dict({"image": pictures}).to_iterable_dataset(num_shards=5)
        case "generator stream":
            return datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": list(range(5))})
        case "shards":
            return shards
        case "folder of shards":
            return home / "shards"
        case "shard pattern":
            return str(home / "shards" / "{0..4}.tar")
        case "WebDataset":
            return webdataset.WebDataset(shards, shardshuffle=False)


class Sequence:
    """A map-style dataset as torch knows them: it has a length and items, and cannot be iterated."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"image": picture(i)}


SIZED = ["folder", "paths", "pictures", "array", "tensors", "bytes", "sized", "dataset", "dataset of paths"]
STREAMS = ["parquet stream", "arrow stream", "generator stream"]
SHARDS = ["shards", "folder of shards", "shard pattern", "WebDataset"]
KINDS = {**dict.fromkeys(SIZED[:2], "files"), **dict.fromkeys(SIZED[2:7], "images"), **dict.fromkeys(SIZED[7:], "dataset")}


@pytest.mark.parametrize("kind", [*SIZED, *STREAMS, *SHARDS])
def test_every_source_gives_the_same_pictures(home, kind):
    loader = load(source(kind, home))
    batches = list(loader.epoch(0))
    assert [i for batch in batches for i in ids(batch)] == list(range(N))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(N))
    assert all(isinstance(batch, ImageBatch) and len(batch) == 4 for batch in batches[:-1])
    assert seen(loader, 1) == list(range(N))
    pictures = list(iter_images(source(kind, home)))
    assert [np.asarray(one)[0, 0, 0] for one in pictures] == list(range(N))
    if kind in SIZED:
        assert loader.n_images == count_images(source(kind, home)) == N
        assert loader.kind == KINDS[kind]
    else:
        assert loader.n_images is None
        assert loader.kind == ("stream" if kind in STREAMS else "webdataset")
        with pytest.raises(ImagesError, match="not known"):
            count_images(source(kind, home))


def test_batches_of_model_inputs_pass_through():
    batches = [{"pixel_values": torch.full((n, 3, 2, 2), float(n)), "labels": torch.arange(n)} for n in (3, 1, 2)]
    loader = ImageLoader(batches, workers=2)
    assert (loader.kind, loader.n_images) == ("inputs", 6)
    given_out = list(loader.epoch(0))
    assert all(got.inputs is batch for got, batch in zip(given_out, batches, strict=True))
    assert [batch.indices.tolist() for batch in given_out] == [[0, 1, 2], [3], [4, 5]]
    assert sorted(i for b in ImageLoader(batches, shuffle=True, seed=3).epoch(1) for i in b.indices.tolist()) == list(
        range(6)
    )
    five = list(ImageLoader(batches, n_images=5).epoch(0))
    assert [batch.inputs["labels"].tolist() for batch in five] == [[0, 1, 2], [0], [0]]
    assert ImageLoader({"pixel_values": torch.zeros(2, 3, 2, 2)}).n_images == 2


def test_a_real_processor_gives_what_it_gives(home):
    from tiny import build_processor

    processor = build_processor()
    expected = processor.image_processor(images=[picture(i) for i in range(N)], return_tensors="pt")["pixel_values"]
    for workers in (0, 2):
        loader = ImageLoader(home / "files", processor, batch_size=5, workers=workers)
        assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in loader.epoch(0)]), expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (iter([picture(0)]), "more than once"),
        ({b"1"}, "more than once"),
        ([], "no images"),
        (np.zeros((0, 4, 4, 3)), "no images"),
        ("no/such/folder", "no such folder"),
        ("no/such/{0..2}.tar", "3 of 3 shards are missing"),
        (3, "cannot read"),
        ("pipe:touch hacked.tar", "shell"),
        (["pipe:touch hacked.tar"], "shell"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(wrong, message):
    with pytest.raises(ImagesError, match=message):
        load(wrong)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrong", [[3], [object], [{"text": "a tiger"}]])
def test_what_is_no_image_is_refused_when_met(wrong, workers):
    with pytest.raises(ImagesError, match=r"^cannot read an image from \w+$"):
        list(load(wrong, workers=workers).epoch(0))


def test_images_without_a_processor_are_refused():
    with pytest.raises(ImagesError, match="processor"):
        ImageLoader([picture(0)])


def test_columns_that_could_be_meant_are_listed():
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"left": [picture(0)], "right": [picture(1)], "label": [3]})
    with pytest.raises(ImagesError, match=r"several columns hold images.*left \(Image\), right \(Image\), label \(Value\)"):
        load(data)
    with pytest.raises(ImagesError, match="no column holds images"):
        load(data.select_columns(["label"]).to_iterable_dataset())
    with pytest.raises(ImagesError, match="train"):
        load(DatasetDict(train=data))


def test_a_transform_of_the_callers_is_kept():
    from datasets import Dataset

    data = Dataset.from_dict({"image": [picture(i) for i in range(3)]})
    data.set_transform(lambda rows: {"image": [picture(200) for _ in rows["image"]]})
    assert seen(load(data)) == [200] * 3


# The order. ----------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(-3, 3), epoch=st.integers(0, 3))
@settings(LIVE, max_examples=40)
def test_shuffled_is_every_image_once_in_an_order_of_seed_and_epoch(n, batch_size, seed, epoch):
    options = {"shuffle": True, "seed": seed, "batch_size": batch_size}
    images = [picture(i) for i in range(n)]
    order = seen(load(images, **options), epoch)
    assert sorted(order) == list(range(n))
    assert seen(load(images, **options), epoch) == order
    if n > 20:
        assert seen(load(images, **options), epoch + 1) != order != list(range(n))
        assert seen(load(images, **{**options, "seed": seed + 1}), epoch) != order


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_workers_change_nothing(home, kind):
    expected = summary(load(source(kind, home), shuffle=True).epoch(1))
    for workers in (1, 2):
        assert summary(load(source(kind, home), shuffle=True, workers=workers).epoch(1)) == expected


@given(n=st.integers(1, 30), batch_size=st.integers(1, 5), world=st.integers(1, 4), shuffle=st.booleans())
@settings(LIVE, max_examples=25)
def test_the_processes_batches_are_those_of_one_process_dealt_in_turn(n, batch_size, world, shuffle):
    options = {"batch_size": batch_size, "shuffle": shuffle, "seed": 5}
    images = [picture(i) for i in range(n)]
    one = summary(load(images, **options).epoch(2))
    each = [summary(load(images, rank=rank, world=world, **options).epoch(2)) for rank in range(world)]
    assert len({len(batches) for batches in each}) == 1
    dealt = [batch for round_ in zip(*each, strict=True) for batch in round_]
    assert dealt[: len(one)] == one
    assert all(batch == ([], [], []) for batch in dealt[len(one) :])


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("kind", ["parquet stream", "shards"])
def test_processes_and_workers_share_a_stream_out(home, kind, world, workers):
    found, numbers = [], []
    for rank in range(world):
        for batch in load(source(kind, home), shuffle=True, seed=1, rank=rank, world=world, workers=workers).epoch(1):
            found += ids(batch)
            numbers += batch.indices.tolist()
    assert sorted(found) == list(range(N)) and found != list(range(N))
    assert len(set(numbers)) == N


def test_shards_must_suffice_for_the_processes(home):
    with pytest.raises(ImagesError, match="5 shards cannot be shared by 6"):
        load(home / "shards", world=6)


@pytest.mark.parametrize("kind", ["generator stream", "parquet stream", "shards"])
def test_a_stream_is_shuffled_anew_every_epoch(home, kind):
    def orders():
        loader = load(source(kind, home), shuffle=True, seed=7)
        return [seen(loader, epoch) for epoch in range(3)]

    found = orders()
    assert all(sorted(order) == list(range(N)) for order in found)
    assert len({tuple(order) for order in found}) == 3
    assert orders() == found


@pytest.mark.parametrize("kind", ["pictures", "parquet stream", "shards"])
def test_n_images_limits_an_epoch(home, kind):
    loader = load(source(kind, home), n_images=10)
    assert loader.n_images == 10
    assert seen(loader) == list(range(10)) == seen(loader, 1)
    each = [seen(load(source(kind, home), n_images=10, rank=rank, world=3, batch_size=3)) for rank in range(3)]
    assert sum(map(len, each)) == len(set().union(*each)) == 10
    assert len(seen(load(source(kind, home), n_images=10, workers=2))) == 10


def test_a_shuffled_limit_is_one_choice_for_all_epochs():
    images = [picture(i) for i in range(100)]
    loader = load(images, n_images=20, shuffle=True, seed=2)
    first, second = seen(loader, 0), seen(loader, 1)
    assert sorted(first) == sorted(second) and first != second
    assert max(first) > 50
    assert sorted(first) != sorted(seen(load(images, n_images=20, shuffle=True, seed=3)))


# Going on. -----------------------------------------------------------------------------------------------------------


def assert_goes_on(make, stops, epoch=1):
    """Stopped after each of these numbers of batches, a new loader gives exactly what remains."""
    whole = summary(make().epoch(epoch))
    assert whole
    for stop in {stop % (len(whole) + 1) for stop in stops}:
        loader = make()
        running = loader.epoch(epoch)
        first = summary([next(running) for _ in range(stop)])
        state = json.loads(json.dumps(loader.state_dict()))
        running.close()
        if stop:
            assert json.loads(json.dumps(loader.state_dict())) == state  # also after the iterator was closed
        again = make()
        again.load_state_dict(state)
        assert json.loads(json.dumps(again.state_dict())) == state
        middle = again.epoch(epoch)
        second = summary([next(middle)]) if stop < len(whole) else []
        third = make()  # and once more, from where a resumed one stands
        third.load_state_dict(json.loads(json.dumps(again.state_dict())))
        assert first + second + summary(third.epoch(epoch)) == whole
        assert second + summary(middle) == whole[stop:]
        assert summary(again.epoch(epoch)) == whole  # only once


@given(stop=st.integers(0, 30), shuffle=st.booleans(), world=st.integers(1, 3), n_images=st.sampled_from([None, 9]))
@settings(LIVE, max_examples=12)
@pytest.mark.parametrize("kind", ["folder", "dataset", "array"])
def test_data_with_a_length_goes_on_anywhere(home, kind, stop, shuffle, world, n_images):
    data = source(kind, home)
    options = {"batch_size": 2, "shuffle": shuffle, "rank": world - 1, "world": world, "n_images": n_images}
    assert_goes_on(lambda: load(data, **options), [stop])


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [*STREAMS, "shards"])
def test_a_stream_goes_on_anywhere(home, kind, shuffle):
    assert_goes_on(lambda: load(source(kind, home), shuffle=shuffle, batch_size=3), range(10))
    assert_goes_on(lambda: load(source(kind, home), shuffle=shuffle, batch_size=3, n_images=10), range(5))


@given(stop=st.integers(0, 30), batch_size=st.integers(1, 8), shuffle=st.booleans(), world=st.integers(1, 2))
@settings(LIVE, max_examples=12)
@pytest.mark.parametrize("kind", ["parquet stream", "shards"])
def test_a_stream_goes_on_anywhere_with_any_batch_size(home, kind, stop, batch_size, shuffle, world):
    data = source(kind, home)
    assert_goes_on(lambda: load(data, shuffle=shuffle, batch_size=batch_size, world=world), [stop])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["folder", "generator stream", "parquet stream", "shards"])
def test_it_goes_on_with_workers(home, kind, shuffle):
    data = source(kind, home)
    assert_goes_on(lambda: load(data, shuffle=shuffle, workers=2), [0, 3, 100 if kind == "folder" else 5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", *STREAMS, "shards"])
def test_it_goes_on_with_workers_anywhere(home, kind):
    for shuffle in (False, True):
        assert_goes_on(lambda shuffle=shuffle: load(source(kind, home), shuffle=shuffle, workers=2), range(1, 9, 3))


def test_small_windows_go_on_too(home, monkeypatch):
    from sauce_hooks.activations import sources

    monkeypatch.setattr(sources, "WINDOW", 7)
    for kind in ("parquet stream", "shards"):
        assert_goes_on(lambda kind=kind: load(source(kind, home), shuffle=True, batch_size=3), range(9))


def test_a_stream_that_the_caller_shuffled_goes_on_exactly(home):
    data = source("parquet stream", home).shuffle(seed=3, buffer_size=9, max_buffer_input_shards=1)
    assert_goes_on(lambda: load(data), range(7))


def test_data_with_a_length_goes_on_with_other_workers(home):
    loader = load(home / "files", shuffle=True)
    whole, running = summary(loader.epoch(0)), loader.epoch(0)
    next(running)
    again = load(home / "files", shuffle=True, workers=2)
    again.load_state_dict(loader.state_dict())
    assert summary(again.epoch(0)) == whole[1:]


def test_nothing_that_was_given_out_is_opened_again(home, monkeypatch):
    from sauce_hooks.activations import images

    for kind in ("folder", "dataset", "parquet stream", "shards"):
        loader = load(source(kind, home), shuffle=True)
        running = loader.epoch(0)
        early = ids(next(running)) + ids(next(running))
        again = load(source(kind, home), shuffle=True)
        again.load_state_dict(loader.state_dict())
        opened = []
        decode = images._decoded
        monkeypatch.setattr(
            images, "_decoded", lambda content, decode=decode, opened=opened: opened.append(1) or decode(content)
        )
        assert sorted(seen(again) + early) == list(range(N))
        assert len(opened) == N - len(early)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed was 0"),
        ({"shuffle": True}, "shuffle"),
        ({"batch_size": 5}, "batch_size was 4"),
        ({"world": 2}, "processes"),
        ({"n_images": 7}, "n_images"),
    ],
)
def test_going_on_with_another_order_is_refused(home, change, named):
    state = load(home / "files").state_dict()
    with pytest.raises(ResumeError, match=named):
        load(home / "files", **change).load_state_dict(state)


def test_going_on_with_other_data_or_other_workers_of_a_stream_is_refused(home, tmp_path):
    with pytest.raises(ResumeError, match="kind was 'files'"):
        load([picture(0)]).load_state_dict(load(home / "files").state_dict())
    with pytest.raises(ResumeError, match="fingerprint"):
        load([picture(1)]).load_state_dict(load([picture(0)]).state_dict())
    with pytest.raises(ResumeError, match="workers"):
        load(home / "shards", workers=2).load_state_dict(load(home / "shards").state_dict())


@pytest.mark.parametrize("kind", [*SIZED, *STREAMS, *SHARDS])
def test_a_fingerprint_is_that_of_the_data(home, kind):
    if kind != "generator stream":
        assert load(source(kind, home)).fingerprint == load(source(kind, home)).fingerprint
    if kind in ("pictures", "array", "tensors", "dataset", "bytes"):
        data = source(kind, home)
        assert load(data).fingerprint != load(data.select(range(9)) if kind == "dataset" else data[:9]).fingerprint


def test_a_fingerprint_sees_a_changed_file_and_not_a_moved_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(encoded(0))
    before = load(tmp_path / "a").fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(tmp_path / "b").fingerprint == before
    (tmp_path / "b" / "0.png").write_bytes(encoded(0) + b"1")
    assert load(tmp_path / "b").fingerprint != before


# Images that cannot be read. -----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """20 good pictures and two that are broken."""
    for i in range(20):
        (tmp_path / f"{i:03}.png").write_bytes(encoded(i))
    (tmp_path / "005x.png").write_bytes(b"not an image")
    (tmp_path / "010x.jpg").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_counted_and_named_once(damaged, tmp_path_factory, workers, caplog):
    log = tmp_path_factory.mktemp("run") / "deep" / "broken.jsonl"
    loader = load(damaged, max_broken=0.2, workers=workers, log=log)
    with (
        caplog.at_level(logging.WARNING, "sauce_hooks"),
        pytest.warns(UnreadableImageWarning, match="skipped 2 of 22.*005x"),
    ):
        assert seen(loader) == list(range(20))
    with pytest.warns(UnreadableImageWarning):
        assert seen(loader, 1) == list(range(20))
    assert list(loader.broken) == [6, 12]
    assert loader.broken[6] == BrokenImage(6, str(damaged / "005x.png"), "not an image of a known format")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["index"], line["name"]) for line in lines] == [(6, loader.broken[6].name), (12, loader.broken[12].name)]
    assert [record.args[0] for record in caplog.records] == [line["name"] for line in lines]


def test_the_log_has_each_once_after_a_resume_and_a_kill(damaged, tmp_path_factory):
    log = tmp_path_factory.mktemp("run") / "broken.jsonl"
    loader = load(damaged, max_broken=1, log=log, batch_size=3)
    running = loader.epoch(0)
    next(running)
    state = loader.state_dict()
    next(running), next(running)  # meets the first, then dies while it writes the second
    with log.open("a") as file:
        file.write('{"index": 12, "na')
    again = load(damaged, max_broken=1, log=log, batch_size=3)
    again.load_state_dict(state)
    with pytest.warns(UnreadableImageWarning, match="skipped 2 of 22"):
        list(again.epoch(0))
    lines = log.read_text().splitlines()
    assert [json.loads(line)["index"] for line in (lines[0], lines[2])] == [6, 12] and len(lines) == 3


def test_counts_go_on_with_the_epoch(damaged):
    loader = load(damaged, max_broken=0.2)
    running = loader.epoch(0)
    for _ in range(4):
        next(running)
    again = load(damaged, max_broken=0.2)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert list(again.broken) == [6, 12]
    with pytest.warns(UnreadableImageWarning, match="skipped 2 of 22.*005x"):
        list(again.epoch(0))


def test_too_many_broken_images_stop_it(damaged):
    with pytest.raises(ImagesError, match=r"9\.1% .*2 of 22.*1\.0%.*005x\.png \(not an image.*010x\.jpg"):
        list(load(damaged).epoch(0))
    loader = load([b"broken"] * 3 + [picture(0)] * 400, max_broken=0.02)
    with pytest.raises(ImagesError, match=r"3 of 100 so far"):
        list(loader.epoch(0))
    few = [b"broken"] * 2 + [picture(0)] * 198
    with pytest.raises(ImagesError, match="2 of 100"):  # though it would be 1% in the end
        list(load(few, max_broken=0.015).epoch(0))
    with pytest.warns(UnreadableImageWarning, match="2 of 200"):
        list(load([*reversed(few)]).epoch(0))
    with pytest.raises(ImagesError, match=r"100 of 100"):
        list(load([b"broken"] * 1000).epoch(0))


def test_none_that_can_be_read_is_an_error(home):
    with pytest.raises(ImagesError, match="none of the 2 images"):
        list(load([b"broken"] * 2, max_broken=1).epoch(0))


def test_a_warning_only_where_something_was_broken(home):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen(load(home / "files"))


def test_broken_rows_of_datasets_and_shards_are_skipped(tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = [encoded(i) if i % 7 else b"broken" + bytes([i]) for i in range(20)]
    images = [{"bytes": row, "path": None} for row in rows] + [None]
    features = Features({"image": ImageFeature()})
    Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "0.parquet")
    data = Dataset.from_dict({"image": [*images, {"bytes": None, "path": "nowhere.png"}]}, features=features)
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", row) for i, row in enumerate(rows)])
    good = [i for i in range(20) if i % 7]
    from datasets import load_dataset

    parquet = str(tmp_path / "0.parquet")
    forms = {
        "nowhere.png": (data, 5),
        "sha256": (load_dataset("parquet", data_files=parquet, streaming=True, split="train"), 4),
        "0.tar/7.jpg": (tmp_path / "0.tar", 3),
    }
    for name, (form, n_broken) in forms.items():
        for shuffle in (False, True):
            loader = load(form, max_broken=1, shuffle=shuffle)
            for epoch in range(2):
                with pytest.warns(UnreadableImageWarning, match=f"skipped {n_broken} of"):
                    assert sorted(seen(loader, epoch)) == good
            assert len(loader.broken) == n_broken
            assert name in " ".join(one.name for one in loader.broken.values())


def test_a_shard_that_ends_too_early_is_named(home, tmp_path):
    whole = (home / "shards" / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2 + 600])
    loader = load([tmp_path / "0.tar", home / "shards" / "1.tar"], max_broken=1)
    with pytest.warns(UnreadableImageWarning, match=r"0\.tar: what follows its first \d images"):
        found = seen(loader)
    assert found[-5:] == [5, 6, 7, 8, 9] and found[:-5] == list(range(len(found) - 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableImageWarning)
        assert_goes_on(lambda: load([tmp_path / "0.tar", home / "shards" / "1.tar"], max_broken=1), range(3))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_in_a_shard_are_not_opened(tmp_path):
    import pickle

    members = [("0.png", encoded(0)), ("0.pkl", pickle.dumps(Bomb())), ("0.pyd", pickle.dumps(Bomb())), ("1.json", b"{}")]
    write_tar(tmp_path / "0.tar", members)
    assert seen(load(tmp_path / "0.tar")) == [0]


def test_shards_without_the_library_say_what_to_install(home, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImagesError, match=r"pip install 'sauce-hooks\[webdataset\]'"):
        load(home / "shards")


def test_a_webdataset_that_does_more_is_refused(home):
    import webdataset

    shards = [str(path) for path in (home / "shards").iterdir()]
    plain = webdataset.WebDataset(shards, shardshuffle=False)
    for more in (plain.decode("pil"), plain.shuffle(10), plain.compose().repeat(2),
                 webdataset.WebDataset(shards, shardshuffle=False, select_files=lambda name: False)):  # fmt: skip
        with pytest.raises(ImagesError, match="does more"):
            load(more)


def noise(mode):
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return pixels.convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}))


@pytest.mark.filterwarnings("error")
def test_odd_images_become_rgb(tmp_path):
    noise("CMYK").save(tmp_path / "cmyk.jpg")
    noise("RGBA").save(tmp_path / "alpha.png")
    noise("LA").save(tmp_path / "grey_alpha.png")
    noise("1").save(tmp_path / "bits.png")
    noise("P").save(tmp_path / "palette.png", transparency=bytes(range(9)))
    noise("P").save(tmp_path / "animated.gif", save_all=True, append_images=[noise("P")] * 2)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    (tmp_path / "folder.jpg").mkdir()
    found = list(iter_images(tmp_path))
    assert len(found) == 7 and all((image.mode, image.size) == ("RGB", (8, 8)) for image in found)
    deep = np.asarray(found[4])[..., 0].flatten()
    assert np.array_equal(deep, np.arange(64) * 1000 // 256)


def test_photographs_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (6, 4))
    wide.save(tmp_path / "0.jpg", exif=exif)
    from datasets import Dataset

    forms = [tmp_path, [(tmp_path / "0.jpg").read_bytes()], [Image.open(tmp_path / "0.jpg")],
             Dataset.from_dict({"image": [str(tmp_path / "0.jpg")]})]  # fmt: skip
    assert [next(iter_images(form)).size for form in forms] == [(4, 6)] * 4


@pytest.mark.filterwarnings("error")
def test_files_that_are_no_picture_are_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    picture(3).save(tmp_path / "fine.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "large.png")  # Pillow warns, and reads it
    Image.new("RGB", (20, 20)).save(tmp_path / "bomb.png")
    whole = io.BytesIO()
    noise("RGB").save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-20])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not found")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "folder.jpg").mkdir()
    paths = [*sorted(path for path in tmp_path.iterdir()), tmp_path / "missing.jpg"]
    loader = load(paths, max_broken=1, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableImageWarning)
        batches = list(loader.epoch(0))
    reasons = {path.name: loader.broken[i].reason if i in loader.broken else "" for i, path in enumerate(paths)}
    assert reasons.pop("fine.png") == reasons.pop("large.png") == ""
    assert "decompression bomb" in reasons.pop("bomb.png")
    assert "truncated" in reasons.pop("cut.jpg")
    assert "PostScript" in reasons.pop("program.eps")
    assert "directory" in reasons.pop("folder.jpg")
    assert "No such file" in reasons.pop("missing.jpg")
    assert set(reasons.values()) == {"not an image of a known format"}
    assert [batch.inputs is None for batch in batches] == [bool(i in loader.broken) for i in range(len(paths))]


class Picky:
    """A processor that does not take small pictures, as Qwen's takes no strips."""

    def __call__(self, images, return_tensors):
        if min(min(image.size) for image in images) < 4:
            raise ValueError("too small")
        return {"pixel_values": torch.stack([torch.tensor(np.asarray(image.resize((8, 8)))) for image in images])}


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_the_processor_does_not_take_are_broken_ones(workers):
    pictures = [Image.new("RGB", (9, 9 if i != 3 else 1)) for i in range(10)]
    loader = ImageLoader(pictures, Picky(), batch_size=5, workers=workers, max_broken=0.2)
    with pytest.warns(UnreadableImageWarning, match=r"image 3 .*processor does not take it: too small"):
        batches = list(loader.epoch(0))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(ImagesError, match=r"none of the 2 images can be read: .*too small"):
        list(ImageLoader([pictures[3]] * 2, Picky(), workers=workers).epoch(0))


# Worker processes. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "forget"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_workers_end_with_their_iterator(home, end, kind):
    loader = load(source(kind, home), workers=2, batch_size=2)
    running = loader.epoch(0)
    next(running)
    assert len(multiprocessing.active_children()) == 2
    if end == "close":
        running.close()
    else:
        del running
        gc.collect()
    assert multiprocessing.active_children() == []


def test_workers_outlive_signals_but_not_for_ever(home, monkeypatch):
    """A training that is told to end needs a batch more; an interpreter that ends tells them to, and waits."""
    monkeypatch.setattr(loader_module, "_GRACE_S", 1)
    running = load(source("folder", home), workers=1, batch_size=2).epoch(0)
    next(running)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    next(running)
    worker.join(0.3)
    assert worker.is_alive()
    with contextlib.suppress(RuntimeError):  # torch says so of its workers, if it hears of it before `join` does
        worker.join(10)
    assert not worker.is_alive()
    with contextlib.suppress(RuntimeError):
        running.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("kind", ["folder", "dataset", "parquet stream", "shards"])
def test_workers_may_be_started_any_way(home, kind, method, monkeypatch):
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(torch.multiprocessing, "Process", context.Process)
    monkeypatch.setattr(torch.multiprocessing, "Queue", context.Queue)
    monkeypatch.setattr(torch.multiprocessing, "Event", context.Event)
    assert sorted(seen(load(source(kind, home), workers=1, shuffle=True))) == list(range(N))


def test_what_goes_to_a_worker_can_be_pickled(home):
    import pickle

    from sauce_hooks.activations.loader import _Chosen, _Streamed

    for kind in [*SIZED, *STREAMS, *SHARDS]:
        loader = load(source(kind, home))
        data = _Chosen(loader._source) if kind in SIZED else _Streamed(loader._source, loader._order)
        pickle.loads(pickle.dumps((data, loader._make)))
