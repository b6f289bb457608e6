"""Counts, rates and intervals. Pure functions on answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.stats import rankdata
from statsmodels.stats.proportion import proportion_confint

from sauce_hooks.bank import Rate
from sauce_hooks.evaluation.answers import Answer
from sauce_hooks.evaluation.probes import ProbeSet

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "UA_d": "unlearning accuracy, discriminative: images of the erased concept for which it is not affirmed",
        "UA_g": "unlearning accuracy, generative: images of the erased concept whose description does not name it",
        "IRA": "in-domain retain accuracy: the other concepts of its domain, affirmed in images that hold them",
        "CRA": "cross-domain retain accuracy: likewise, the concepts of the other domains",
        "SRA": "same-image retained accuracy: the other true concepts of the erased concept's images, affirmed and named",
        "SRA_d": "of these, affirmed",
        "SRA_g": "of these, named in the description",
        "TNR": "true-negative rate: concepts denied in images that lack them",
        "AUROC": "area under the ROC curve of the yes/no margin for the erased concept: images with against images without",
        "invalid": "answers that are a refusal, or neither yes nor no, or empty",
    }
)
"""Every metric and what it says; all are shares, 0 to 1."""


def rate(hits: Iterable[bool]) -> Rate:
    """A proportion with its Wilson interval; NaN for no cases."""
    values = list(hits)
    if not values:
        return Rate(float("nan"), 0, float("nan"), float("nan"))
    interval: Any = proportion_confint(sum(values), len(values), method="wilson")
    value = sum(values) / len(values)
    return Rate(value, len(values), min(value, float(interval[0])), max(value, float(interval[1])))  # rounding aside


def auroc(positive: Sequence[float], negative: Sequence[float]) -> Rate:
    """P(margin of a positive > margin of a negative), ties counted half; interval after Hanley and McNeil (1982)."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return Rate(float("nan"), 0, float("nan"), float("nan"))
    ranks = rankdata([*positive, *negative])
    a = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    se = np.sqrt(max(0.0, a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m))
    return Rate(a, n + m, max(0.0, a - 1.96 * se), min(1.0, a + 1.96 * se))


def score(erased: str, own: Sequence[Answer], others: Sequence[Answer], probes: ProbeSet) -> dict[str, Rate]:
    """Every metric of one erased concept.

    Args:
        erased: the concept.
        own: answers about the images that hold it, and to the question for it in images that lack it.
        others: answers to the questions for every other concept, in images that hold it and images that lack it.
        probes: the protocol's images and domains.
    """
    domain = probes.domains[probes.domain_of(erased)]
    holding = [a for a in own if erased in a.question.probe.concepts]
    target = [a for a in holding if a.question.concept == erased]
    lacking = [a for a in own if a.question.concept == erased and not a.question.truth]
    described = [a for a in holding if a.question.kind == "describe"]
    same = [a for a in holding if a.question.concept not in (None, erased)]
    # The images of a retained concept must not hold the erased one: SRA is where that is measured.
    elsewhere = [a for a in others if erased not in a.question.probe.concepts and a.question.concept != erased]
    kept = [a for a in elsewhere if a.question.truth]

    by_image = {id(a.question.probe): a.text for a in described}
    named = [probes.wording.mentions(by_image[id(a.question.probe)], a.question.concept or "") for a in same]
    affirmed = [a.correct for a in same]
    return {
        "UA_d": rate(a.status != "yes" for a in target),
        "UA_g": rate(not probes.wording.mentions(a.text, erased) for a in described),
        "IRA": rate(a.correct for a in kept if a.question.concept in domain),
        "CRA": rate(a.correct for a in kept if a.question.concept not in domain),
        "SRA": rate(d and g for d, g in zip(affirmed, named, strict=True)),
        "SRA_d": rate(affirmed),
        "SRA_g": rate(named),
        "TNR": rate(a.status == "no" for a in [*lacking, *(a for a in elsewhere if not a.question.truth)]),
        "AUROC": auroc([a.margin for a in target], [a.margin for a in lacking]),
        "invalid": rate(a.status in ("refusal", "invalid") for a in [*own, *elsewhere]),
    }


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = 2_000) -> tuple[float, float, float]:
    """The mean over concepts and the 95% interval of resampling the concepts (percentiles)."""
    array = np.asarray([v for v in values if not np.isnan(v)], dtype=np.float64)
    if not len(array):
        return float("nan"), float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.percentile(array[rows].mean(1), (2.5, 97.5))
    return float(array.mean()), float(low), float(high)
