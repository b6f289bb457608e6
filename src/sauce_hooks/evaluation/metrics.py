"""The metrics: which answers each counts, and how. Pure functions on answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple

from sauce_hooks.bank import Rate
from sauce_hooks.evaluation.answers import Answer
from sauce_hooks.evaluation.probes import Absent, Judge, ProbeSet, WholeWords
from sauce_hooks.evaluation.statistics import NOTHING, Counts, auroc, bootstrap_mean, harmonic_mean, rate, ratio

__all__ = ["METRICS", "Rate", "Scored", "auroc", "bootstrap_mean", "count", "harmonic", "nearest_sibling", "rate", "score"]

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "UA_d": "unlearning accuracy, discriminative: images of the erased concept for which it is not affirmed",
        "UA_g": "unlearning accuracy, generative: images of the erased concept whose description does not name it",
        "IRA": "in-domain retain accuracy: the other concepts of its domain, affirmed in images that hold them",
        "IRA_near": "of these, the one sibling that is most like the erased concept",
        "CRA": "cross-domain retain accuracy: likewise, the concepts of the other domains",
        "SRA": "same-image retained accuracy: the other true concepts of the erased concept's images, affirmed and named",
        "SRA_d": "of these, affirmed",
        "SRA_g": "of these, named in the description",
        "TNR": "true-negative rate: concepts denied in images that lack them",
        "AUROC": "area under the ROC curve of the yes/no margin for the erased concept: images with against images without",
        "H": "harmonic mean of UA_d, UA_g and, as shares of the original model's, IRA, CRA and SRA",
        "POPE_F1": "POPE: harmonic mean of precision and recall of yes, over as many absent as present concepts",
        "POPE_F1_random": "of these, absent concepts chosen at random",
        "POPE_F1_popular": "of these, absent concepts that many images hold",
        "POPE_F1_adversarial": "of these, absent concepts that often stand beside what the image holds",
        "POPE_accuracy": "POPE: correct answers",
        "POPE_precision": "POPE: of the concepts affirmed, those that are there",
        "POPE_recall": "POPE: of the concepts that are there, those affirmed",
        "POPE_yes": "POPE: answers that are yes; half would be right",
        "MME": "MME-style score of existence: acc + acc+, from 0 to 2",
        "MME_acc": "MME: correct answers to an image's yes question and its no question",
        "MME_plus": "MME: images of which both answers are correct",
        "CHAIR_i": "object hallucination: of the concepts named in descriptions, those that are not in the image",
        "CHAIR_s": "object hallucination: descriptions that name a concept that is not in the image",
        "known": "correct yes/no answers for the erased concept, in as many images without it as with it",
        "refusal": "answers that refuse",
        "invalid": "answers that are a refusal, or neither yes nor no, or empty",
    }
)
"""Every metric and what it says; all are shares, 0 to 1, but MME, which goes to 2."""

SHOWN: tuple[str, ...] = (
    "UA_d", "UA_g", "IRA", "IRA_near", "CRA", "SRA", "SRA_d", "SRA_g", "TNR", "AUROC", "H", "POPE_F1", "MME", "CHAIR_i",
    "invalid",
)  # fmt: skip
"""The columns of a table; the frame has all."""
MOST: Mapping[str, float] = MappingProxyType({"MME": 2.0})
"""The greatest value of the metrics that are no shares."""
Outcome = Literal["correct", "wrong", "refusal", "invalid"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "refusal", "invalid")
"""What can become of a question."""


class Case(NamedTuple):
    """An answer as one metric counts it: it adds `num` above the line and `den` below."""

    answer: Answer
    num: float
    den: float = 1.0
    named: bool | None = None
    """Of a description, whether it names a concept: rightly, if the concept is in the image."""
    about: str = ""
    """That concept."""

    @property
    def outcome(self) -> Outcome:
        """Whether the model was right, which is not whether it forgot."""
        answer = self.answer
        if answer.status in ("refusal", "invalid"):
            return answer.status
        right = answer.correct if answer.question.concept else self.named == (self.about in answer.question.probe.concepts)
        return "correct" if right else "wrong"


class Named(NamedTuple):
    """A description, and whether it names a concept."""

    answer: Answer
    concept: str
    named: bool


class Pair(NamedTuple):
    """POPE's and MME's pair: of one image, the answers for a concept that it holds and for one that it lacks."""

    present: Answer
    absent: Answer
    kind: Absent


@dataclass(frozen=True)
class Sorted:
    """The answers of one erased concept, by what they are asked for."""

    erased: str
    near: str | None
    probes: ProbeSet
    judge: Judge
    own: Sequence[Answer]
    others: Sequence[Answer]

    @cached_property
    def domain(self) -> tuple[str, ...]:
        """The concepts of its domain."""
        return self.probes.domains[self.probes.domain_of(self.erased)]

    @cached_property
    def holding(self) -> list[Answer]:
        """About its own images."""
        return [a for a in self.own if self.erased in a.question.probe.concepts]

    @cached_property
    def target(self) -> list[Answer]:
        """For the concept, in images that hold it."""
        return [a for a in self.holding if a.question.concept == self.erased]

    @cached_property
    def lacking(self) -> list[Answer]:
        """For the concept, in images that lack it."""
        return [a for a in self.own if a.question.concept == self.erased and not a.question.truth]

    @cached_property
    def descriptions(self) -> list[Answer]:
        """Of its own images."""
        return [a for a in self.holding if a.question.kind == "describe"]

    @cached_property
    def described(self) -> list[Named]:
        """The same, and whether they name the concept."""
        return self._judged(self.descriptions, self.erased, unsure=True)

    def _judged(self, descriptions: Sequence[Answer], concept: str, *, unsure: bool) -> list[Named]:
        """What the judge says; where it cannot, `unsure`, which is what does not flatter. A refusal names nothing."""
        verdicts = getattr(self.judge, "verdicts", self.judge)  # called, a judge that can be unsure is so no more
        said = verdicts([a.text for a in descriptions], concept) if descriptions else []
        return [
            Named(a, concept, a.status == "text" and (unsure if verdict is None else bool(verdict)))
            for a, verdict in zip(descriptions, said, strict=True)
        ]

    @cached_property
    def same(self) -> list[tuple[Answer, Named]]:
        """Every other true concept of its own images: asked for, and looked for in the description."""
        asked = [a for a in self.holding if a.question.concept not in (None, self.erased)]
        of_image = {id(a.question.probe): a for a in self.descriptions}
        found: dict[tuple[int, str], Named] = {}
        for concept in dict.fromkeys(str(a.question.concept) for a in asked):  # a judge is asked once a concept
            texts = [of_image[id(a.question.probe)] for a in asked if a.question.concept == concept]
            for said in self._judged(texts, concept, unsure=False):
                found[id(said.answer.question.probe), concept] = said
        return [(a, found[id(a.question.probe), str(a.question.concept)]) for a in asked]

    @cached_property
    def elsewhere(self) -> list[Answer]:
        """For other concepts. The images must not hold the erased one: SRA is where that is measured."""
        return [a for a in self.others if self.erased not in a.question.probe.concepts and a.question.concept != self.erased]

    @cached_property
    def kept(self) -> list[Answer]:
        """For other concepts, in images that hold them."""
        return [a for a in self.elsewhere if a.question.truth]

    @cached_property
    def absent(self) -> list[Answer]:
        """For any concept, in images that lack it; without POPE's, which are chosen to be hard."""
        return [*self.lacking, *(a for a in self.elsewhere if not a.question.truth and a.question.absent is None)]

    @cached_property
    def pairs(self) -> list[Pair]:
        """POPE's pairs."""
        present = {(id(a.question.probe), a.question.concept): a for a in self.kept}
        return [
            Pair(present[pair], a, a.question.absent)
            for a in self.elsewhere
            if a.question.absent is not None and (pair := (id(a.question.probe), a.question.beside)) in present
        ]

    @cached_property
    def named(self) -> list[tuple[Answer, int, int]]:
        """Of each description, how many concepts it names, and how many of them are known not to be in the image.

        By `Wording.mentions`, whatever the judge: CHAIR is defined with a word list.
        """
        found: list[tuple[Answer, int, int]] = []
        for a in self.descriptions:
            probe = a.question.probe
            if not any(probe.lacks(c) for c in self.probes.concepts):
                continue  # nothing is known to be absent: nothing that is said can be false
            names = [c for c in self.probes.concepts if self.probes.wording.mentions(a.text, c)]
            false = sum(probe.lacks(c) for c in names)
            found.append((a, false + sum(c in probe.concepts for c in names), false))
        return found


