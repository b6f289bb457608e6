"""The bundled concept bank: features by contrast, then how many and how strongly by validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track

from sauce_hooks.bank import Concept
from sauce_hooks.concepts import SetStatistics, TokenMoments, learn_concept, set_statistics, token_moments
from sauce_hooks.concepts.tuning import Target, Tuning, smallest_edit
from sauce_hooks.concepts.ways import Sets, ways
from sauce_hooks.erasure import PAPER_GAMMA
from sauce_hooks.evaluation.measure import measure_probes
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.provenance import provenance_of
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.world import CONCEPTS, DOMAINS, Scene, domain_of, sample

N_CONTRAST = 200
"""Images in each contrast set, as in the paper."""
CONTRAST_SEED = 1
"""The first stream of training scenes the contrast sets come from; the model itself is trained on stream 0."""
N_SIBLING = 60
"""Images of each other concept of the domain, without the concept."""
SIBLING_SEED = 1_000
"""The first stream of training scenes these come from."""
KS = (2, 4, 16)
GAMMAS = (0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0)
"""From mild to strong."""
PAPER_K = 32
"""Features a concept for the paper's SAE; the paper does not say how many."""
TARGET = 0.96
"""Share of the validation images on which a concept must be forgotten, in both forms."""
N_TUNING = 40
"""Validation images of a concept that settings are chosen on; of each sibling, for the figures of retention, a tenth."""


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


def sibling_statistics(model: Any, processor: Any, sae: VisionSAE, concept: str) -> dict[str, SetStatistics]:
    """What an SAE's features do on training scenes with each other concept of the domain, and without this one."""
    seed = SIBLING_SEED + len(CONCEPTS) * CONCEPTS.index(concept)
    scenes = {
        sibling: sample(N_SIBLING, seed=seed + i, contains=sibling, lacks=concept, split="train")
        for i, sibling in enumerate(DOMAINS[domain_of(concept)])
        if sibling != concept
    }
    return {
        sibling: set_statistics(model, sae, [scene.image for scene in found], processor=processor)
        for sibling, found in scenes.items()
    }


Moments = Mapping[str, tuple[TokenMoments, TokenMoments]]
"""Of every concept the tokens of its contrast sets."""


def contrast_moments(model: Any, processor: Any, sae: VisionSAE) -> Moments:
    """The moments of all tokens of every concept's contrast sets."""

    def of(scenes: Sequence[Scene]) -> TokenMoments:
        return token_moments(model, sae, [scene.image for scene in scenes], processor=processor)

    found: dict[str, tuple[TokenMoments, TokenMoments]] = {}
    for concept in track(CONCEPTS, description="read contrast sets"):
        with_it, without = contrast_sets(concept)
        found[concept] = of(with_it), of(without)
    return found


def candidates(model: Any, processor: Any, sae: VisionSAE, concept: str, moments: Moments) -> list[Concept]:
    """The ways to see a concept that are tried."""
    positives, negatives = contrast_statistics(model, processor, sae, concept)
    siblings = sibling_statistics(model, processor, sae, concept)
    return ways(sae, concept, Sets(positives, negatives, siblings, moments), k=max(KS))


def learn_bank(model: Any, processor: Any, sae: VisionSAE, concepts: Sequence[str] = CONCEPTS) -> None:
    """Fill an SAE's bank with concepts of the world, each as the smallest edit that forgets it.

    Of the `candidates`, `KS` and `GAMMAS` that forget the concept on `TARGET` of `N_TUNING` validation images, the setting
    that keeps most is taken (`concepts.tuning`); the bank has its effect there and the whole curve. Each domain is a group.
    """
    images = probes(N_TUNING, retained=N_TUNING // 10, negatives=0, split="val")
    targets = [Target(metric, at_least=TARGET) for metric in ("UA_d", "UA_g")]
    moments = contrast_moments(model, processor, sae)
    for concept in track(concepts, description="learn concepts"):
        measure = measure_probes(
            model,
            sae,
            images,
            concept,
            processor=processor,
            metrics=("UA_d", "UA_g", "SRA", "IRA"),
            images=f"{N_TUNING} validation scenes",
            batch_size=128,
        )
        tried = candidates(model, processor, sae, concept, moments)
        found = smallest_edit(tried, Tuning(measure, targets, KS, GAMMAS))
        facts = {"tokens": sae.tokens.read, "pool": "mean", **provenance_of(sae)}
        sae.concepts.add(replace(found, provenance={**found.provenance, **facts}), sae=sae.record())
    for domain, names in DOMAINS.items():
        if all(name in sae.concepts for name in names):
            sae.concepts.group(domain, names)


def learn_paper_bank(model: Any, processor: Any, sae: VisionSAE) -> None:
    """Fill an SAE's bank as the paper does: Eq. 4 alone, `PAPER_K` features, its γ."""
    for concept in track(CONCEPTS, description="learn concepts"):
        sets = contrast_statistics(model, processor, sae, concept)
        learn_concept(model, sae, concept, *sets, k=PAPER_K, gamma=PAPER_GAMMA)
