"""Training recipes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from sauce_hooks.hookpoint import TokenPolicy

BiasInit = Literal["zero", "mean", "geometric_median"]


@dataclass(frozen=True)
class Preset:
    """Everything that decides an SAE besides the images."""

    architecture: str
    """A training architecture of SAE-Lens, or "sauce" (its standard one held to unit-norm decoder rows)."""
    expansion: int
    """d_sae / d_in."""
    tokens: TokenPolicy
    options: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """Further fields of the SAE-Lens training config."""
    lr: float = 4e-4
    lr_warm_up_steps: int = 0
    lr_decay_share: float = 0.0
    """Share of the steps, at the end, over which the rate falls linearly to nothing."""
    batch_size: int = 1024
    """Rows an optimiser step."""
    epochs: int = 2
    b_dec_init: BiasInit = "geometric_median"
    normalize: bool = False
    """Train on rows scaled to a mean norm of √d_in, and fold the factor into the weights afterwards, so that one learning
    rate suits every tower."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # Section 4.1 of the paper, to the letter: Eq. 1-3, n = 64, α = 8e-5, lr = 4e-4, batch 1024, 2 epochs, one token an
        # image. "Last" is read as the last of CLIP's sequence, a patch; the edit goes to all tokens LLaVA reads.
        "sauce": Preset(
            architecture="sauce",
            expansion=64,
            tokens=TokenPolicy(read="last", edit="patches"),
            options={"l1_coefficient": 8e-5},
        ),
        # BatchTopK (arXiv 2412.06410) on every patch, saved as JumpReLU: an exact mean L0, no shrinkage, few dead features.
        "batchtopk": Preset(
            architecture="batchtopk",
            expansion=16,
            tokens=TokenPolicy(read="patches", edit="patches"),
            options={"k": 16},
            lr=1e-3,
            lr_warm_up_steps=200,
            lr_decay_share=0.3,
            batch_size=2048,
            epochs=2,
            normalize=True,
        ),
    }
)
