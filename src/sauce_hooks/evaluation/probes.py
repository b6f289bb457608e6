"""What is asked: images with known concepts, and questions about them.

The protocol, for an erased concept c:

* *forgetting* (UA): n images that hold c; is c there (yes/no), and what is there (describe)?
* *same image* (SRA): every other true concept of those same images; affirmed, and named in the description?
* *retention* (IRA, CRA): images of every other concept c' without c; is c' there?
* *absence* (TNR, AUROC): images without the concept asked for.
* *hallucination* (POPE, MME): in images of other concepts, one true concept against one that is absent.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

from sauce_hooks.errors import ProbeError

PROTOCOL_VERSION = 2
"""The protocol of docs/protocol.md that is asked here. It changes with every change that moves a number."""

Absent = Literal["random", "popular", "adversarial"]
ABSENT: tuple[Absent, ...] = ("random", "popular", "adversarial")
"""POPE's ways to choose a concept that is not in an image."""
POPE_IMAGES = 3
"""Retained images of each concept that are asked POPE's questions."""
POPE_TOP = 3
"""How many of the most frequent, or most often co-occurring, absent concepts one is chosen from."""


@runtime_checkable
class Picture(Protocol):
    """An image that is opened when it is needed, so that thousands of them take no memory."""

    @property
    def name(self) -> str:
        """What tells it from every other picture: a digest of its content."""
        ...

    def open(self) -> Image.Image:
        """The image, RGB."""
        ...


@dataclass(frozen=True)
class Probe:
    """An image and the concepts that are true of it.

    Raises:
        ProbeError: a concept is true of it, and `known` says nothing of that one.
    """

    source: Image.Image | Picture
    """The image, or what opens it."""
    concepts: frozenset[str]
    """Every concept that is known to be in it."""
    known: frozenset[str] | None = None
    """The concepts of which it is known whether they are in it or not; None: all, the labels are complete."""

    def __post_init__(self) -> None:
        if self.known is not None and not self.concepts <= self.known:
            raise ProbeError(f"a probe holds {', '.join(sorted(self.concepts - self.known))}, of which `known` says nothing")

    @property
    def image(self) -> Image.Image:
        """The image; opened now if it is not in memory."""
        return self.source if isinstance(self.source, Image.Image) else self.source.open()

    @property
    def name(self) -> str:
        """A digest of the image."""
        if isinstance(self.source, Image.Image):
            about = f"{self.source.mode} {self.source.size} "
            return hashlib.sha256(about.encode() + self.source.tobytes()).hexdigest()
        return self.source.name

    def lacks(self, concept: str) -> bool:
        """Whether the concept is known not to be in it."""
        return concept not in self.concepts and (self.known is None or concept in self.known)


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    probe: Probe
    kind: Literal["yes_no", "describe"]
    concept: str | None
    """What a yes/no question asks for; None for a description."""
    absent: Absent | None = None
    """Of POPE's questions for an absent concept: how it was chosen."""
    beside: str | None = None
    """Of the same: the concept that the image holds, whose question is the other of the pair."""

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
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """What `mentions` takes for a concept where it is more than the concept's own name."""
    closed: bool = False
    """Whether `mentions` reads all that the model can say, as its vocabulary is closed; if not, a judge reads better."""
    max_new_tokens: int = 48
    """Of a description."""
    answer_tokens: int = 2
    """Of an answer to a yes/no question. Two are enough to read a yes; "I'm sorry" takes more."""

    def prompt(self, question: Question) -> str:
        """The text of a question."""
        return self.describe() if question.concept is None else self.yes_no(question.concept)


@runtime_checkable
class Judge(Protocol):
    """Decides whether descriptions name a concept. `name` tells one judge, and its version, from all others.

    It may have an attribute `note: str`, which is printed beside the results ("agrees with people in 84% of cases").
    """

    @property
    def name(self) -> str:
        """Which judge, and which version of it."""
        ...

    def __call__(self, texts: Sequence[str], concept: str) -> Sequence[bool | None]:
        """For each text, whether it names the concept; None where the judge cannot say."""
        ...


@dataclass(frozen=True)
class WholeWords:
    """The judge that nothing else is needed for: `Wording.mentions`."""

    wording: Wording
    name: str = "mentions"

    @property
    def note(self) -> str | None:
        """How little it agrees with labels made by hand, unless the model's vocabulary is closed."""
        from sauce_hooks.evaluation.judges.agreement import agreement

        return None if self.wording.closed else agreement(self).warning

    def __call__(self, texts: Sequence[str], concept: str) -> list[bool | None]:
        """Whether each text names the concept."""
        return [self.wording.mentions(text, concept) for text in texts]


