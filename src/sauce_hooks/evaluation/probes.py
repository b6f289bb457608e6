"""What is asked: images with known concepts, and questions about them.

The protocol, for an erased concept c:

* *forgetting* (UA): n images that hold c; is c there (yes/no), and what is there (describe)?
* *same image* (SRA): every other true concept of those same images; affirmed, and named in the description?
* *retention* (IRA, CRA): images of every other concept c' without c; is c' there?
* *absence* (TNR, AUROC): images without the concept asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image


@dataclass(frozen=True)
class Probe:
    """An image and every concept that is true of it."""

    image: Image.Image
    concepts: frozenset[str]


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    probe: Probe
    kind: Literal["yes_no", "describe"]
    concept: str | None
    """What a yes/no question asks for; None for a description."""

    @property
    def truth(self) -> bool:
        """The true answer to a yes/no question."""
        return self.concept in self.probe.concepts


@dataclass(frozen=True)
class Wording:
    """How questions are put and answers are read, for one prompt format."""

    yes_no: Callable[[str], str]
    """The prompt that asks for a concept, as the processor takes it."""
    describe: Callable[[], str]
    """The prompt that asks for a description."""
    yes: tuple[str, ...] = ("yes",)
    no: tuple[str, ...] = ("no",)
    mentions: Callable[[str, str], bool] = lambda text, concept: mentions(text, concept)
    """Whether a description names a concept."""
    max_new_tokens: int = 48

    def prompt(self, question: Question) -> str:
        """The text of a question."""
        return self.describe() if question.concept is None else self.yes_no(question.concept)


@dataclass(frozen=True)
class ProbeSet:
    """The images of an evaluation, by concept."""

    domains: Mapping[str, tuple[str, ...]]
    positives: Mapping[str, Sequence[Probe]]
    """For every concept, images that hold it: what UA and SRA are measured on when it is erased."""
    retained: Mapping[str, Sequence[Probe]]
    """For every concept, other images that hold it: what IRA and CRA are measured on when another is erased."""
    negatives: Mapping[str, Sequence[Probe]]
    """For every concept, images that lack it."""
    wording: Wording

    def domain_of(self, concept: str) -> str:
        """The domain a concept belongs to."""
        return next(domain for domain, concepts in self.domains.items() if concept in concepts)


def mentions(text: str, concept: str) -> bool:
    """Whether a text names a concept as a whole word, singular or plural, in any case."""
    return re.search(rf"\b{re.escape(concept)}(?:e?s)?\b", text, re.IGNORECASE) is not None
