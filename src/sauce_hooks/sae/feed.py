"""The batches of a training, over all its epochs, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.activations import RowStream, ShuffleBuffer


class Feed:
    """Rows of every epoch, mixed in one buffer, in full batches; a rest smaller than a batch is left out at the end."""

    def __init__(self, stream: RowStream, buffer: ShuffleBuffer, epochs: int, device: torch.device) -> None:
        """Rows are mixed on `device`, wherever the stream has them: a cache gives them in host memory."""
        self._stream, self._buffer, self._epochs, self._device = stream, buffer, epochs, device
        self._epoch = self._chunk = 0
        self._position: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        for batch in self._all():
            if len(batch) == self._buffer.batch_size:
                yield batch

    def _all(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        yield from self._buffer.pending()
        while self._epoch < self._epochs:
            for chunk in self._stream.epoch(self._epoch, self._chunk, self._position):
                self._chunk += 1
                yield from self._buffer.push(chunk.rows_nd.to(self._device).float())
            self._epoch, self._chunk, self._position = self._epoch + 1, 0, None
        yield from self._buffer.flush()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next, between two batches."""
        position = self._stream.position() or self._position  # that of the state it went on from, until a chunk is read
        stored = self._stream.store is not None
        return {
            "epoch": self._epoch,
            "chunk": self._chunk,
            "position": None if stored else position,
            "buffer": self._buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._chunk, self._position = state["epoch"], state["chunk"], state["position"]
        buffer = dict(state["buffer"])
        for name in ("pool", "batch", "coming"):
            buffer[name] = None if buffer[name] is None else buffer[name].to(self._device)
        self._buffer.load_state_dict(buffer)
