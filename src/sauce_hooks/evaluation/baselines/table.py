"""Every rival by name: what it is, where it is from, and what it needs to be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from sauce_hooks.evaluation.baselines.data import ForgetRetain
from sauce_hooks.evaluation.baselines.losses import OBJECTIVES
from sauce_hooks.evaluation.baselines.rows import (
    INSTRUCTION,
    ContrastSets,
    PromptOnly,
    projected,
    random_features,
    reconstruction_only,
)
from sauce_hooks.evaluation.baselines.training import Retrained, Settings
from sauce_hooks.evaluation.run import Method
from sauce_hooks.sae import VisionSAE


@dataclass(frozen=True)
class Materials:
    """What methods are made from. Only what the wanted ones need has to be there."""

    model: nn.Module
    processor: Any
    sae: VisionSAE | None = None
    """With a bank of the concepts and, for random features, `stats`."""
    sets: ContrastSets | None = None
    """Of a concept, images with and without it: for the dense projections."""
    data: Callable[[str], ForgetRetain] | None = None
    """Of a concept, what weight-updating methods are trained on."""
    settings: Mapping[str, Settings] = field(default_factory=dict[str, Settings])
    """Of each weight-updating method; the learning rate as `sweep` chose it."""
    cache: Path | None = None
    """A folder for trained weights."""
    instruction: str = INSTRUCTION
    """Of prompt only."""


@dataclass(frozen=True)
class Rival:
    """A method to compare with."""

    what: str
    source: str
    needs: tuple[str, ...]
    """Fields of `Materials`, beyond the model and its processor."""
    make: Callable[[Materials], Any] = field(repr=False)


def _retrained(name: str) -> Rival:
    def make(given: Materials) -> Method:
        assert given.data is not None
        return Retrained(given.model, given.processor, name, given.data, given.settings[name], given.cache)

    objective = OBJECTIVES[name]
    what = {
        "GA": "gradient ascent on the forget set",
        "GD": "gradient ascent on the forget set, descent on the retain set",
        "KL": "gradient ascent on the forget set, KL to the original model on the retain set",
        "PO": "refusals on the forget set, descent on the retain set",
        "NPO": "negative preference optimisation of the forget set, descent on the retain set",
    }[name]
    return Rival(what, objective.source, ("data", "settings"), make)


def _projected(what: str, source: str, kind: str) -> Rival:
    def make(given: Materials) -> Method:
        assert given.sae is not None and given.sets is not None
        return projected(given.model, given.sae, given.sets, processor=given.processor, kind=kind)

    return Rival(what, source, ("sae", "sets"), make)


METHODS: Mapping[str, Rival] = MappingProxyType(
    {
        **{name: _retrained(name) for name in OBJECTIVES},
        "prompt only": Rival(
            "an instruction not to mention the concept", "", (), lambda given: PromptOnly(given.processor, given.instruction)
        ),
        "difference of means": _projected(
            "the direction between the two sets' means projected out", "", "difference_of_means"
        ),
        "LEACE": _projected(
            "the smallest affine change that hides the concept from linear probes", "Belrose et al. 2023", "leace"
        ),
        "random features": Rival(
            "as many random live features, by the concept's γ",
            "",
            ("sae",),
            lambda given: random_features(given.model, _sae(given)),
        ),
        "reconstruction only": Rival(
            "γ = 1, the SAE's error dropped", "", ("sae",), lambda given: reconstruction_only(given.model, _sae(given))
        ),
    }
)
"""Every rival by name."""


def _sae(given: Materials) -> VisionSAE:
    assert given.sae is not None
    return given.sae


def make_methods(given: Materials, names: Sequence[str] | None = None) -> dict[str, Method]:
    """Methods for `evaluate(methods=...)`, by name.

    Args:
        given: what they are made from.
        names: which; None: all that `given` suffices for.

    Raises:
        ValueError: a name that is not in `METHODS`, or a method that lacks something; says what.
    """
    chosen = [name for name in METHODS if not _lacking(given, name)] if names is None else list(names)
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
        if lacking := _lacking(given, name):
            raise ValueError(f"{name} ({METHODS[name].what}) needs {' and '.join(lacking)}: give Materials(...) that too")
    return {name: METHODS[name].make(given) for name in chosen}


def _lacking(given: Materials, name: str) -> list[str]:
    return [
        f"settings[{name!r}]" if need == "settings" else need
        for need in METHODS[name].needs
        if (name not in given.settings if need == "settings" else getattr(given, need) is None)
    ]
