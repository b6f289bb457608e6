"""The rows of one epoch after another, from the tower or from what the first one kept; can go on at any chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sauce_hooks.activations.cache import ActivationCache, Chunk
from sauce_hooks.activations.loader import ImageBatch, ImageLoader
from sauce_hooks.activations.read import read_batch
from sauce_hooks.activations.world import World
from sauce_hooks.hookpoint import HookPoint, TokenPolicy, draw, unwrap

_FLUSH_ROWS = 262_144
"""Rows after which those kept so far are made safe."""


class MemoryStore:
    """Chunks in memory, for data that fits there. A training that is gone on with has to read them again."""

    def __init__(self) -> None:
        self.complete = False
        self.filling_state: dict[str, Any] | None = None
        self._chunks: list[Chunk] = []

    @property
    def n_chunks(self) -> int:
        """How many it holds."""
        return len(self._chunks)

    def append(self, chunk: Chunk) -> None:
        """Keep a chunk."""
        self._chunks.append(chunk)

    def flush(self, state: dict[str, Any] | None = None) -> None:
        """Remember where the reading of images stands, for a second pass in the same process to go on from."""
        self.filling_state = state

    def finish(self) -> None:
        """The pass over the images is over."""
        self.complete = True

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """In the order they came."""
        yield from self._chunks[start:]

    def shuffled(self, order_seed: int, start: int = 0) -> Iterator[Chunk]:
        """In an order that the seed decides."""
        order = torch.randperm(self.n_chunks, generator=torch.Generator().manual_seed(order_seed)).tolist()
        for number in order[start:]:
            yield self._chunks[number]


class SharedStore:
    """A cache that only the first of several processes has, and whose chunks all of them get."""

    def __init__(self, store: ActivationCache | None, world: World, *, d_in: int, device: torch.device) -> None:
        """The first process's cache; None in the others. What is asked of it must be asked by all."""
        self._store, self._world, self._d_in, self._device = store, world, d_in, device

    @property
    def order(self) -> dict[str, Any]:
        """As the first process has it."""
        return self._world.objects(self._store and self._store.order)[0]

    @property
    def complete(self) -> bool:
        """As the first process has it."""
        return self._world.objects(self._store and self._store.complete)[0]

    @property
    def n_chunks(self) -> int:
        """As the first process has it."""
        return self._world.objects(self._store and self._store.n_chunks)[0]

    @property
    def filling_state(self) -> dict[str, Any] | None:
        """As the first process has it."""
        return self._world.objects(self._store and self._store.filling_state)[0]

    def append(self, chunk: Chunk) -> None:
        """Keep a chunk."""
        if self._store is not None:
            self._store.append(chunk)

    def flush(self, state: dict[str, Any] | None = None) -> None:
        """Make what was appended safe, with the place where all processes stand."""
        if self._store is not None:
            self._store.flush(state)

    def finish(self) -> None:
        """The pass over the images is over."""
        if self._store is not None:
            self._store.finish()

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """In the order they came."""
        return self._everywhere(self._store and self._store.chunks(start))

    def shuffled(self, order_seed: int, start: int = 0) -> Iterator[Chunk]:
        """In an order that the seed decides."""
        return self._everywhere(self._store and self._store.shuffled(order_seed, start))

    def _everywhere(self, chunks: Iterator[Chunk] | None) -> Iterator[Chunk]:
        while True:
            try:
                mine = next(chunks, None) if chunks is not None else None
            except Exception as problem:  # a damaged file: for all processes to know
                mine = problem
            found = self._world.chunks(mine, d=self._d_in, dtype=torch.bfloat16, device=self._device)
            if found is None:
                return
            yield from found


Store = ActivationCache | MemoryStore | SharedStore
"""What keeps the rows of the first epoch."""


