"""One training step over several processes. Each has its part of every batch; DistributedDataParallel joins gradients."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from sauce_hooks.activations import World
from sauce_hooks.errors import PresetError

if TYPE_CHECKING:
    from sae_lens import TrainingSAE


class _Forward(nn.Module):
    """The forward pass of a training SAE as that of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, sae: TrainingSAE[Any]) -> None:
        super().__init__()
        self.sae = sae
        self._forward_pass = sae.training_forward_pass

    def forward(self, step_input: Any) -> Any:
        return self._forward_pass(step_input)


@contextmanager
def joined(sae: TrainingSAE[Any], world: World) -> Generator[None]:
    """Within this, the SAE's gradients are those of all processes, and its weights start as the first's."""
    if world.size == 1:
        yield
        return
    from torch.nn.parallel import DistributedDataParallel

    from sauce_hooks.sae.batchtopk import FromFirstBatchTopKTrainingSAE

    alone = vars(sae).get("training_forward_pass")
    if isinstance(sae, FromFirstBatchTopKTrainingSAE):
        sae.choose_with(world)
    together = DistributedDataParallel(_Forward(sae))
    # A plain function on the instance: SAETrainer calls this name, and a module as an attribute would become a child.
    sae.training_forward_pass = lambda step_input: together(step_input)
    try:
        yield
    finally:
        if isinstance(sae, FromFirstBatchTopKTrainingSAE):
            sae.choose_with(World())
        del sae.training_forward_pass
        if alone is not None:  # a compiled one
            sae.training_forward_pass = alone


def check_divides(batch_size: int, world: World) -> int:
    """Rows of each process in a batch; `PresetError` if the processes cannot share it evenly."""
    if batch_size % world.size:
        raise PresetError(f"a batch of {batch_size} rows cannot be shared evenly by {world.size} processes")
    return batch_size // world.size
