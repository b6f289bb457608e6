"""Where the decoder bias b_pre starts: zero, the mean, or (the paper's choice) the geometric median."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.sae.presets import BiasInit


def geometric_median(x_nd: Float[Tensor, "n d"], *, iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to all rows: Weiszfeld's iteration as Vardi and Zhang (2000) mended it.

    The plain iteration stays for ever on a row it meets; the mended one leaves it unless it is the median. Stops when the
    point moves by less than `tolerance` of the data's scale.
    """
    x_nd = x_nd.double()
    point = x_nd.mean(0)
    scale = (x_nd - point).norm(dim=1).mean().clamp_min(1e-12)
    for _ in range(iterations):
        distance = (x_nd - point).norm(dim=1)
        met = distance < 1e-9 * scale
        weights = torch.where(met, 0, 1 / distance.clamp_min(1e-9 * scale))
        if met.all():
            break
        target = (weights[:, None] * x_nd).sum(0) / weights.sum()
        pull = ((x_nd - point) * weights[:, None]).sum(0).norm()
        stay = (met.sum() / pull.clamp_min(1e-300)).clamp(max=1)
        moved = (1 - stay) * target + stay * point
        if (moved - point).norm() < tolerance * scale:
            return moved.float()
        point = moved
    return point.float()


def center(x_nd: Float[Tensor, "n d"], how: BiasInit) -> Float[Tensor, " d"]:
    """The starting value of the decoder bias for these rows."""
    if how == "zero":
        return x_nd.new_zeros(x_nd.shape[1])
    return x_nd.mean(0) if how == "mean" else geometric_median(x_nd)
