"""The processes that train together. Every one gets the rows of all, in the order in which one process would read them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.activations.cache import Chunk


@dataclass(frozen=True)
class World:
    """This process and how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """As `accelerate launch` or `torchrun` started it; one process if nobody did.

        Joins the process group if that is still to be done.
        """
        if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1):
            return cls()
        if not dist.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, batch_bd: Float[Tensor, "b d"]) -> Float[Tensor, "_ d"]:
        """This process's part of a batch that all of them hold."""
        return batch_bd if self.size == 1 else batch_bd.chunk(self.size)[self.rank]

    def chunks(self, mine: Chunk | None, *, d: int, dtype: torch.dtype, device: torch.device) -> list[Chunk] | None:
        """What every process has read in this round, by rank, for all of them; None once all have come to their end.

        Args:
            mine: what this process has read; None if it has come to its end.
            d: the width of a row.
            dtype: the rows' dtype.
            device: where rows are.
        """
        if self.size == 1:
            return None if mine is None else [mine]
        n = -1 if mine is None else len(mine.rows_nd)
        counts = _gather(torch.tensor([n], device=device), self.size).flatten().tolist()
        most = max(counts)
        if most < 0:
            return None
        rows, images = torch.zeros(most, d, dtype=dtype, device=device), torch.zeros(most, dtype=torch.long, device=device)
        if mine is not None:
            rows[:n], images[:n] = mine.rows_nd, mine.images_n.to(device)
        all_rows, all_images = _gather(rows, self.size), _gather(images, self.size).cpu()
        return [Chunk(all_rows[r, :count], all_images[r, :count]) for r, count in enumerate(counts) if count >= 0]

    def objects(self, mine: Any) -> list[Any]:
        """An object of every process, by rank."""
        if self.size == 1:
            return [mine]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine)
        return everyones

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """A tensor, in place, as its "sum", "min" or "max" over the processes."""
        if self.size > 1:
            dist.all_reduce(value, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def _gather(value: Tensor, size: int) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(size)]
    dist.all_gather(parts, value.contiguous())
    return torch.stack(parts)
