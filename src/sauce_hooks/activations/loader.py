"""Images for a training: decoded in worker processes, in an order that a seed decides, from any place on again."""

from __future__ import annotations

import json
import logging
import os
import signal
import warnings
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from sauce_hooks.activations.images import NEEDS_PROCESSOR, BrokenImage, ImageBatch, Prepare, judge, listing
from sauce_hooks.activations.sources import (
    Batches,
    HubStream,
    Item,
    Once,
    Order,
    Reader,
    Shards,
    Sized,
    cut,
    find_source,
    permutation,
)
from sauce_hooks.errors import ImagesError, ResumeError

_log = logging.getLogger("sauce_hooks")
_MOST_WORKERS = 16
_JUDGED_AFTER = 100
"""Images after which the share of broken ones says something."""
_GRACE_S = 30
"""Seconds that a worker still works after a SIGTERM."""


class ImageLoader:
    """Batches of model inputs, epoch after epoch.

    Data with a length comes in one order whatever the number of workers: batch `j` of an epoch goes to process `j % world`,
    and each process gets as many `ImageBatch`es as every other (at the end perhaps one without images). A stream is shared
    out by its shards, so its order depends on the number of processes and workers, and processes may get unequal numbers.

    Args of the constructor:
        images: a folder, one file, paths, PIL images, arrays, a Hugging Face dataset (also streaming), WebDataset shards (a
            path, paths, a pattern such as "shards/{000..009}.tar", a folder of them, a `webdataset.WebDataset`), any sized
            sequence of such images, or batches of model inputs.
        processor: the model's processor; only batches of model inputs need none.
        batch_size: images of a batch, readable or not.
        workers: processes that decode; 0 decodes in this one. None: as many as there are cores to spare, for data that has
            to be decoded.
        shuffle: another order every epoch. A stream's shards are ordered anew, and its rows within windows of 1,000.
        seed: decides the order.
        n_images: at most so many images of the data: the first, or with `shuffle` a choice that the seed makes once for all
            epochs. A stream ends after so many.
        max_broken: the share of images that may be unreadable.
        rank: the number of this process.
        world: how many processes share the data.
        log: a file that gets a JSON line for every unreadable image, once.
        dtype: of the floating model inputs made from images; None: as the processor makes them.
        pin_memory: give model inputs in page-locked memory, from where a GPU takes them while the host goes on.

    Raises:
        ImagesError: no images, images that can be read only once, or no processor where one is needed.
        ValueError: no such batch, process or number of images.
    """

    n_images: int | None
    """Images of an epoch in all processes, readable or not; None where that is not known before it ends."""
    workers: int
    """Processes that decode."""
    broken: dict[int, BrokenImage]
    """The unreadable images met so far, by index; those of a stream, which have none for good, numbered as they were met."""

    def __init__(
        self,
        images: Any,
        processor: Any = None,
        *,
        batch_size: int = 64,
        workers: int | None = 0,
        shuffle: bool = False,
        seed: int = 0,
        n_images: int | None = None,
        max_broken: float = 0.01,
        rank: int = 0,
        world: int = 1,
        log: Path | None = None,
        dtype: torch.dtype | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or (workers or 0) < 0 or not 0 <= rank < world or (n_images is not None and n_images < 1):
            given = f"batch_size={batch_size}, workers={workers}, rank={rank}, world={world}, n_images={n_images}"
            raise ValueError(f"no loader has {given}")
        source = find_source(images)
        if isinstance(source, Once):
            raise ImagesError(
                f"a loader reads its images more than once, so a {type(images).__name__} will not do: give a list"
            )
        if isinstance(source, HubStream | Shards):
            source.check(world)
            self.n_images = n_images
        else:
            if not len(source):
                raise ImagesError("no images")
            self.n_images = min(len(source), n_images or len(source))
        if processor is None and not isinstance(source, Batches):
            raise ImagesError(NEEDS_PROCESSOR)
        self._source = source.first(self.n_images or 0) if isinstance(source, Batches) else source
        self._make, self._pin_memory = _Make(Prepare(processor, dtype)), pin_memory
        if workers is None:
            workers = 0 if source.kind == "images" else _spare_cores()
        self.workers = 0 if isinstance(source, Batches) else workers
        self._order = Order(shuffle, seed, 0, rank, world)
        self._batch_size, self._max_broken = batch_size, max_broken
        self._journal = _Journal(log) if log is not None else None
        self.broken = {}
        self._names: set[str] = set()
        self._at = _Place()
        self._resumed: _Place | None = None

    @property
    def kind(self) -> str:
        """What the data is: "files", "images", "dataset", "stream", "webdataset" or "inputs"."""
        return self._source.kind

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the data, of what can be seen without reading all of it."""
        return self._source.fingerprint()

    @property
    def n_batches(self) -> int | None:
        """Batches of an epoch in all processes, about; None where that is not known before it ends."""
        if isinstance(self._source, Batches):
            return len(self._source.batches)
        return None if self.n_images is None else -(-self.n_images // self._batch_size)

    # Reading. ---------------------------------------------------------------------------------------------------------

    def epoch(self, number: int) -> Generator[ImageBatch, None, None]:
        """All batches of an epoch that are this process's; after `load_state_dict` of this epoch, those that remain.

        One epoch runs at a time. Its workers end with it, when the iterator is closed, and when nobody holds it any more.

        Raises:
            ImagesError: more than `max_broken` of the images are unreadable, or all; or an item is no image.
        """
        resumed, self._resumed = self._resumed, None
        self._at = resumed if resumed is not None and resumed.epoch == number else _Place(number)
        return self._run(self._at)

    def _run(self, at: _Place) -> Generator[ImageBatch, None, None]:
        if at.finished:
            return
        if isinstance(self._source, HubStream | Shards):
            batches = self._streamed(self._source, at)
        else:
            batches = self._sized(self._source, at)
        try:
            for batch in batches:
                at.given += 1
                at.seen += len(batch)
                self._note(batch, at)
                yield batch
        finally:
            batches.close()
        at.finished = True
        if at.seen or self._order.world == 1:  # else other processes had the images
            failed = [self.broken[key] for key in at.failed]
            if len(failed) < at.seen:
                self._check_share(at)
            judge(at.seen, len(failed), failed)

    def _sized(self, source: Sized | Batches, at: _Place) -> Generator[ImageBatch, None, None]:
        order, world = self._order, self._order.world
        batches = self._batches(source, at.epoch)
        rounds = -(-len(batches) // world)
        mine = batches[order.rank :: world][at.given :]
        missing = rounds - at.given - len(mine)
        if mine:
            yield from self._load(_Chosen(source), None, batch_sampler=mine)
        for _ in range(missing):
            yield ImageBatch(None, torch.empty(0, dtype=torch.long))

    def _batches(self, source: Sized | Batches, epoch: int) -> list[list[int]]:
        n = len(source.batches) if isinstance(source, Batches) else len(source)
        if isinstance(source, Batches):
            numbers = permutation(n, self._order.seed, epoch) if self._order.shuffle else list(range(n))
            return [[i] for i in numbers]
        wanted = self.n_images or n
        numbers = list(range(wanted))
        if self._order.shuffle:
            chosen = permutation(n, self._order.seed)[:wanted] if wanted < n else numbers
            numbers = [chosen[i] for i in permutation(wanted, self._order.seed, epoch)]
        return [numbers[i : i + self._batch_size] for i in range(0, wanted, self._batch_size)]

    def _streamed(self, source: HubStream | Shards, at: _Place) -> Generator[ImageBatch, None, None]:
        order = replace(self._order, epoch=at.epoch)
        left = None
        if self.n_images is not None:
            left = self.n_images // order.world + (order.rank < self.n_images % order.world) - at.seen
            if left <= 0:
                return
        batches = self._load(_Streamed(source, order), at, batch_size=self._batch_size)
        for batch in batches:
            if left is not None and len(batch) > left:
                batch = _first(batch, left)
            yield batch
            if left is not None:
                left -= len(batch)
                if not left:
                    batches.close()
                    return

    def _load(self, data: Dataset[Any], stream: _Place | None, **options: Any) -> Generator[ImageBatch, None, None]:
        """What torchdata's loader gives, from where a stream stands. Its workers end with this generator."""
        from torchdata.stateful_dataloader import StatefulDataLoader

        # Its own, for without one it draws from torch's global random state, which is the caller's.
        generator = torch.Generator().manual_seed(self._order.seed % 2**63)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital")
            loader = StatefulDataLoader(
                data,
                collate_fn=self._make,
                generator=generator,
                num_workers=self.workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_outlive_interrupts if self.workers else None,
                **options,
            )
        if stream is not None and stream.stream is not None:
            loader.load_state_dict(stream.stream)
        batches = iter(loader)
        try:
            for batch in batches:
                if isinstance(batch, ImagesError):
                    raise batch
                if stream is not None:
                    stream.stream = loader
                yield batch
        finally:
            if stream is not None:
                stream.stream = loader.state_dict()
            del batches, loader  # nobody else holds them, so the workers end here

    # Images that cannot be read. --------------------------------------------------------------------------------------

    def _note(self, batch: ImageBatch, at: _Place) -> None:
        for one in batch.broken:
            streams = isinstance(self._source, HubStream | Shards)
            key = len(self.broken) if streams else one.index
            known = one.name in self._names if streams else key in self.broken
            if known and streams:
                key = next(k for k, other in self.broken.items() if other.name == one.name)
            at.failed.append(key)
            if known:
                continue
            self.broken[key] = one
            self._names.add(one.name)
            _log.warning("skipped %s, which cannot be read: %s", one.name, one.reason)
            if self._journal is not None:
                self._journal.add(one)
        if at.seen >= _JUDGED_AFTER:
            self._check_share(at)

    def _check_share(self, at: _Place) -> None:
        if len(at.failed) > self._max_broken * at.seen:
            names = listing([self.broken[key] for key in at.failed[:5]], len(at.failed))
            raise ImagesError(
                f"{len(at.failed) / at.seen:.1%} of the images cannot be read ({len(at.failed)} of {at.seen} so far), and "
                f"max_broken allows {self._max_broken:.1%}: {names}. Mend or remove them, or allow more"
            )

    # Going on. --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the running epoch stands: after the batch given out last. It can be written as JSON."""
        place = dict(vars(self._at))
        place["failed"] = list(self._at.failed)
        if hasattr(self._at.stream, "state_dict"):
            place["stream"] = self._at.stream.state_dict()
        return {"data": self._identity(), "place": place, "broken": [[k, asdict(one)] for k, one in self.broken.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next `epoch` of the state's number go on where the state was taken.

        Raises:
            ResumeError: the state is of other data or of another order; says which.
        """
        was, now = dict(state["data"]), self._identity()
        for name, value in now.items():
            if was.get(name) != value:
                what = _MEANING.get(name, name)
                raise ResumeError(f"the images cannot be gone on with: {what} was {was.get(name)!r} and is now {value!r}")
        self.broken = {int(key): BrokenImage(**one) for key, one in state["broken"]}
        self._names = {one.name for one in self.broken.values()}
        place: dict[str, Any] = {**state["place"], "failed": list(state["place"]["failed"])}
        self._at = self._resumed = _Place(**place)

    def _identity(self) -> dict[str, Any]:
        """All that decides which images come next."""
        order = self._order
        same = {"kind": self.kind, "fingerprint": self.fingerprint, "n_images": self.n_images, "shuffle": order.shuffle}
        same |= {"seed": order.seed, "batch_size": self._batch_size, "world": order.world}
        if isinstance(self._source, HubStream | Shards):  # each worker of each process has its part of a stream
            same |= {"workers": self.workers, "rank": order.rank}
        return same


_MEANING = {
    "fingerprint": "the data (its fingerprint)",
    "world": "the number of processes (world)",
    "workers": "the number of workers, by which a stream is shared out,",
    "rank": "the process (rank) whose part of the stream this is",
}


@dataclass
class _Place:
    """Where an epoch stands."""

    epoch: int = -1
    given: int = 0
    """Batches given out to this process."""
    seen: int = 0
    """Images in them."""
    failed: list[int] = field(default_factory=list[int])
    """Those that could not be read: keys of `ImageLoader.broken`."""
    finished: bool = False
    stream: Any = None
    """A stream's own state, or the loader that knows it."""


# What goes to the workers. -------------------------------------------------------------------------------------------


class _Chosen(Dataset[Item]):
    """Data with a length, of which a worker makes one whole batch at a time."""

    def __init__(self, source: Sized | Batches) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Item:
        return self._source.get([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Item]:
        return self._source.get(numbers)


class _Streamed(IterableDataset[Item]):
    """A stream. Its iterator has a state, which is what the loader asks for."""

    def __init__(self, source: HubStream | Shards, order: Order) -> None:
        self._source, self._order = source, order

    def __iter__(self) -> Reader:
        return Reader(self._source, self._order)


@dataclass(frozen=True)
class _Make:
    """Makes batches, and hands an `ImagesError` over as it is: raised in a worker it would come with its traceback."""

    prepare: Prepare

    def __call__(self, items: list[Item]) -> ImageBatch | ImagesError:
        try:
            return self.prepare(items)
        except ImagesError as problem:
            return problem


def _outlive_interrupts(_: int) -> None:
    """Ctrl-C goes to every process of a terminal, a scheduler's SIGTERM to every process of a job.

    The training decides when its workers end: it may still need their batch before it can save itself. But SIGTERM may also
    come from an interpreter that ends and waits for them, so they leave some time after it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(_GRACE_S)


def _first(batch: ImageBatch, n: int) -> ImageBatch:
    """The first `n` images of a batch of a stream, whose indices rise."""
    last = sorted([*batch.indices.tolist(), *(one.index for one in batch.broken)])[n - 1]
    good = int((batch.indices <= last).sum())
    inputs = cut(batch.inputs, good) if batch.inputs is not None and good else None
    return ImageBatch(inputs, batch.indices[:good], tuple(one for one in batch.broken if one.index <= last))


def _spare_cores() -> int:
    """Cores of this process that the tower leaves, where several processes share a machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class _Journal:
    """A JSON-lines file of unreadable images, each once, though several processes write it and trainings are resumed."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._known = Path(path), 0, set[str]()

    def add(self, one: BrokenImage) -> None:
        """Append it, unless it is there already."""
        whole = self._catch_up()
        if one.name in self._known:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:  # one write of one line: those of other processes do not mix with it
            file.write(b"" if whole else b"\n")
            file.write(json.dumps(asdict(one)).encode() + b"\n")

    def _catch_up(self) -> bool:
        """Read what has been added; whether the last line is whole (a process may have been killed while writing it)."""
        if not self._path.exists():
            return True
        with self._path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        end = added.rfind(b"\n") + 1
        self._read += end
        for line in added[:end].splitlines():
            try:
                self._known.add(json.loads(line)["name"])
            except (ValueError, KeyError, TypeError):
                continue
        return end == len(added)
