"""SAE-Lens's BatchTopK classes with a threshold that is right from the first step on.

In training BatchTopK fires the k strongest features a row of a whole batch; afterwards it is a JumpReLU whose threshold is
the running mean of the least activation that fired. SAE-Lens starts that mean at zero with a rate of 0.01, so that it
reaches the right value only after some hundred steps, and until then far more than k features fire at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
from torch import Tensor


class FromFirstBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """The running mean corrected for its start, as Adam corrects its moments. Training itself never reads it."""

    n_threshold_updates: Int[Tensor, ""]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("n_threshold_updates", torch.zeros((), dtype=torch.long, device=self.W_dec.device))

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "*batch d_sae"]) -> None:
        """Take a batch's least activation into the mean; a batch on which nothing fires leaves it. Reads nothing back."""
        least = torch.where(acts_topk > 0, acts_topk, torch.inf).min().to(self.topk_threshold.dtype)
        fired = least.isfinite()
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
