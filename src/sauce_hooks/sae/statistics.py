"""Feature statistics over rows (Section 4.2 of the paper), in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sauce_hooks.errors import ImagesError
from sauce_hooks.sae.vision_sae import FeatureStats

if TYPE_CHECKING:
    from sae_lens import SAE

CHUNK = 2**25
"""Entries of z that are made at a time, rows × features: 128 MiB in float32."""


@dataclass(frozen=True, eq=False)
class RowSums:
    """Sums over rows from which every statistic follows. Those of two sets of rows add up with `+`.

    A feature fires where z ≠ 0, as in the paper: z is not negative in most architectures, in abstopk it can be.
    """

    n: int
    """Rows."""
    fired_f: Int[Tensor, " d_sae"]
    """Rows on which each feature fires."""
    sum_f: Float[Tensor, " d_sae"]
    """Σ z."""
    largest_f: Float[Tensor, " d_sae"]
    """max |z|."""
    sum_d: Float[Tensor, " d_in"]
    """Σ x."""
    squares: Float[Tensor, ""]
    """Σ ‖x‖²."""
    error: Float[Tensor, ""]
    """Σ ‖x − x̂‖²."""

    @classmethod
    def of(cls, x_nd: Float[Tensor, "n d_in"], z_nf: Float[Tensor, "n d_sae"], x_hat_nd: Float[Tensor, "n d_in"]) -> RowSums:
        """The sums of a few rows, on their device; nothing is read back to the host."""
        return cls(
            n=len(x_nd),
            fired_f=z_nf.count_nonzero(0),
            sum_f=z_nf.sum(0, dtype=torch.float64),
            largest_f=torch.maximum(z_nf.amax(0), -z_nf.amin(0)),
            sum_d=x_nd.sum(0, dtype=torch.float64),
            squares=x_nd.double().pow(2).sum(),
            error=(x_nd.double() - x_hat_nd.double()).pow(2).sum(),
        )

    def __add__(self, other: RowSums) -> RowSums:
        return RowSums(
            self.n + other.n,
            self.fired_f + other.fired_f,
            self.sum_f + other.sum_f,
            torch.maximum(self.largest_f, other.largest_f),
            self.sum_d + other.sum_d,
            self.squares + other.squares,
            self.error + other.error,
        )

    def stats(self) -> FeatureStats:
        """FS, FMAV and the rest, in host memory."""
        variance = float(self.squares - self.sum_d.pow(2).sum() / self.n)
        # Of rows all alike, only the rounding of the two sums is left.
        varies = variance > 1e-12 * float(self.squares)
        return FeatureStats(
            frequency_f=(self.fired_f.double() / self.n).float().cpu(),
            mean_when_active_f=(self.sum_f / self.fired_f.clamp_min(1)).float().cpu(),
            explained_variance=1 - float(self.error) / variance if varies else float("nan"),
            l0=float(self.fired_f.sum()) / self.n,
            n_rows=self.n,
            largest_f=self.largest_f.float().cpu(),
        )


@torch.no_grad()
def feature_stats(sae: SAE[Any], rows: Iterable[Float[Tensor, "_ d_in"]]) -> FeatureStats:
    """FS (Eq. 7), FMAV (Eq. 8), explained variance, L0 and the largest activations of an SAE over a stream of rows.

    Exact for any number of rows, in float64, and however they are cut into chunks. A chunk is encoded a part at a time, so
    that z never has more than `CHUNK` entries.

    Raises:
        ImagesError: there is no row.
    """
    total: RowSums | None = None
    for chunk_nd in rows:
        for part_nd in chunk_nd.split(max(1, CHUNK // sae.cfg.d_sae)) if len(chunk_nd) else ():
            x_nd = part_nd.to(sae.device, sae.dtype)
            z_nf = sae.encode(x_nd)
            part = RowSums.of(x_nd, z_nf, sae.decode(z_nf))
            total = part if total is None else total + part
    if total is None:
        raise ImagesError("no rows to take statistics of: give at least one image")
    return total.stats()
