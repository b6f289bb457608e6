"""SAE-Lens's BatchTopK classes with a threshold that is right from the first step on, over any number of processes.

In training BatchTopK fires the k strongest features a row of a whole batch; afterwards it is a JumpReLU whose threshold is
the running mean of the least activation that fired. SAE-Lens starts that mean at zero with a rate of 0.01, so that it
reaches the right value only after some hundred steps, and until then far more than k features fire at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
from torch import Tensor, nn

from sauce_hooks.activations import World


class BatchTopKOfAll(nn.Module):
    """SAE-Lens's `BatchTopK` over a batch of which this process has a part as large as every other's."""

    def __init__(self, k: float, world: World) -> None:
        super().__init__()
        self.k, self.world = k, world

    def forward(self, x: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The activations that are among the k strongest a row, of the rows of all processes; the others are zero."""
        flat = x.relu().flatten()
        n = int(self.k * x.shape[:-1].numel() * self.world.size)
        mine = flat.topk(min(n, len(flat)))  # no more can be chosen from here, in falling order
        everyones = self.world.gather(mine.values.detach())
        owners = everyones.flatten().topk(n).indices // everyones.shape[1]
        is_chosen = torch.arange(len(mine.values), device=x.device) < (owners == self.world.rank).sum()
        return torch.zeros_like(flat).scatter(-1, mine.indices, mine.values * is_chosen).reshape(x.shape)


class FromFirstBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """The running mean corrected for its start, as Adam corrects its moments. Training itself never reads it."""

    n_threshold_updates: Int[Tensor, ""]
    world = World()
    """The processes that share a batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("n_threshold_updates", torch.zeros((), dtype=torch.long, device=self.W_dec.device))

    def choose_with(self, world: World) -> None:
        """Have features compete over the batch of all these processes."""
        self.world = world
        self.activation_fn = self.get_activation_fn() if world.size == 1 else BatchTopKOfAll(self.cfg.k, world)

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "*batch d_sae"]) -> None:
        """Take a batch's least activation into the mean; a batch on which nothing fires leaves it. Reads nothing back."""
        least = torch.where(acts_topk > 0, acts_topk, torch.inf).min().to(self.topk_threshold.dtype)
        fired = self.world.reduce(least, "min").isfinite()
        self.n_threshold_updates += fired
        rate = self.cfg.topk_threshold_lr
        share = rate / (1 - (1 - rate) ** self.n_threshold_updates.clamp_min(1).to(self.topk_threshold.dtype))
        self.topk_threshold = torch.where(fired, torch.lerp(self.topk_threshold, least, share), self.topk_threshold)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """SAE-Lens's, which knows nothing of the count."""
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["n_threshold_updates"]


class FromFirstMatryoshkaTrainingSAE(FromFirstBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """The same for the nested form."""
