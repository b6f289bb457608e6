"""The processes that train together. Every one gets the rows of all, in the order in which one process would read them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.activations.cache import Chunk
from sauce_hooks.errors import SauceHooksError

_ENDED, _FAILED = -1, -2
"""What a process says in the place of its number of rows."""


@dataclass(frozen=True)
class World:
    """This process and how many there are."""

    rank: int = 0
    size: int = 1
    talk: Any = field(default=None, repr=False, compare=False)
    """The process group for what is on the host: numbers and messages. None: the default one.

    On GPUs the default group would take them over the device, and the host would wait there for the tower."""

    @classmethod
    def current(cls) -> World:
        """As `accelerate launch` or `torchrun` started it; one process if nobody did.

        Joins the process group if that is still to be done. All processes must ask together, the first time.
        """
        if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1):
            return cls()
        if not dist.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        return cls(dist.get_rank(), dist.get_world_size(), _talk(dist.group.WORLD))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, batch_bd: Float[Tensor, "b d"]) -> Float[Tensor, "_ d"]:
        """This process's part of a batch that all of them hold."""
        return batch_bd if self.size == 1 else batch_bd.chunk(self.size)[self.rank]

    def chunks(
        self, mine: Chunk | Exception | None, *, d: int, dtype: torch.dtype, device: torch.device
    ) -> list[Chunk] | None:
        """What every process has read in this round, by rank, for all of them; None once all have come to their end.

        Args:
            mine: what this process has read; None if it has come to its end; what went wrong, if it has failed.
            d: the width of a row.
            dtype: the rows' dtype.
            device: where rows are.

        Raises:
            Exception: `mine`.
            SauceHooksError: another process has failed; says which and why. So none waits for ever.
        """
        if self.size == 1:
            if isinstance(mine, Exception):
                raise mine
            return None if mine is None else [mine]
        n = _ENDED if mine is None else _FAILED if isinstance(mine, Exception) else len(mine.rows_nd)
        counts: list[int] = _gather(torch.tensor([n]), self.size, self.talk).flatten().tolist()
        if _FAILED in counts:
            self.agree(mine if isinstance(mine, Exception) else None)
        most = max(counts)
        if most == _ENDED:
            return None
        rows, images = torch.zeros(most, d, dtype=dtype, device=device), torch.zeros(most, dtype=torch.long)
        if isinstance(mine, Chunk):
            rows[:n], images[:n] = mine.rows_nd, mine.images_n
        all_rows, all_images = _gather(rows, self.size), _gather(images, self.size, self.talk)
        return [Chunk(all_rows[r, :count], all_images[r, :count]) for r, count in enumerate(counts) if count >= 0]

    def agree(self, problem: Exception | None = None) -> None:
        """Go on together, or not at all.

        Args:
            problem: what went wrong in this process.

        Raises:
            Exception: `problem`.
            SauceHooksError: something went wrong in another process.
        """
        problems = self.objects(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        for rank, other in enumerate(problems):
            if other is not None:
                raise SauceHooksError(f"process {rank} has failed, so that this one ends too: {other}")

    def objects(self, mine: Any) -> list[Any]:
        """An object of every process, by rank."""
        if self.size == 1:
            return [mine]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.talk)
        return everyones

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """A tensor of any shape, in place, as its "sum", "min" or "max" over the processes."""
        if self.size > 1:
            dist.all_reduce(value, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
        return value

    def gather(self, value: Tensor) -> Tensor:
        """A tensor of every process, all of one shape, stacked by rank."""
        return value[None] if self.size == 1 else _gather(value, self.size)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.talk)


@cache  # one for as long as the default group lives: each holds connections
def _talk(default: Any) -> Any:
    return None if dist.get_backend(default) == "gloo" else dist.new_group(backend="gloo")


def _gather(value: Tensor, size: int, group: Any = None) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(size)]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.stack(parts)
