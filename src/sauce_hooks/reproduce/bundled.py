"""The bundled world as a study: four concepts of each domain, every rival, two relatives of the bundled model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sauce_hooks.evaluation import Method, ProbeSet
from sauce_hooks.evaluation.baselines import make_methods
from sauce_hooks.evaluation.erasing import Erasing
from sauce_hooks.reproduce.study import OURS, Relative, Size, Study
from sauce_hooks.scenes.attack import Training, attacks, tested
from sauce_hooks.scenes.bundled import load, load_relative
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.rivals import CHOSEN, materials

CONCRETE = ("tiger", "cat", "car", "clock", "fish", "tree", "soccer", "tennis", "baseball", "golf")
ABSTRACT = ("red", "green", "blue", "pink", "happy", "sad", "bored", "wood", "metal", "fabric")
"""Fourteen others are never erased: of each domain some, so that what merging costs can be asked of them."""
SIZE = Size(n=12, retained=2, merged=(1, 5, 10, 20), attacked=5, attack_n=10, perturbed=5, perturbed_n=8)
"""What two cores do in half an hour."""


def bundled_study(weights: Path | None = None, size: Size = SIZE) -> Study:
    """The bundled world.

    Args:
        weights: a folder that the rivals' trained weights are kept in.
        size: how much is measured.
    """
    model, processor, sae = load()

    @cache
    def methods() -> dict[str, Method]:
        given = materials(model, processor, sae, rates=CHOSEN["lora"], folder=weights)
        return {OURS: Erasing(model, sae), **make_methods(given)}

    @cache
    def shown(n: int, retained: int) -> ProbeSet:
        return probes(n, retained=retained, negatives=max(retained, n // 2))

    return Study(
        name="the bundled world",
        model=model,
        processor=processor,
        sae=sae,
        tasks={"concrete": CONCRETE, "abstract": ABSTRACT},
        probes=shown,
        methods=methods,
        relatives=(
            Relative("larger language model", "transfers", lambda: load_relative("larger")),
            Relative("four times the pixels", "ruined", lambda: load_relative("finer")),
        ),
        attacks=lambda: attacks(Training(())),
        attack_probes=tested,
        size=size,
    )