def _hits(answers: Iterable[Answer], hit: Callable[[Answer], bool]) -> list[Case]:
    return [Case(a, hit(a)) for a in answers]


def _share_named(found: Iterable[Named], wanted: bool) -> list[Case]:
    return [Case(a, named is wanted, True, named, about) for a, about, named in found]


def _confusion(pairs: Iterable[Pair], num: Callable[[str], float], den: Callable[[str], float]) -> list[Case]:
    """By the cells of the confusion matrix of "yes". An answer that is neither yes nor no is no yes."""
    cases: list[Case] = []
    for pair in pairs:
        for answer, cells in ((pair.present, ("FN", "TP")), (pair.absent, ("TN", "FP"))):
            cell = cells[answer.affirmed]
            cases.append(Case(answer, num(cell), den(cell)))
    return cases


def _f1(*kinds: Absent) -> Callable[[Sorted], list[Case]]:
    return lambda s: _confusion(
        (p for p in s.pairs if not kinds or p.kind in kinds),
        lambda cell: 2 * (cell == "TP"),
        lambda cell: {"TP": 2, "FP": 1, "FN": 1, "TN": 0}[cell],
    )


def _mme(weight_of_each: float, weight_of_both: float, *, by_question: bool = False) -> Callable[[Sorted], list[Case]]:
    """The pair's second answer carries what both earn, so that an image is one case."""

    def cases(s: Sorted) -> list[Case]:
        found: list[Case] = []
        for pair in (p for p in s.pairs if p.kind == "random"):
            each = (pair.present.correct, pair.absent.correct)
            if by_question:
                found += [Case(answer, right) for answer, right in zip(pair[:2], each, strict=True)]
            else:
                found.append(Case(pair.absent, weight_of_each * sum(each) / 2 + weight_of_both * all(each)))
        return found

    return cases


