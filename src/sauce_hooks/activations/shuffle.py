"""Shuffling rows that come image by image into batches that mix many images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor


def shuffled_batches(
    chunks: Iterable[Float[Tensor, "_ d"]], *, batch_size: int, capacity: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "_ d"]]:
    """Batches of rows in random order from a stream of chunks, holding at most `capacity` rows and one chunk.

    The buffer is filled, then each incoming row takes the place of a random one, which goes out (a reservoir that
    never leaves a row behind: what remains at the end is shuffled and given out too). The last batch may be short.
    """
    pool: Tensor | None = None
    filled = 0
    out: list[Tensor] = []
    waiting = 0
    for chunk in chunks:
        rows = chunk
        if pool is None:
            pool = rows.new_empty(capacity, rows.shape[1])
        room = min(capacity - filled, len(rows))
        pool[filled : filled + room] = rows[:room]
        filled += room
        rows = rows[room:]
        for part in rows.split(capacity):
            places = torch.randperm(capacity, generator=generator)[: len(part)].to(pool.device)
            out.append(pool[places])  # indexing copies, so the rows survive being replaced
            pool[places] = part
            waiting += len(part)
        if waiting >= batch_size:
            *batches, last = torch.cat(out).split(batch_size)
            if len(last) == batch_size:
                batches, last = [*batches, last], last[:0]
            yield from batches
            out, waiting = [last], len(last)
    if pool is not None:
        order = torch.randperm(filled, generator=generator).to(pool.device)
        yield from torch.cat([*out, pool[order]]).split(batch_size)