class RowStream:
    """Rows of the images at a hook point, epoch after epoch, a batch of images a chunk.

    Without a store every epoch runs the tower. With one the first epoch fills it, as far as it is not filled, and later ones
    are served from it in another order each.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: ImageLoader,
        hook_point: HookPoint,
        tokens: TokenPolicy,
        *,
        seed: int = 0,
        store: Store | None = None,
        world: World | None = None,
    ) -> None:
        """A stream that stands at its start.

        Args:
            model: the vision-language model; left as it was after every batch.
            loader: the images, as model inputs.
            hook_point: where.
            tokens: which of each image's tokens.
            seed: decides the order of what is stored, and the tokens drawn where `tokens.per_image` says so.
            store: what keeps the first epoch's rows.
            world: the processes that read together, each a part of the images.
        """
        self.loader, self.store, self.world = loader, store, world or World()
        self._root, self._hook_point, self._tokens, self._seed = unwrap(model), hook_point, tokens, seed
        self._first = next(p for p in hook_point.tower_module(self._root).parameters() if p.is_floating_point())
        self._position: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None
        self.n_images = 0
        """Images that went through the tower so far, in all processes."""

    def epoch(self, number: int, start: int = 0, position: dict[str, Any] | None = None) -> Iterator[Chunk]:
        """The chunks of an epoch, from chunk number `start` on.

        Args:
            number: 0 is the first.
            start: chunks of this epoch that are to be left out.
            position: what `position()` gave after the last of those; without a store only.
        """
        if self.store is None:
            yield from self._read(number, position)
            return
        if number == 0:
            yield from self.store.chunks(start)
        if not self.store.complete:
            for done, chunk in enumerate(self._fill(), start=self.store.n_chunks):
                if number == 0 and done >= start:
                    yield chunk
        if number > 0:
            yield from self.store.shuffled(_mixed(self._seed, number), start)

    def position(self) -> dict[str, Any] | None:
        """Where the reading of images stands, for `epoch` to go on from; what the store holds so far is made safe."""
        if self._position is None:
            return None
        if self._position["loaders"] is None:
            self._position["loaders"] = self.world.objects(self._before or self.loader.state_dict())
        if self.store is not None:
            self.store.flush(self._position)
        return self._position

    def _fill(self) -> Iterator[Chunk]:
        assert self.store is not None
        unsafe = 0
        for chunk in self._read(0, self.store.filling_state):
            if not isinstance(self.store, MemoryStore):  # as the cache keeps it, so that it is no matter where it was read
                chunk = replace(chunk, rows_nd=chunk.rows_nd.to(torch.bfloat16))
            self.store.append(chunk)
            unsafe += len(chunk.rows_nd)
            if unsafe >= _FLUSH_ROWS:  # also where no checkpoint asks for it
                self.position()
                unsafe = 0
            yield chunk
        self.store.finish()

    def _read(self, epoch: int, position: dict[str, Any] | None) -> Iterator[Chunk]:
        """Round after round: every process reads a batch of images, and all get the rows of all, one chunk a batch."""
        turn, given = (position["round"], position["given"]) if position is not None else (0, 0)
        if position is not None:
            self.loader.load_state_dict(position["loaders"][self.world.rank])
        with closing(self.loader.epoch(epoch)) as batches:  # nnsight's cycles would keep them, and their workers, alive
            yield from self._rounds(batches, epoch, turn, given)

    def _rounds(self, batches: Iterator[ImageBatch], epoch: int, turn: int, given: int) -> Iterator[Chunk]:
        while True:
            before = self.loader.state_dict() if self.world.size > 1 else None
            try:
                batch = next(batches, None)
                mine = None if batch is None else self._rows(batch, epoch, turn)
            except Exception as problem:  # for all processes to know, which would wait for this one
                mine = problem
            chunks = self.world.chunks(mine, d=self._hook_point.d_in, dtype=self._first.dtype, device=self._first.device)
            if chunks is None:
                self._position = None
                return
            for number, chunk in enumerate(chunks):
                if number < given or not len(chunk.rows_nd):  # a process had no images left, or all were broken
                    continue
                last = number + 1 == len(chunks)
                self._position = {
                    "round": turn + last,
                    "given": 0 if last else number + 1,
                    "loaders": None,  # asked for when somebody wants the position
                }
                self._before = None if last else before  # after a round, wherever the loader then stands
                self.n_images += int(chunk.images_n.unique().numel())
                yield chunk
            turn, given = turn + 1, 0

    def _rows(self, batch: ImageBatch, epoch: int, turn: int) -> Chunk:
        if batch.inputs is None:
            return Chunk(self._first.new_empty(0, self._hook_point.d_in), torch.empty(0, dtype=torch.long))
        acts_btd = read_batch(self._root, batch.inputs, self._hook_point, tokens=self._tokens.read)
        if self._tokens.per_image is not None:
            number = turn * self.world.size + self.world.rank
            generator = torch.Generator().manual_seed(_mixed(self._seed, epoch, number))
            acts_btd = draw(acts_btd, self._tokens.per_image, generator)
        return Chunk(rearrange(acts_btd, "b t d -> (b t) d"), _of_images(batch.indices, acts_btd))


def _of_images(indices_n: Tensor, acts_btd: Tensor) -> Tensor:
    """The image of each row; packed images that were given as one batch count as its first."""
    if len(indices_n) != len(acts_btd):
        indices_n = indices_n[:1]
    return indices_n.repeat_interleave(acts_btd.shape[1])


def _mixed(*numbers: int) -> int:
    """One seed from several numbers, far from that of their neighbours."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 0x1234567) % 2**63
    return mixed
