"""The bundled concept bank: features by contrast, then how many and how strongly by validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from rich.progress import track
from scipy.stats import hmean

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.concepts import SetStatistics, learn_concept, set_statistics
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.evaluation.answers import Answer, Batch, ask, prepare
from sauce_hooks.evaluation.metrics import score
from sauce_hooks.evaluation.probes import ProbeSet
from sauce_hooks.evaluation.run import other_questions, own_questions
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes.world import CONCEPTS, Scene, sample

N_CONTRAST = 200
"""Images in each contrast set, as in the paper."""
CONTRAST_SEED = 1
"""The stream of training scenes the contrast sets come from; the model itself is trained on stream 0."""


def contrast_sets(concept: str, n: int = N_CONTRAST) -> tuple[list[Scene], list[Scene]]:
    """Training scenes with and without a concept."""
    seed = CONTRAST_SEED + 2 * CONCEPTS.index(concept)
    return (
        sample(n, seed=seed, contains=concept, split="train"),
        sample(n, seed=seed + 1, lacks=concept, split="train"),
    )


class Contrasts:
    """The contrast statistics of every concept for one SAE, each computed once."""

    def __init__(self, model: Any, processor: Any, sae: VisionSAE) -> None:
        self._model, self._processor, self._sae = model, processor, sae
        self._known: dict[str, tuple[SetStatistics, SetStatistics]] = {}

    def learn(self, concept: str, k: int, gamma: float | None = None) -> Concept:
        """`learn_concept` with Eq. 4 from this world's contrast sets; stored in the SAE's bank."""
        if concept not in self._known:
            sets = ([scene.image for scene in scenes] for scenes in contrast_sets(concept))
            pos, neg = (set_statistics(self._model, self._sae, images, processor=self._processor) for images in sets)
            self._known[concept] = pos, neg
        return learn_concept(self._model, self._sae, concept, *self._known[concept], k=k, gamma=gamma)
