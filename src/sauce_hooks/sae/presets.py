"""Training recipes, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal

from sauce_hooks.errors import PresetError
from sauce_hooks.hookpoint import TokenPolicy

BiasInit = Literal["zero", "mean", "geometric_median"]

RESAMPLED = ("sauce", "standard", "gated", "matching_pursuit")
"""Architectures whose loss never reaches a dead feature, so that only resampling brings one back."""

_JUMPRELU = {
    "jumprelu_sparsity_loss_mode": "quadratic",
    "target_l0": 16.0,
    "l0_coefficient": 0.1,
    "jumprelu_bandwidth": 1.0,
    "jumprelu_ste_to_input": True,
    "jumprelu_init_threshold": 0.1,
    "pre_act_loss_coefficient": 3e-6,
}


@dataclass(frozen=True)
class Preset:
    """Everything that decides an SAE besides the images. A value that can't be raises `PresetError`."""

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
    resample_every: int = 0
    """Optimiser steps between restarts of dead features (Bricken et al. 2023); 0: never. For architectures whose loss has
    no remedy of its own: `RESAMPLED`."""
    dead_after: int = 1000
    """Optimiser steps without firing after which a feature is dead: for resampling and SAE-Lens's auxiliary losses."""

    def __post_init__(self) -> None:
        for name, (right, wanted) in _RULES.items():
            value = getattr(self, name)
            if not right(value):
                raise PresetError(f"{name}={value!r} can't be: it must be {wanted}")
        if self.resample_every and self.architecture not in RESAMPLED:
            raise PresetError(
                f"resample_every={self.resample_every} is not for {self.architecture!r}, whose own loss reaches dead "
                f"features (see its options), but for {', '.join(RESAMPLED)}: leave it at 0"
            )


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least, f"a whole number of at least {least}"


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "expansion": _whole(1),
    "batch_size": _whole(1),
    "epochs": _whole(1),
    "lr": (lambda v: isinstance(v, int | float) and isfinite(v) and v > 0, "a positive number"),
    "lr_warm_up_steps": _whole(0),
    "lr_decay_share": (lambda v: isinstance(v, int | float) and 0 <= v <= 1, "a share, from 0 to 1"),
    "b_dec_init": (lambda v: v in ("zero", "mean", "geometric_median"), "'zero', 'mean' or 'geometric_median'"),
    "resample_every": _whole(0),
    "dead_after": _whole(1),
}
"""What each field must be."""

_MODERN = Preset(
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
)

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
        "batchtopk": _MODERN,
        # The rest differ from it in the architecture alone, and aim at its L0 where their options can, to be compared.
        # Matryoshka (arXiv 2503.17547): five nested dictionaries, so that broad features come first.
        "matryoshka": replace(_MODERN, architecture="matryoshka_batchtopk"),
        # TopK (arXiv 2406.04093): exactly k a token.
        "topk": replace(_MODERN, architecture="topk"),
        # JumpReLU (arXiv 2407.14435) with Gemma Scope 2's penalty around a target L0, and for dead features Anthropic's
        # pre-activation loss (Transformer Circuits, January 2025).
        "jumprelu": replace(_MODERN, architecture="jumprelu", options=_JUMPRELU),
        # Gated (arXiv 2404.16014), with Anthropic's weight of the penalty for rows of norm √d (Transformer Circuits, April
        # 2024).
        "gated": replace(_MODERN, architecture="gated", options={"l1_coefficient": 5.0}),
        # Matching pursuit (arXiv 2506.03093): k features chosen one after the other, at k times the encoder's cost.
        "matching_pursuit": replace(_MODERN, architecture="matching_pursuit", options={"max_iterations": 16}),
    }
)
"""By name: the paper's settings ("sauce", Section 4.1), a better modern recipe ("batchtopk"), and others to compare with."""
