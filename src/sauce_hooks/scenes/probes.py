"""The protocol's images, taken from the bundled world."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from PIL import Image

from sauce_hooks.evaluation.probes import Probe, ProbeSet, Wording
from sauce_hooks.scenes.language import NAMES, NO, YES, Language, describe_prompt, split_words, yes_no_prompt
from sauce_hooks.scenes.world import CONCEPTS, DOMAINS, SIBLINGS, Scene, Split, sample

_SEED = {"positives": 10_000, "retained": 20_000, "negatives": 30_000}


@dataclass(frozen=True)
class Drawn:
    """A scene's picture, drawn when it is first asked for."""

    scene: Scene

    @property
    def name(self) -> str:
        """A digest of the scene, which says all about the picture."""
        return hashlib.sha256(repr((self.scene.things, self.scene.seed)).encode()).hexdigest()

    def open(self) -> Image.Image:
        """The picture."""
        return self.scene.image


def wording(phrasing: int = 0, language: Language = "en") -> Wording:
    """How the bundled model is asked, and how its answers are read."""
    names = NAMES[language]
    return Wording(
        yes_no=lambda concept: yes_no_prompt(concept, phrasing, language),
        describe=lambda: describe_prompt(phrasing, language),
        yes=(YES[language],),
        no=(NO[language],),
        mentions=lambda text, concept: names[concept] in split_words(text),
        closed=True,
    )


def probes(
    n: int = 50,
    *,
    retained: int = 10,
    negatives: int | None = None,
    split: Split = "test",
    seed: int = 0,
    phrasing: int = 0,
    language: Language = "en",
) -> ProbeSet:
    """The protocol's images for every concept of the world.

    Args:
        n: images that hold each concept.
        retained: further images of each concept, for IRA, CRA and the true-negative rate.
        negatives: images that lack each concept; `n` by default.
        split: "val" to choose settings, "test" to report.
        seed: another draw of the same.
        phrasing: which phrasing of the questions; −1 is the one never trained on.
        language: "en" or "fr".
    """

    def draw(count: int, kind: str, concept: str) -> list[Probe]:
        where = _SEED[kind] + 1_000_000 * seed + CONCEPTS.index(concept)
        lacks = concept if kind == "negatives" else None
        scenes: list[Scene] = sample(count, seed=where, contains=None if lacks else concept, lacks=lacks, split=split)
        return [Probe(Drawn(scene), scene.concepts) for scene in scenes]

    return ProbeSet(
        domains=DOMAINS,
        positives={concept: draw(n, "positives", concept) for concept in CONCEPTS},
        retained={concept: draw(retained, "retained", concept) for concept in CONCEPTS},
        negatives={concept: draw(n if negatives is None else negatives, "negatives", concept) for concept in CONCEPTS},
        wording=wording(phrasing, language),
        nearest=SIBLINGS,
    )
