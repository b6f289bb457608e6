"""The bundled concept bank: features by contrast, then how many and how strongly by validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track

from sauce_hooks.bank import Concept
from sauce_hooks.concepts import SetStatistics, learn_concept, set_statistics
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.evaluation import ProbeSet, Rate, ask, prepare
from sauce_hooks.evaluation.metrics import score
from sauce_hooks.evaluation.run import own_questions
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.world import CONCEPTS, Scene, sample

N_CONTRAST = 200
"""Images in each contrast set, as in the paper."""
CONTRAST_SEED = 1
"""The first stream of training scenes the contrast sets come from; the model itself is trained on stream 0."""
KS = (1, 2, 3)
GAMMAS = (0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0)
"""From mild to strong."""
PAPER_K = 32
"""Features a concept for the paper's SAE; the paper does not say how many."""
TARGET = 0.96
"""Share of the validation images on which a concept must be forgotten, in both forms."""


def contrast_sets(concept: str, n: int = N_CONTRAST) -> tuple[list[Scene], list[Scene]]:
    """Training scenes with and without a concept."""
    seed = CONTRAST_SEED + 2 * CONCEPTS.index(concept)
    return (
        sample(n, seed=seed, contains=concept, split="train"),
        sample(n, seed=seed + 1, lacks=concept, split="train"),
    )


def contrast_statistics(model: Any, processor: Any, sae: VisionSAE, concept: str) -> list[SetStatistics]:
    """What an SAE's features do on the contrast sets of a concept: with it, without it."""
    sets = ([scene.image for scene in scenes] for scenes in contrast_sets(concept))
    return [set_statistics(model, sae, images, processor=processor) for images in sets]


def learn_bank(
    model: Any, processor: Any, sae: VisionSAE, settings: Iterable[tuple[int, float | None]] | None = None
) -> None:
    """Fill an SAE's bank with every concept of the world, features by Eq. 4.

    Args:
        model: the bundled model.
        processor: its processor.
        sae: the SAE whose bank is filled.
        settings: k and γ to try; by default `KS` and `GAMMAS`. Of those that forget the concept on `TARGET` of 40
            validation images, the one that keeps most of what else is in these images is taken. A single setting is
            taken as it is.
    """
    grid = list(settings) if settings is not None else [(k, gamma) for k in KS for gamma in GAMMAS]
    images = probes(40, retained=0, negatives=0, split="val") if len(grid) > 1 else None
    for concept in track(CONCEPTS, description="learn concepts"):
        statistics = contrast_statistics(model, processor, sae, concept)
        candidates = [learn_concept(model, sae, concept, *statistics, k=k, gamma=gamma) for k, gamma in grid]
        chosen = candidates[0] if images is None else tune(model, processor, sae, candidates, images)
        sae.concepts.add(chosen)


def tune(model: Any, processor: Any, sae: VisionSAE, candidates: Sequence[Concept], images: ProbeSet) -> Concept:
    """The candidate that forgets enough and keeps most; for each set of features the mildest sufficient γ is tried.

    If none forgets enough, the one that forgets most.
    """
    concept = candidates[0].name
    batches = prepare(own_questions(images, concept), images.wording, processor, 128)

    def measure(candidate: Concept) -> dict[str, Rate]:
        with ConceptEraser(model, sae, [candidate]):
            return score(concept, list(ask(model, batches, images.wording, processor)), (), images)

    tried: list[tuple[bool, float, Concept]] = []
    for features in dict.fromkeys(candidate.features for candidate in candidates):
        line = [candidate for candidate in candidates if candidate.features == features]
        low, high = 0, len(line) - 1
        while low <= high:  # forgetting grows along the line, so the mildest sufficient one is found by halving
            middle = (low + high) // 2
            found = measure(line[middle])
            forgotten = min(found["UA_d"].value, found["UA_g"].value)
            enough = forgotten >= TARGET
            tried.append((enough, found["SRA"].value if enough else forgotten, line[middle]))
            low, high = (low, middle - 1) if enough else (middle + 1, high)
    enough, value, best = max(tried, key=lambda t: t[:2])
    record = {"tuned_on": "val", "target": TARGET, "SRA" if enough else "forgotten": round(value, 4)}
    return replace(best, provenance={**best.provenance, **record})
