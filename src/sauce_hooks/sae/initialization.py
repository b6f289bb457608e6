"""Where the decoder bias b_pre starts: zero, the mean, or (the paper's choice) the geometric median."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sauce_hooks.sae.presets import BiasInit


def geometric_median(x_nd: Float[Tensor, "n d"], *, iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to all rows, by Weiszfeld's iteration.

    Stops when the point moves by less than `tolerance` of the data's scale.
    """
    x_nd = x_nd.double()
    point = x_nd.mean(0)
    scale = (x_nd - point).norm(dim=1).mean().clamp_min(1e-12)
    for _ in range(iterations):
        weights = 1 / (x_nd - point).norm(dim=1).clamp_min(1e-12 * scale)
        moved = (weights[:, None] * x_nd).sum(0) / weights.sum()
        if (moved - point).norm() < tolerance * scale:
            return moved.float()
        point = moved
    return point.float()


def center(x_nd: Float[Tensor, "n d"], how: BiasInit) -> Float[Tensor, " d"]:
    """The starting value of the decoder bias for these rows."""
    if how == "zero":
        return x_nd.new_zeros(x_nd.shape[1])
    return x_nd.mean(0) if how == "mean" else geometric_median(x_nd)