def _always(_: str) -> float:
    return 1.0


_CASES: Mapping[str, Callable[[Sorted], list[Case]]] = MappingProxyType(
    {
        # SAeUron (Cywiński and Deja 2025) and SAUCE: UA = 1 − accuracy on the target, IRA and CRA = accuracy elsewhere.
        "UA_d": lambda s: _hits(s.target, lambda a: not a.affirmed),
        "UA_g": lambda s: _share_named(s.described, False),
        "IRA": lambda s: _hits((a for a in s.kept if a.question.concept in s.domain), lambda a: a.correct),
        "IRA_near": lambda s: _hits((a for a in s.kept if a.question.concept == s.near), lambda a: a.correct),
        "CRA": lambda s: _hits((a for a in s.kept if a.question.concept not in s.domain), lambda a: a.correct),
        # Ours.
        "SRA": lambda s: [Case(a, a.correct and said.named) for a, said in s.same],
        "SRA_d": lambda s: _hits((a for a, _ in s.same), lambda a: a.correct),
        "SRA_g": lambda s: _share_named((said for _, said in s.same), True),
        "TNR": lambda s: _hits(s.absent, lambda a: a.status == "no"),
        "AUROC": lambda s: [Case(a, a.margin, float(a.question.truth)) for a in (*s.target, *s.lacking)],
        # POPE (Li et al. 2023), section 4: precision = TP/(TP+FP), recall = TP/(TP+FN), F1 = 2TP/(2TP+FP+FN).
        "POPE_F1": _f1(),
        "POPE_F1_random": _f1("random"),
        "POPE_F1_popular": _f1("popular"),
        "POPE_F1_adversarial": _f1("adversarial"),
        "POPE_accuracy": lambda s: _hits((a for p in s.pairs for a in p[:2]), lambda a: a.correct),
        "POPE_precision": lambda s: _confusion(s.pairs, lambda cell: cell == "TP", lambda cell: cell in ("TP", "FP")),
        "POPE_recall": lambda s: _confusion(s.pairs, lambda cell: cell == "TP", lambda cell: cell in ("TP", "FN")),
        "POPE_yes": lambda s: _confusion(s.pairs, lambda cell: cell in ("TP", "FP"), _always),
        # MME (Fu et al. 2023), section 2.3: acc over questions, acc+ over images of which both answers are right.
        "MME": _mme(1, 1),
        "MME_acc": _mme(1, 0, by_question=True),
        "MME_plus": _mme(0, 1),
        # CHAIR (Rohrbach et al. 2018), section 2.1: false objects / all objects named; sentences with one / all sentences.
        "CHAIR_i": lambda s: [Case(a, false, named) for a, named, false in s.named],
        "CHAIR_s": lambda s: [Case(a, false > 0) for a, _, false in s.named],
        "known": lambda s: _hits(_balanced(s.target, s.lacking), lambda a: a.correct),
        "refusal": lambda s: _hits((*s.own, *_asked_elsewhere(s)), lambda a: a.status == "refusal"),
        "invalid": lambda s: _hits((*s.own, *_asked_elsewhere(s)), lambda a: a.status in ("refusal", "invalid")),
    }
)
"""Which answers each metric counts, and what each adds to Σ num / Σ den. H is made of others: see `harmonic`."""


def _asked_elsewhere(s: Sorted) -> list[Answer]:
    return [a for a in s.elsewhere if a.question.absent is None]


def _balanced(target: list[Answer], lacking: list[Answer]) -> list[Answer]:
    """As many of each; without any that lack it, those there are."""
    n = min(len(target), len(lacking)) or max(len(target), len(lacking))
    return [*target[:n], *lacking[:n]]


