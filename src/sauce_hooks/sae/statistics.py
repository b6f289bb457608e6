"""Feature statistics over rows (Section 4.2 of the paper), in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.sae.vision_sae import FeatureStats

if TYPE_CHECKING:
    from sae_lens import SAE


@torch.no_grad()
def feature_stats(sae: SAE[Any], rows: Iterable[Float[Tensor, "_ d_in"]]) -> FeatureStats:
    """FS (Eq. 7), FMAV (Eq. 8), explained variance and L0 of an SAE over a stream of rows."""
    n = 0
    fired_f = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    sum_f = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    total_d = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    squares = error = 0.0
    for x_nd in rows:
        x_nd = x_nd.to(sae.device, sae.dtype)
        z_nf = sae.encode(x_nd)
        error += float((x_nd - sae.decode(z_nf)).double().pow(2).sum())
        squares += float(x_nd.double().pow(2).sum())
        total_d += x_nd.double().sum(0).cpu()
        fired_f += (z_nf > 0).double().sum(0).cpu()
        sum_f += z_nf.double().sum(0).cpu()
        n += len(x_nd)
    variance = squares - float(total_d.pow(2).sum()) / n
    return FeatureStats(
        frequency_f=(fired_f / n).float(),
        mean_when_active_f=(sum_f / fired_f.clamp_min(1)).float(),
        explained_variance=1 - error / variance,
        l0=float(fired_f.sum() / n),
        n_rows=n,
    )
