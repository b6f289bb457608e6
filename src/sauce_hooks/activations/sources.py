"""What the images are given as: a source counts and names them, and hands them out undecoded, in order."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from sauce_hooks.errors import ImagesError
from sauce_hooks.hookpoint import PIXELS, VIDEOS

Inputs = Mapping[str, Tensor]
"""What a processor returns and a model takes: at least `pixel_values`."""

EXTENSIONS = frozenset(Image.registered_extensions())
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SCHEMES = ("http://", "https://", "hf://", "gs://")
"""From where webdataset may fetch shards: each is one program with one argument, and no shell."""
WINDOW = 1000
"""Images of a stream that are shuffled together. They must lie in memory, undecoded: about 100 MB of ImageNet."""
_SAMPLE = 64
"""Images in memory that a fingerprint looks at."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image that is not yet opened."""

    index: int
    name: str | None
    """A path, a row, a shard and key; None where a row has nothing that would tell it from others."""
    content: Any


@dataclass(frozen=True)
class Order:
    """Which part of a stream, and in which order: what is not the same in every epoch and every process."""

    shuffle: bool = False
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world: int = 1


def permutation(n: int, *seeds: int) -> list[int]:
    """The numbers below `n` in an order that the seeds decide."""
    entropy = np.random.SeedSequence([seed % 2**64 for seed in seeds]).generate_state(1, np.uint64)[0]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(entropy) >> 1)).tolist()


# Data whose every image can be asked for by its number. --------------------------------------------------------------


@dataclass(frozen=True)
class Sized:
    """Files, pictures in memory, rows of a dataset."""

    kind: str
    items: Any
    """Has a length, and an item for every number below it."""
    root: str | None = None
    """The folder that was given."""
    column: str | None = None
    """The column of a Hugging Face dataset that holds the images."""

    def __len__(self) -> int:
        return len(self.items)

    def get(self, numbers: Sequence[int]) -> list[Item]:
        """The items of these numbers."""
        if self.column is not None:  # Arrow reads a batch of rows at once
            rows = [row[self.column] for row in self.items.__getitems__(list(numbers))]
            return [Item(i, _row_name(i, row), row) for i, row in zip(numbers, rows, strict=True)]
        contents = [self.items[i] for i in numbers]
        return [
            Item(i, str(content) if isinstance(content, str | Path) else f"image {i}", content)
            for i, content in zip(numbers, contents, strict=True)
        ]

    def fingerprint(self) -> str:
        """Of files paths and sizes, of a Hugging Face dataset its own, of images in memory a hash of some of them."""
        if self.column is not None:
            return _hash(self.kind, self.column, self.items._fingerprint)
        if self.kind == "files":
            return _hash(self.kind, *_sizes(self.items, self.root))
        return _hash(self.kind, len(self), *(_digest(self.items[i]) for i in _spread(len(self))))


@dataclass(frozen=True)
class Batches:
    """Batches of model inputs, made by the caller."""

    batches: Sequence[Inputs]
    kind: str = "inputs"

    def __len__(self) -> int:
        return sum(map(count_inputs, self.batches))

    def get(self, numbers: Sequence[int]) -> list[Item]:
        """The batches of these numbers; an item's index is that of its first image."""
        return [Item(self._starts[i], f"batch {i}", self.batches[i]) for i in numbers]

    @cached_property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *map(count_inputs, self.batches)]).tolist()

    def first(self, n: int) -> Batches:
        """No more than `n` images: whole batches, the last perhaps cut."""
        kept: list[Inputs] = []
        for batch in self.batches:
            kept.append(cut(batch, n))
            n -= count_inputs(kept[-1])
            if not n:
                break
        return Batches(kept)

    def fingerprint(self) -> str:
        """A hash of some of the batches."""
        some = [self.batches[i] for i in _spread(len(self.batches))]
        return _hash(self.kind, len(self), *(f"{name} {_digest(b[name])}" for b in some for name in sorted(b)))


def is_inputs(item: Any) -> bool:
    """Whether this is a batch of model inputs."""
    return isinstance(item, Mapping) and any(name in item for name in (*PIXELS, *VIDEOS))


