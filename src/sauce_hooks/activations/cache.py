"""Activations kept on disk: filled during the first pass over the images, read in the later ones. See docs/cache.md.

What counts is what was flushed. Whenever a process is killed, the cache is as the last `flush` left it, together with where
the loader stood then.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sauce_hooks.activations.cache_format import (
    LOCK,
    CacheRecord,
    Manifest,
    Shard,
    ShardContent,
    read_manifest,
    read_shard,
    refuse_strangers,
    remove_leftovers,
    write_manifest,
    write_shard,
    writing,
)
from sauce_hooks.errors import ActivationCacheError

__all__ = ["ActivationCache", "CacheRecord", "Chunk"]

_WAIT_S = 10.0
"""The loader's processes may outlive a killed process by some seconds, and with them its lock."""
_STRETCH = 262_144
"""Rows, about, that are mixed when chunks are given shuffled; so that reading stays sequential on the whole."""
_OPEN = 64
"""Shards that are kept open: mapped into memory, so that they take none."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """The rows of one batch of images."""

    rows_nd: Float[Tensor, "n d"]
    images_n: Int[Tensor, " n"]
    """Position in the data of the image that each row is from."""


class ActivationCache:
    """Rows of activations in a folder, in the chunks they came in.

    Filling it: `append` every chunk; `flush` with the loader's state right before the training writes a checkpoint; `finish`
    after the last image. Only what was flushed counts, so the cache is never behind a checkpoint. A process that opens the
    folder later finds in `filling_state` where the loader stood after `n_chunks` chunks, and appends the next one.

    One process at a time fills a cache. Once it is complete any number read it, and nothing in the folder changes any more.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, rows_per_shard: int, lock: Any) -> None:
        """Use `ActivationCache.open`."""
        self.folder = folder
        self._manifest, self._rows_per_shard, self._lock = manifest, rows_per_shard, lock
        self._unlisted: tuple[Shard, ...] = ()  # full shards that the next flush lists
        self._rows_nd: Tensor | None = None  # room for one shard, in memory that is allocated once
        self._images_n: Tensor | None = None
        self._sizes: list[int] = []
        self._filled = 0
        self._checked: set[str] = set()

    @classmethod
    def open(cls, folder: str | Path, record: CacheRecord, *, rows_per_shard: int = 262_144) -> ActivationCache:
        """Make a cache, go on with one, or read one that is complete.

        Args:
            folder: a folder that is new or empty, or that holds a cache.
            record: what the rows are, or are to be.
            rows_per_shard: rows of a file, and those kept in memory while it fills. A chunk is never split: one that is
                larger gets a larger file to itself.

        Raises:
            ActivationCacheError: the folder holds something else, or activations of something else (says in what they
                differ), or a damaged cache; or another process fills it.
            OSError: it cannot be written.
            ValueError: a shard of no rows.
        """
        if rows_per_shard < 1:
            raise ValueError(f"a shard needs room: rows_per_shard is {rows_per_shard}")
        folder = Path(folder)
        manifest, lock = read_manifest(folder, record), None
        if manifest is None:
            refuse_strangers(folder)
        if manifest is None or not manifest.complete:
            lock = _lock(folder)
            try:
                manifest = read_manifest(folder, record)  # again: another process may have written until now
                if manifest is None:
                    manifest = Manifest(record)
                    write_manifest(folder, manifest)
                if manifest.complete:
                    lock = lock.release()
                else:
                    remove_leftovers(folder, manifest)
            except BaseException:
                lock.release()
                raise
        return cls(folder, manifest, rows_per_shard=rows_per_shard, lock=lock)

    @property
    def record(self) -> CacheRecord:
        """What the rows are."""
        return self._manifest.record

    @property
    def order(self) -> dict[str, Any]:
        """How the images came when it was filled."""
        return self.record.order

    @property
    def complete(self) -> bool:
        """Whether it holds the whole pass over the images."""
        return self._manifest.complete

    @property
    def n_chunks(self) -> int:
        """Chunks that are safely on disk."""
        return sum(shard.chunks for shard in self._manifest.shards)

    @property
    def n_rows(self) -> int:
        """Rows that are safely on disk."""
        return sum(shard.rows for shard in self._manifest.shards)

    @property
    def filling_state(self) -> dict[str, Any] | None:
        """What the last `flush` was given: where the loader stood. None before the first, and once complete."""
        return self._manifest.filling_state

    def append(self, chunk: Chunk) -> None:
        """Take the next chunk: a copy of it, rounded to bfloat16. Full shards go to disk, but count only once flushed.

        Raises:
            ActivationCacheError: the cache is complete or closed, or the chunk is of another width.
            OSError: the disk is full, say. This chunk was not taken; nothing else is lost, and one may try again.
        """
        self._must_be_filling()
        n = len(chunk.rows_nd)
        if chunk.rows_nd.shape != (n, self.record.d_in) or chunk.images_n.shape != (n,):
            raise ActivationCacheError(
                f"a chunk has rows {tuple(chunk.rows_nd.shape)} of images {tuple(chunk.images_n.shape)}; the rows of "
                f"{self.folder} are {self.record.d_in} wide, and each is of one image"
            )
        if self._filled + n > self._rows_per_shard:
            self._write_shard()
        if self._rows_nd is None or self._images_n is None or self._filled + n > len(self._rows_nd):
            room = max(self._rows_per_shard, n)
            self._rows_nd = torch.empty(room, self.record.d_in, dtype=torch.bfloat16)
            self._images_n = torch.empty(room, dtype=torch.int64)
        self._rows_nd[self._filled : self._filled + n].copy_(chunk.rows_nd)
        self._images_n[self._filled : self._filled + n].copy_(chunk.images_n)
        self._filled += n
        self._sizes.append(n)

    def flush(self, state: dict[str, Any] | None = None) -> None:
        """Put all that was appended safely on disk, and with it where the loader stands now.

        Args:
            state: the loader's state after the last chunk appended, as JSON gives it back (lists, keys that are strings).

        Raises:
            ActivationCacheError: the cache is complete or closed.
            TypeError: JSON would not give this state back as it is.
            OSError: the disk is full, say. What was appended is kept in memory, and one may try again.
        """
        self._must_be_filling()
        if not _json_keeps(state):
            raise TypeError("the loader's state must be what JSON gives back unchanged: no tuples or tensors, keys strings")
        self._list(replace(self._manifest, filling_state=state))

    def finish(self) -> None:
        """The pass over the images is over: put what is left on disk and mark the cache as complete.

        Raises:
            ActivationCacheError, OSError: as `flush`.
        """
        self._must_be_filling()
        self._list(replace(self._manifest, filling_state=None, complete=True))
        self.close()

    def close(self) -> None:
        """Let others fill it. What was not flushed is forgotten, as if the process had been killed. It can still be read."""
        self._rows_nd = self._images_n = None
        self._sizes, self._filled, self._unlisted = [], 0, ()
        if self._lock is not None:
            self._lock = self._lock.release()

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The chunks on disk as they were appended, in order, with rows in bfloat16 on the CPU.

        They are views of a file that is mapped into memory: nothing is read before it is used.

        Args:
            start: number of the chunk to begin with.

        Raises:
            ActivationCacheError: a file is damaged; found when it is come to, for the first time in this process.
        """
        return self._read(range(start, self.n_chunks))

    def shuffled(self, order_seed: int, start: int = 0) -> Iterator[Chunk]:
        """Every chunk once, in an order that the seed decides: a stretch of chunks after another, those of each mixed.

        Args:
            order_seed: another one for every epoch.
            start: how many chunks of this order to leave out.

        Raises:
            ActivationCacheError: the cache is not complete, so that the order would not last; or as `chunks`.
        """
        if not self.complete:
            raise ActivationCacheError(f"{self.folder} is not complete: until then it is read in order, by chunks()")
        generator = torch.Generator().manual_seed(order_seed)
        numbers = range(self.n_chunks)
        first = next(self._read(numbers[:1]), None)
        # Not the shards: where they end depends on when a training was interrupted, and the order must not.
        length = max(1, _STRETCH // max(1, 0 if first is None else len(first.rows_nd)))
        stretches = [numbers[i : i + length] for i in range(0, len(numbers), length)]
        order = [
            stretches[i][k]
            for i in _permutation(len(stretches), generator)
            for k in _permutation(len(stretches[i]), generator)
        ]
        return self._read(order[start:])

    def _must_be_filling(self) -> None:
        if self._lock is None:
            problem = "is complete" if self.complete else "was closed"
            raise ActivationCacheError(f"{self.folder} {problem}: nothing can be added to it")

    def _list(self, manifest: Manifest) -> None:
        self._write_shard()
        manifest = replace(manifest, shards=manifest.shards + self._unlisted)
        write_manifest(self.folder, manifest)
        self._manifest, self._unlisted = manifest, ()

    def _write_shard(self) -> None:
        if self._rows_nd is None or self._images_n is None or not self._sizes:
            return
        content = ShardContent(self._rows_nd[: self._filled], self._images_n[: self._filled], torch.tensor(self._sizes))
        number = len(self._manifest.shards) + len(self._unlisted)
        self._unlisted += (write_shard(self.folder, number, content),)
        self._sizes, self._filled = [], 0

    def _read(self, numbers: Sequence[int]) -> Iterator[Chunk]:
        """Chunks by number. A few shards are kept open, for a stretch of chunks may lie in more than one."""
        ends = list(itertools.accumulate(shard.chunks for shard in self._manifest.shards))
        opened: dict[int, tuple[ShardContent, list[int]]] = {}
        for number in numbers:
            i = bisect.bisect_right(ends, number)
            if i not in opened:
                if len(opened) == _OPEN:
                    del opened[next(iter(opened))]
                opened[i] = self._open_shard(self._manifest.shards[i])
            content, rows = opened[i]
            k = number - (ends[i] - self._manifest.shards[i].chunks)
            yield Chunk(content.rows_nd[rows[k] : rows[k + 1]], content.images_n[rows[k] : rows[k + 1]])

    def _open_shard(self, shard: Shard) -> tuple[ShardContent, list[int]]:
        """A shard, and where each of its chunks begins and the last ends."""
        content = read_shard(self.folder, shard, self.record.d_in, check=shard.file not in self._checked)
        self._checked.add(shard.file)
        return content, list(itertools.accumulate(cast(list[int], content.chunk_sizes_m.tolist()), initial=0))


def _lock(folder: Path) -> Any:
    """The right to fill. The system takes it back when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=_WAIT_S, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise ActivationCacheError(
                f"{folder} is being filled by another process, or by an ActivationCache of this one that was not closed. "
                "Wait until it is complete, or give another folder."
            ) from None
    return lock


def _json_keeps(state: dict[str, Any] | None) -> bool:
    try:
        return json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError):
        return False


def _permutation(n: int, generator: torch.Generator) -> list[int]:
    return cast(list[int], torch.randperm(n, generator=generator).tolist())