@dataclass(frozen=True)
class ProbeSet:
    """The images of an evaluation, by concept."""

    domains: Mapping[str, tuple[str, ...]]
    positives: Mapping[str, Sequence[Probe]]
    """For every concept, images that hold it: what UA and SRA are measured on when it is erased."""
    retained: Mapping[str, Sequence[Probe]]
    """For every concept, other images that hold it: what IRA and CRA are measured on when another is erased."""
    negatives: Mapping[str, Sequence[Probe]]
    """For every concept, images that are known to lack it."""
    wording: Wording
    nearest: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(dict[str, str]()))
    """The sibling most like each concept, where that is known beforehand; else the original model is asked (`nearest`)."""

    @property
    def concepts(self) -> list[str]:
        """Every concept, domain by domain."""
        return [concept for concepts in self.domains.values() for concept in concepts]

    def domain_of(self, concept: str) -> str:
        """The domain a concept belongs to."""
        return next(domain for domain, concepts in self.domains.items() if concept in concepts)

    def require(self, concept: str) -> None:
        """Whether there is anything to measure the forgetting of a concept on.

        Raises:
            ProbeError: no image holds the concept.
        """
        if not self.positives.get(concept):
            held = ", ".join(f"{name} {len(probes)}" for name, probes in self.positives.items() if probes) or "none at all"
            raise ProbeError(
                f"no image of the probe set holds {concept!r}, so nothing says whether it is forgotten. "
                f"Images by concept: {held}. Add images of it, or leave it out of `concepts`"
            )


def own_questions(probes: ProbeSet, concept: str) -> list[Question]:
    """What is asked when a concept is erased: about its own images, and for it in images that lack it."""
    holding = [
        question
        for probe in probes.positives[concept]
        for question in (
            Question(probe, "describe", None),
            *(Question(probe, "yes_no", true) for true in sorted(probe.concepts)),
        )
    ]
    return [*holding, *(Question(probe, "yes_no", concept) for probe in probes.negatives.get(concept, ()))]


def other_questions(probes: ProbeSet) -> list[Question]:
    """What is asked whatever is erased: for every concept, images that hold it and images that lack it."""
    # As many absent as retained images a concept; the erased concept's own absences are asked in full elsewhere.
    return [
        Question(probe, "yes_no", concept)
        for concept, retained in probes.retained.items()
        for probe in (*retained, *probes.negatives.get(concept, ())[: len(retained)])
    ]


def pope_questions(probes: ProbeSet) -> list[Question]:
    """POPE's questions for absent concepts: one of each kind for some retained images of every concept.

    Each is the pair of the image's question for a concept that it holds, which `other_questions` asks. Of the concepts known
    to be absent, *random* takes any, *popular* one of the `POPE_TOP` that most images of the probe set hold, *adversarial*
    one of the `POPE_TOP` that stand most often in one image with what this image holds (Li et al. 2023, "Evaluating Object
    Hallucination in Large Vision-Language Models", section 4). Which of them is decided by the image's digest. Images whose
    labels say nothing of absence are not asked.
    """
    every = {id(p): p for table in (probes.positives, probes.retained) for some in table.values() for p in some}.values()
    frequent = Counter(concept for probe in every for concept in probe.concepts)
    together = {concept: Counter[str]() for concept in probes.concepts}
    for probe in every:
        for concept in probe.concepts:
            together.setdefault(concept, Counter()).update(probe.concepts - {concept})

    def choose(probe: Probe, kind: Absent, absent: Sequence[str]) -> str:
        rank: Mapping[Absent, Callable[[str], int]] = {
            "random": lambda _: 0,
            "popular": lambda name: frequent[name],
            "adversarial": lambda name: sum(together[held][name] for held in probe.concepts),
        }
        most = sorted(absent, key=rank[kind], reverse=True)  # stable: ties in the order of the domains
        top = absent if kind == "random" else most[:POPE_TOP]
        return top[int(hashlib.sha256(f"{probe.name} {kind}".encode()).hexdigest(), 16) % len(top)]

    questions: list[Question] = []
    for held, retained in probes.retained.items():
        for probe in retained[:POPE_IMAGES]:
            absent = [concept for concept in probes.concepts if probe.lacks(concept)]
            if absent:
                questions += [Question(probe, "yes_no", choose(probe, kind, absent), kind, held) for kind in ABSENT]
    return questions


def mentions(text: str, concept: str) -> bool:
    """Whether a text names a concept as a whole word, singular or plural, in any case."""
    return re.search(rf"\b{re.escape(concept)}(?:e?s)?\b", text, re.IGNORECASE) is not None
