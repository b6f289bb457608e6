"""Shuffling rows that come image by image into batches that mix many images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ShuffleBuffer:
    """A reservoir of rows that never leaves one behind, in memory that is allocated once.

    `capacity` rows fill it; from then on the rows that come take random places, no place twice a push, and the rows that
    lay there go out. So a row stays for a geometric time, `capacity` rows long on average. What remains at the end goes
    out in random order. Every row that goes in comes out exactly once, and the generator alone decides the order.

    It holds `capacity` rows and the batch that is being filled. A row is copied twice: into its place, into its batch.
    """

    def __init__(self, *, batch_size: int, capacity: int, generator: torch.Generator) -> None:
        """An empty buffer.

        Args:
            batch_size: rows of a batch.
            capacity: rows that are mixed.
            generator: a generator of the CPU, whatever device the rows are on.

        Raises:
            ValueError: no room for a row.
        """
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"a buffer needs room: batch_size is {batch_size}, capacity is {capacity}")
        self.batch_size, self.capacity, self.generator = batch_size, capacity, generator
        self.taken = 0
        """Rows that have gone in, so that after `load_state_dict` the reader knows where to go on."""
        self._pool: Tensor | None = None
        self._filled = 0
        self._batch: Tensor | None = None
        self._waiting = 0
        self._leaving, self._coming = _nothing()  # places that are to be emptied, and the rows that take them

    def push(self, rows: Float[Tensor, "_ d"]) -> Iterator[Float[Tensor, "_ d"]]:
        """Take rows in and, whenever that fills a batch, give it out. Nothing happens before the first is asked for."""
        yield from self.pending()
        if self._pool is None:
            self._pool = rows.new_empty(self.capacity, rows.shape[1])
        room = min(self.capacity - self._filled, len(rows))
        self._pool[self._filled : self._filled + room] = rows[:room]
        self._filled += room
        self._coming = rows[room:]
        self.taken += len(rows)
        yield from self.pending()

    def pending(self) -> Iterator[Float[Tensor, "_ d"]]:
        """What a `push` that was broken off, or saved in its midst, would still have given out."""
        while len(self._leaving) or len(self._coming):
            if not len(self._leaving):
                self._leaving = self._order(self.capacity)[: len(self._coming)]
            self._move(min(self.batch_size - self._waiting, len(self._leaving)))
            if self._waiting == self.batch_size:
                yield self._finished()
        self._leaving, self._coming = _nothing()  # and no view of the rows given

    def flush(self) -> Iterator[Float[Tensor, "_ d"]]:
        """Give out what remains, the last batch perhaps short. The buffer is empty then."""
        yield from self.pending()
        self._leaving, self._filled = self._order(self._filled), 0
        yield from self.pending()
        if self._waiting:
            yield self._finished()
        self._pool = None

    def _order(self, n: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=self.generator)

    def _move(self, n: int) -> None:
        """The rows of the next `n` places into the batch, and the next rows, if there are any, into their places."""
        assert self._pool is not None
        if self._batch is None:
            self._batch = self._pool.new_empty(self.batch_size, self._pool.shape[1])
        places, self._leaving = _to(self._leaving[:n], self._pool.device), self._leaving[n:]
        torch.index_select(self._pool, 0, places, out=self._batch[self._waiting : self._waiting + n])
        self._waiting += n
        if len(self._coming):
            self._pool.index_copy_(0, places, self._coming[:n])
            self._coming = self._coming[n:]

    def _finished(self) -> Float[Tensor, "_ d"]:
        assert self._batch is not None
        batch, self._batch, self._waiting = self._batch[: self._waiting], None, 0
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that decides what comes next, at any time between two batches."""
        names = ("taken", "_pool", "_filled", "_batch", "_waiting", "_leaving", "_coming")
        state = {name.strip("_"): _copy(getattr(self, name)) for name in names}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a buffer of the same sizes: first comes what is `pending`, then the row `taken`.

        Raises:
            ValueError: the state is of a buffer of other sizes.
        """
        for name, size in (("pool", self.capacity), ("batch", self.batch_size)):
            if state[name] is not None and len(state[name]) != size:
                raise ValueError(f"the state is of another buffer: its {name} has {len(state[name])} rows, not {size}")
        self.generator.set_state(state["generator"])
        self.taken = state["taken"]
        for name in ("pool", "filled", "batch", "waiting", "leaving", "coming"):
            setattr(self, f"_{name}", _copy(state[name]))


def _nothing() -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.long), torch.empty(0, 0)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _to(places: Int[Tensor, " n"], device: torch.device) -> Int[Tensor, " n"]:
    """Indices on a device, on the way there without the host waiting for it."""
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places.to(device)


def shuffled_batches(
    chunks: Iterable[Float[Tensor, "_ d"]], *, batch_size: int, capacity: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "_ d"]]:
    """Batches of rows in random order from a stream of chunks: see `ShuffleBuffer`. The last batch may be short."""
    buffer = ShuffleBuffer(batch_size=batch_size, capacity=capacity, generator=generator)
    for chunk in chunks:
        yield from buffer.push(chunk)
    yield from buffer.flush()