def count_inputs(inputs: Inputs) -> int:
    """How many images a batch of model inputs holds."""
    pixels = next((inputs[name] for name in (*PIXELS, *VIDEOS) if name in inputs), None)
    if pixels is None:
        raise ImagesError(f"the batch has no pixel_values (it has {', '.join(inputs)}): these are no images' inputs")
    return len(pixels)


def cut(inputs: Inputs, n: int) -> Inputs:
    """The first `n` images of a batch of model inputs.

    Raises:
        ImagesError: the batch is packed: its tensors have no row for each image.
    """
    total = count_inputs(inputs)
    if n >= total:
        return inputs
    if any(len(value) != total for value in inputs.values()):
        raise ImagesError(f"n_images would cut a packed batch of {total} images: choose a multiple of the batch size")
    return {name: value[:n] for name, value in inputs.items()}


# Data that comes as it comes. ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Once:
    """An iterator: it can be read once, and by one process."""

    items: Iterable[Any]
    kind: str = "iterator"


@dataclass(frozen=True)
class HubStream:
    """A streaming Hugging Face dataset, images not decoded."""

    data: Any
    column: str
    kind: str = "stream"

    def open(self, order: Order) -> HubRows:
        """This worker's rows in this order. The library shuffles and shares out the shards."""
        from datasets.distributed import split_dataset_by_node

        data = copy.deepcopy(self.data)  # where it stands is kept in the object
        if order.shuffle:
            # Its own buffer is no part of its state, so rows would be lost on resuming; ours is read again (see Reader).
            # With a buffer of one row it orders the shards. Reading several at once takes threads, and seconds to end them.
            data = data.shuffle(seed=order.seed % 2**32, buffer_size=1, max_buffer_input_shards=1)
            data.set_epoch(order.epoch)
        if order.world > 1:
            data = split_dataset_by_node(data, rank=order.rank, world_size=order.world)
        return HubRows(data, self.column, exact=not _buffers(self.data))

    def fingerprint(self) -> str:
        """What the dataset says of itself, for its rows cannot be looked at."""
        info, data = self.data.info, self.data
        facts = (info.dataset_name, info.config_name, info.version, data.split, data.num_shards, data.column_names)
        return _hash(self.kind, self.column, *facts)

    def check(self, world: int) -> None:
        """Nothing to check: rows are shared out where shards do not suffice."""


class HubRows:
    """The rows of a streaming dataset, and where it stands."""

    def __init__(self, data: Any, column: str, *, exact: bool) -> None:
        self._data, self._column, self._exact = data, column, exact
        self._rows: Iterator[Any] | None = None
        self._begin: Any = None  # not its state now: somebody may have looked at a row or two
        self._count = 0

    def __iter__(self) -> HubRows:
        return self

    def __next__(self) -> tuple[str | None, Any]:
        if self._rows is None:
            self._rows = self._opened()
        row = next(self._rows)
        self._count += 1
        return None, row[self._column]

    def _opened(self) -> Iterator[Any]:
        rows = islice(self._data, 0 if self._exact else self._count, None)
        with _without_buffer_warning():
            first = list(islice(rows, 1))
        return chain(first, rows)

    def state_dict(self) -> dict[str, Any]:
        """The dataset's own state; where that would lose what lies in a shuffle buffer, only the number of rows."""
        if not self._exact:
            return {"rows": self._count, "data": None}
        return {"rows": self._count, "data": self._begin if self._rows is None else self._data.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._count, self._begin, self._rows = state["rows"], state["data"], None
        if self._begin is not None:
            self._data.load_state_dict(self._begin)


def _buffers(data: Any) -> bool:
    """Whether somewhere in the stream rows wait in a shuffle buffer, which its state does not know."""

    def parts(node: Any) -> Iterator[Any]:
        yield node
        for inner in (getattr(node, "ex_iterable", None), *(getattr(node, "ex_iterables", None) or ())):
            if inner is not None:
                yield from parts(inner)

    return any(type(part).__name__ == "BufferShuffledExamplesIterable" for part in parts(data._ex_iterable))


@contextmanager
def _without_buffer_warning() -> Generator[None, None, None]:
    """At the first row after a state, it says that what lay in the shuffle buffer is lost; nothing was."""
    log = logging.getLogger("datasets.iterable_dataset")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True)
