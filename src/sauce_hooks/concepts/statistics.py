"""What a contrast set says of every feature: sums that add up, so any number of images fits in O(d_sae) memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.errors import ContrastError

Pool = Literal["mean", "max"]


@dataclass(frozen=True, eq=False)
class SetStatistics:
    """Sums over the images of one set. Two parts of a set add up with `+`."""

    n: int
    """Images."""
    sum_f: Float[Tensor, " d_sae"]
    """Sum over images of each feature's pooled activation."""
    fired_f: Float[Tensor, " d_sae"]
    """Number of images on which each feature fires at all."""

    def __add__(self, other: SetStatistics) -> SetStatistics:
        return SetStatistics(self.n + other.n, self.sum_f + other.sum_f, self.fired_f + other.fired_f)

    @property
    def mean_f(self) -> Float[Tensor, " d_sae"]:
        """μ(i, D): the mean activation of each feature over the set (Section 3.2)."""
        return self.sum_f / self.n

    @classmethod
    def of(cls, z_btf: Float[Tensor, "batch tokens d_sae"], pool: Pool) -> SetStatistics:
        """The sums of one batch of images; an image's z is the mean or the maximum over its tokens."""
        z_bf = (z_btf.mean(1) if pool == "mean" else z_btf.amax(1)).double()
        return cls(len(z_bf), z_bf.sum(0), (z_bf > 0).double().sum(0))


def accumulate(batches: Iterable[Float[Tensor, "_ tokens d_sae"]], pool: Pool) -> SetStatistics:
    """The sums of a stream of batches; `ContrastError` if it is empty."""
    total: SetStatistics | None = None
    for z_btf in batches:
        part = SetStatistics.of(z_btf, pool)
        total = part if total is None else total + part
    if total is None:
        raise ContrastError("a contrast set is empty: give at least one image that shows the concept and one that does not")
    return total


def sauce_score(positives: SetStatistics, negatives: SetStatistics, delta: float = 1e-8) -> Float[Tensor, " d_sae"]:
    """S(i, c, D) = μ(i, D_c) / (Σ_j μ(j, D_c) + δ) − μ(i, D_nc) / (Σ_j μ(j, D_nc) + δ). Eq. 4 of the paper."""
    mu_c, mu_nc = positives.mean_f, negatives.mean_f
    return torch.as_tensor(mu_c / (mu_c.sum() + delta) - mu_nc / (mu_nc.sum() + delta))