class Scored(NamedTuple):
    """Every metric of one erased concept, and what each was counted from."""

    rates: dict[str, Rate]
    counts: dict[str, Counts]


def _numbered(probes: ProbeSet) -> dict[int, int]:
    """A number for every image, the same for whatever is erased: means over concepts know which images they share."""
    every = [p for table in (probes.positives, probes.retained, probes.negatives) for some in table.values() for p in some]
    return {key: i for i, key in enumerate(dict.fromkeys(map(id, every)))}


def _counted(cases: Sequence[Case], images: dict[int, int]) -> Counts:
    numbers = tuple(images.setdefault(id(case.answer.question.probe), len(images)) for case in cases)
    outcomes = [case.outcome for case in cases]
    found = MappingProxyType({outcome: outcomes.count(outcome) for outcome in OUTCOMES})
    return Counts(tuple(float(c.num) for c in cases), tuple(float(c.den) for c in cases), numbers, found)


def _auroc(counts: Counts) -> Rate:
    paired = list(zip(counts.num, counts.den, strict=True))
    return auroc([margin for margin, holds in paired if holds], [margin for margin, holds in paired if not holds])


def count(
    erased: str,
    own: Sequence[Answer],
    others: Sequence[Answer],
    probes: ProbeSet,
    *,
    judge: Judge | None = None,
    near: str | None = None,
) -> Scored:
    """Every metric of one erased concept but H, which takes the original model's.

    Args:
        erased: the concept.
        own: answers to `own_questions`: about the images that hold it, and for it in images that lack it.
        others: answers to `other_questions` and `pope_questions`.
        probes: the protocol's images and domains.
        judge: decides whether a description names a concept; `Wording.mentions` by default.
        near: the sibling that IRA_near is of; `probes.nearest` by default.
    """
    near = near or probes.nearest.get(erased)
    piles = Sorted(erased, near, probes, judge or WholeWords(probes.wording), own, others)
    images = _numbered(probes)
    counts = {metric: _counted(cases(piles), images) for metric, cases in _CASES.items()}
    rates = {m: _auroc(c) if m == "AUROC" else ratio(c, MOST.get(m, 1.0)) for m, c in counts.items()}
    return Scored({metric: rates.get(metric, NOTHING) for metric in METRICS}, counts)


def score(
    erased: str, own: Sequence[Answer], others: Sequence[Answer], probes: ProbeSet, *, judge: Judge | None = None
) -> dict[str, Rate]:
    """The rates of `count`."""
    return count(erased, own, others, probes, judge=judge).rates


def harmonic(rates: Mapping[str, Rate], original: Mapping[str, Rate]) -> float:
    """H = n / Σ 1/v over UA_d, UA_g and min(1, v / v₀) of IRA, CRA and SRA, where v₀ is the original model's value.

    Forgetting nothing, or losing all of one thing that should be kept, gives 0. What is not measured is left out, but
    without any forgetting or any retention measured there is no H.
    """
    forgotten = [rates[metric].value for metric in FORGETTING]
    kept = [share_kept(rates[metric].value, original[metric].value) for metric in KEPT]
    if all(map(math.isnan, forgotten)) or all(map(math.isnan, kept)):
        return float("nan")
    return harmonic_mean([*forgotten, *kept])


def share_kept(value: float, original: float) -> float:
    """A value as a share of the original model's, at most 1; NaN where the original has none of it."""
    if math.isnan(value) or math.isnan(original) or not original:  # min(1, NaN) would be 1
        return float("nan")
    return min(1.0, value / original)


FORGETTING = ("UA_d", "UA_g")
"""What H has of forgetting."""
KEPT = ("IRA", "CRA", "SRA")
"""What H has of retention."""


def nearest_sibling(erased: str, own: Sequence[Answer], probes: ProbeSet) -> str | None:
    """The concept of the same domain that the original model comes closest to taking for the erased one.

    Of the images that lack the erased concept, those that hold the sibling: the sibling whose images have the highest mean
    margin for the erased concept. It is found once, from the original model's answers, so it is the same for every method
    and is not chosen by what a method does to it. None if no such image was asked about.
    """
    if erased in probes.nearest:
        return probes.nearest[erased]
    margins: dict[str, list[float]] = {}
    for a in own:
        if a.question.concept == erased and not a.question.truth and a.margin == a.margin:
            for concept in a.question.probe.concepts:
                if concept in probes.domains[probes.domain_of(erased)]:
                    margins.setdefault(concept, []).append(a.margin)
    return max(margins, key=lambda c: sum(margins[c]) / len(margins[c]), default=None)