class Shards:
    """WebDataset: tar files, in which an image and what belongs to it have one name and several suffixes."""

    urls: tuple[str, ...]
    kind: str = "webdataset"

    def open(self, order: Order) -> ShardRows:
        """This worker's samples in this order."""
        urls = [self.urls[i] for i in permutation(len(self.urls), order.seed, order.epoch)] if order.shuffle else self.urls
        worker = get_worker_info()
        mine = urls[order.rank :: order.world]
        return ShardRows(mine if worker is None else mine[worker.id :: worker.num_workers])

    def fingerprint(self) -> str:
        """The shards' names and, where they are files, sizes."""
        return _hash(self.kind, *_sizes([url for url in self.urls if not _is_remote(url)], None), *self.urls)

    def check(self, world: int) -> None:
        """Whether every process gets a shard."""
        if len(self.urls) < world:
            raise ImagesError(f"{len(self.urls)} shards cannot be shared by {world} processes: make more, smaller ones")


class ShardRows:
    """The images of some shards one after another, and where they stand. Nothing but the images' bytes is read."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._shard = self._sample = 0
        self._samples: Iterator[tuple[str, bytes]] | None = None

    def __iter__(self) -> ShardRows:
        return self

    def __next__(self) -> tuple[str | None, Any]:
        while self._shard < len(self._urls):
            url = self._urls[self._shard]
            if self._samples is None:
                self._samples = islice(_samples(url), self._sample, None)
            try:
                key, image = next(self._samples)
            except StopIteration:
                self._next_shard()
            except Exception as problem:  # whatever a damaged tar makes the reader stumble over
                name = f"{url}: what follows its first {self._sample} images"
                self._next_shard()
                return name, OSError(f"{type(problem).__name__}: {problem.args[0] if problem.args else ''}")
            else:
                self._sample += 1
                return f"{url}/{key}", image
        raise StopIteration

    def _next_shard(self) -> None:
        self._shard, self._sample, self._samples = self._shard + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """The shard, and how many of its images have been given out."""
        return {"shard": self._shard, "sample": self._sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there: what comes before it in the shard is passed over."""
        self._shard, self._sample, self._samples = state["shard"], state["sample"], None


