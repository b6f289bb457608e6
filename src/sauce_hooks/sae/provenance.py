"""Where a concept is from: the SAE, its tower, the images, the day, this library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sauce_hooks.bank import SAERecord
from sauce_hooks.bank.format import library_version
from sauce_hooks.hookpoint import HookPoint, TowerRecord

if TYPE_CHECKING:
    from sae_lens import SAE

    from sauce_hooks.sae.vision_sae import VisionSAE

N_FEATURES = 32
"""Features whose directions a record looks at."""


def provenance_of(sae: VisionSAE) -> dict[str, Any]:
    """What is known of where a concept found in this SAE comes from, to go into `Concept.provenance`; all JSON.

    Returns:
        `sae` and `tower`: digests of their records; `hook_point`: its path; `date`: now, in UTC; `library`: its version.
        `tower` is left out if nobody recorded it. The digests tell equal from unequal for people. Whether a bank belongs
        to an SAE is decided by `SAERecord.difference`, which knows an SAE again in another precision.
    """
    record = sae.record()
    facts = {
        "sae": _short(asdict(record)),
        "tower": record.tower,
        "hook_point": record.hook_point,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "library": f"sauce_hooks {library_version()}",
    }
    return {name: value for name, value in facts.items() if value is not None}


def digest(*counts: Shaped[Tensor, "..."] | int) -> str:
    """A digest of whole numbers that images were counted into, such as `SetStatistics.histogram_bf` and `.n`.

    It stands for the images without keeping any. It does not depend on their order, on batches, or on how a set was split,
    since counts add up exactly. What it depends on are the SAE and, where an activation lies on the border of two bins, the
    precision and the device.

    Raises:
        ValueError: a tensor holds other numbers than whole ones.
    """
    hashed = hashlib.sha256()
    for count in counts:
        tensor = torch.as_tensor(count).detach().cpu()
        whole = tensor.to(torch.int64)
        if not bool((whole == tensor).all()):
            raise ValueError(f"counts must be whole numbers; got {tensor.dtype} with fractions")
        hashed.update(json.dumps(list(whole.shape)).encode() + whole.contiguous().numpy().astype("<i8").tobytes())
    return hashed.hexdigest()[:16]


def record_sae(sae: SAE[Any], hook_point: HookPoint, tower: TowerRecord | None) -> SAERecord:
    """Remember an SAE by a few of its directions. Costs less than a millisecond; changes nothing.

    Directions are taken at unit length, for what SAE-Lens folds into the encoder changes lengths alone.
    """
    values = _sampled(sae.W_dec)
    encoder_df = getattr(sae, "W_enc", None)
    if isinstance(encoder_df, Tensor):
        values += _sampled(encoder_df.T)
    return SAERecord(
        architecture=str(sae.cfg.architecture()),
        hook_point=hook_point.path,
        tower=None if tower is None else _short(tower.to_dict()),
        d_in=int(sae.cfg.d_in),
        d_sae=int(sae.cfg.d_sae),
        values=values,
    )


@torch.no_grad()
def _sampled(rows_fd: Float[Tensor, "d_sae d_in"]) -> tuple[float, ...]:
    """One coordinate of each of some rows, spread over both; none of what is not here (a weight on the meta device)."""
    if rows_fd.device.type == "meta":
        return ()
    n, d = rows_fd.shape
    i_s = torch.arange(min(n, N_FEATURES))
    rows_sd = rows_fd.detach()[(i_s * n // len(i_s)).to(rows_fd.device)].float().cpu()
    norms_s = rows_sd.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    values_s = rows_sd[i_s, i_s * d // len(i_s)] / norms_s
    return tuple(float(f"{value:.5g}") for value in values_s.tolist())


def _short(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