def _samples(url: str) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every image of a shard."""
    _webdataset()
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    # A path is opened here, for webdataset would take one like "pipe:..." for a command.
    with gopen(url) if _is_remote(url) or url.startswith("pipe:") else open(url, "rb") as stream:
        members: Any = tar_file_expander([{"url": url, "stream": stream}], select_files=_is_image)
        for sample in group_by_keys(members):
            keys = [key for key in sample if not key.startswith("__")]
            if keys:
                key = min(keys, key=lambda key: key.count("."))  # "jpg" before "mask.png"
                yield f"{sample['__key__']}.{key}", sample[key]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Reader:
    """A stream's images, shuffled within windows, numbered, and with a state that loses none of them.

    A state says where the rows stood when the window began, and how many of the window have gone out. So resuming reads
    at most one window again, and decodes nothing of it.
    """

    def __init__(self, stream: HubStream | Shards, order: Order) -> None:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        self._rows: Any = stream.open(order)
        self._order, self._size = order, WINDOW if order.shuffle else 1
        self._streams, self._stream = order.world * workers, order.rank * workers + number
        self._start, self._window, self._taken, self._count = self._rows.state_dict(), [], 0, 0

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Item:
        if self._taken == len(self._window):
            self._fill()
        if not self._window:
            raise StopIteration
        name, content = self._window[self._taken]
        index = self._count * self._streams + self._stream
        self._taken, self._count = self._taken + 1, self._count + 1
        return Item(index, name, content)

    def _fill(self) -> None:
        self._start, self._taken = self._rows.state_dict(), 0
        window = list(islice(self._rows, self._size))
        if self._size > 1:
            order = permutation(len(window), self._order.seed, self._order.epoch, self._stream, self._count)
            window = [window[i] for i in order]
        self._window: list[tuple[str | None, Any]] = window

    def state_dict(self) -> dict[str, Any]:
        """Where the next image is to be found."""
        return {"rows": self._start, "taken": self._taken, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._rows.load_state_dict(state["rows"])
        self._count = state["count"] - state["taken"]
        self._fill()
        self._taken, self._count = state["taken"], state["count"]


Source: TypeAlias = Sized | Batches | HubStream | Shards | Once


# Telling them apart. -------------------------------------------------------------------------------------------------


def find_source(images: Any) -> Source:
    """What was given, whatever it is.

    Raises:
        ImagesError: it is nothing that images can be read from, or there is no image in it.
    """
    if _is_a(images, "datasets", "DatasetDict", "IterableDatasetDict"):
        raise ImagesError(f"the dataset has several splits: choose one of them, for example images[{next(iter(images))!r}]")
    if _is_a(images, "datasets", "Dataset"):
        return _dataset(images)
    if _is_a(images, "datasets", "IterableDataset"):
        return _stream(images)
    if _is_a(images, "webdataset", "DataPipeline"):
        return _pipeline(images)
    if isinstance(images, str | Path):
        return _path(str(images))
    if isinstance(images, Mapping):  # one batch of model inputs
        return Batches([images])
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return Sized("images", images)
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return _sequence(images)
    if not isinstance(images, Iterable):
        raise ImagesError(f"cannot read images from {type(images).__name__}; give a folder, paths, PIL images or arrays")
    return Once(images)


def iter_items(source: Source) -> Iterator[Item]:
    """Every item once, in order."""
    if isinstance(source, Once):
        for i, content in enumerate(source.items):
            yield Item(i, str(content) if isinstance(content, str | Path) else f"image {i}", content)
    elif isinstance(source, HubStream | Shards):
        yield from Reader(source, Order())
    else:
        for i in range(len(source.batches) if isinstance(source, Batches) else len(source)):
            yield from source.get([i])


def _is_a(images: Any, library: str, *names: str) -> bool:
    """Whether it is of a class of a library, which then has been imported already."""
    module = sys.modules.get(library)
    return module is not None and any(isinstance(images, getattr(module, name, ())) for name in names)


def _path(path: str) -> Source:
    if os.path.isdir(path):
        return _folder(path)
    if os.path.isfile(path):
        return _shards([path]) if path.endswith(SHARD_SUFFIXES) else Sized("files", [path])
    if path.endswith(SHARD_SUFFIXES) or path.startswith(_SCHEMES) or path.startswith("pipe:"):
        return _shards(_expanded(path))
    raise ImagesError(f"no such folder of images: {path}")


def _folder(root: str) -> Source:
    found = [os.path.join(place, name) for place, _, names in os.walk(root) for name in names]
    files = sorted((path for path in found if _is_image(path)), key=lambda path: path.split(os.sep))
    if files:
        return Sized("files", files, root=root)
    shards = sorted((path for path in found if path.endswith(SHARD_SUFFIXES)), key=lambda path: path.split(os.sep))
    if shards:
        return _shards(shards)
    raise ImagesError(f"no image files in {root} (looked for {', '.join(sorted(EXTENSIONS)[:8])}, ..., and for .tar shards)")


def _sequence(images: Any) -> Source:
    if len(images) and is_inputs(images[0]):
        return Batches(images)
    if isinstance(images, list | tuple) and images and all(isinstance(item, str | Path) for item in images):
        paths = [str(item) for item in images]
        if all(path.endswith(SHARD_SUFFIXES) for path in paths):
            return _shards(paths)
        return Sized("files", paths)
    return Sized("images", images)


def _shards(urls: Sequence[str], *, commands: bool = False) -> Shards:
    _webdataset()
    if not commands and any(url.startswith("pipe:") for url in urls):
        raise ImagesError('"pipe:" runs a shell command, which a path may not do: give a webdataset.WebDataset object')
    missing = [url for url in urls if not _is_remote(url) and not url.startswith("pipe:") and not os.path.isfile(url)]
    if missing:
        raise ImagesError(f"{len(missing)} of {len(urls)} shards are missing: {', '.join(missing[:5])}")
    return Shards(tuple(urls))


def _is_remote(url: str) -> bool:
    return url.startswith(_SCHEMES)


def _expanded(pattern: str) -> list[str]:
    _webdataset()
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


def _webdataset() -> None:
    try:
        import webdataset  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as problem:
        raise ImagesError(
            f"WebDataset shards need the webdataset library ({problem}): pip install 'sauce-hooks[webdataset]'"
        ) from problem


def _pipeline(data: Any) -> Shards:
    """The shards of a `webdataset.WebDataset`. What else it does would be done twice or, worse, not: it is refused."""
    urls = getattr(data.pipeline[0], "urls", None) if data.pipeline else None
    stages = [getattr(stage, "f", stage) for stage in data.pipeline]
    names = [getattr(stage, "__name__", type(stage).__name__) for stage in stages]
    last = names.index("group_by_keys") if "group_by_keys" in names else -1
    more = [name for name in names[last + 1 :] if name != "check_empty"]
    selects = any(
        (getattr(stage, "kw", None) or {}).get(key) for stage in data.pipeline for key in ("select_files", "rename_files")
    )
    if not isinstance(urls, list) or last < 0 or more or selects or data.repetitions != 1:
        found = ", ".join(more) or "a selection, resampling or repetition"
        raise ImagesError(
            f"the WebDataset does more than to read its shards ({found}). Decoding, shuffling and epochs are "
            "done here: give the shards' paths, or a webdataset.WebDataset(urls) with nothing added"
        )
    return _shards([str(url) for url in urls], commands=True)


# Hugging Face datasets. ----------------------------------------------------------------------------------------------


def _dataset(data: Any) -> Source:
    column = _image_column(data.features, data.column_names)
    if data.format["type"] == "custom":  # the caller's own set_transform
        return Sized("images", data)
    return Sized("dataset", _undecoded(data.with_format(None).select_columns([column]), column), column=column)


def _stream(data: Any) -> HubStream:
    if data.features is not None:
        column = _image_column(data.features, data.column_names)
        return HubStream(_undecoded(data.select_columns([column]), column), column)
    first: Any = next(iter(data), None)  # a generator's rows, which nobody has described
    if first is None:
        raise ImagesError("no images: the stream is empty")
    pictures = [name for name, value in first.items() if isinstance(value, Image.Image | np.ndarray)]
    if "image" not in first and len(pictures) != 1:
        raise ImagesError(f"which column holds the images? Name it 'image'. The columns are {', '.join(first)}")
    return HubStream(data, "image" if "image" in first else pictures[0])


def _image_column(features: Mapping[str, Any], names: Sequence[str]) -> str:
    from datasets import Image as ImageFeature

    if "image" in names:
        return "image"
    found = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if len(found) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        which = "several columns hold images" if found else "no column holds images"
        raise ImagesError(f"cannot read images from the dataset: {which}. Name one 'image'. The columns are {columns}")
    return found[0]


def _undecoded(data: Any, column: str) -> Any:
    """One row that cannot be decoded would end the whole iteration, so rows are decoded here, one by one."""
    from datasets import Image as ImageFeature

    return data.cast_column(column, ImageFeature(decode=False))


def _row_name(i: int, row: Any) -> str:
    path = row.get("path") if isinstance(row, Mapping) else None
    return f"row {i} ({path})" if path else f"row {i}"


# Fingerprints. -------------------------------------------------------------------------------------------------------


def _hash(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()


def _sizes(paths: Iterable[str], root: str | None) -> Iterator[str]:
    """Path and size of each file; paths within the folder that was given, so that it may be moved."""
    prefix = os.path.join(root, "") if root else ""
    for path in paths:
        try:
            size = os.stat(path).st_size
        except OSError:
            size = -1
        yield f"{path.removeprefix(prefix)}\n{size}"  # relpath would take longer than all the rest


def _spread(n: int) -> list[int]:
    return sorted({round(i * (n - 1) / max(1, _SAMPLE - 1)) for i in range(_SAMPLE)}) if n else []


def _digest(content: Any) -> str:
    if isinstance(content, Mapping):
        return _hash(*(f"{name} {_digest(content[name])}" for name in sorted(content)))
    if isinstance(content, Image.Image):
        try:
            return _hash(content.mode, content.size, hashlib.sha256(content.tobytes()).hexdigest())
        except Exception:  # a picture that cannot be decoded
            return _hash(content.mode, content.size)
    if isinstance(content, Tensor):
        content = content.detach().cpu().contiguous()
        flat = content.reshape(-1).view(torch.uint8)
        return _hash(content.dtype, tuple(content.shape), hashlib.sha256(flat.numpy()).hexdigest())
    if isinstance(content, np.ndarray):
        return _hash(content.dtype, content.shape, hashlib.sha256(content.tobytes()).hexdigest())
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return str(content) if isinstance(content, str | Path) else type(content).__name__
