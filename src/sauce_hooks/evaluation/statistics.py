"""Intervals and tests. Pure functions on counts.

A concept's rate has Wilson's interval. A mean over concepts has a two-stage bootstrap: concepts are drawn with replacement,
and within each drawn concept its images (Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8);
that is a little too wide rather than too narrow. All questions about one image are drawn together, since they are not
independent, and so are the answers of two methods to one question: shares of the original model and differences of
methods are paired.

No bootstrap can draw what was never seen: where every answer is right, every draw is right, and the interval would be a
point. So an interval is never narrower than Wilson's for that mean on as many images as there are in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata
from statsmodels.stats.contingency_tables import mcnemar as _mcnemar
from statsmodels.stats.proportion import proportion_confint

from sauce_hooks.bank import Rate

DRAWS = 2_000
"""Bootstrap draws."""
NOTHING = Rate(float("nan"), 0, float("nan"), float("nan"))
"""The rate of no cases."""
EXACT_BELOW = 25
"""McNemar's test is the exact binomial one below so many discordant pairs."""


@dataclass(frozen=True)
class Counts:
    """What a metric of one erased concept was counted from, question by question: its value is Σ num / Σ den.

    Of a proportion num is 0 or 1 and den 1; den is 0 where an answer does not count, so that the questions of two methods
    stay in step. Of AUROC num is the yes/no margin, and den is 1 in images that hold the concept and 0 in others.
    """

    num: tuple[float, ...]
    den: tuple[float, ...]
    image: tuple[int, ...]
    """Which image each question is about, by its number in the probe set."""
    outcomes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType(dict[str, int]()))
    """How many answers were correct, wrong, a refusal, invalid."""

    @property
    def proportion(self) -> bool:
        """Whether this is a share of questions."""
        return set(self.num) <= {0, 1} and set(self.den) <= {0, 1}

    @property
    def n(self) -> float:
        """What the value is divided by; for a proportion, the number of questions that count."""
        return sum(self.den)

    @property
    def images(self) -> frozenset[int]:
        """The images that count."""
        return frozenset(i for i, den in zip(self.image, self.den, strict=True) if den)


# One rate. -----------------------------------------------------------------------------------------------------------


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion (Wilson 1927): good at 0 and 1 and for few cases, unlike p ± 1.96 s."""
    value = hits / n
    ends: Any = proportion_confint(hits, n, method="wilson")
    return min(value, float(ends[0])), max(value, float(ends[1]))  # rounding aside


def rate(hits: Iterable[bool]) -> Rate:
    """A proportion with its Wilson interval; NaN for no cases."""
    values = list(hits)
    return Rate(sum(values) / len(values), len(values), *wilson(sum(values), len(values))) if values else NOTHING


def ratio(counts: Counts, most: float = 1.0) -> Rate:
    """Σ num / Σ den: with Wilson's interval where it is a proportion, else that of resampling the images."""
    if not counts.n:
        return NOTHING
    if counts.proportion:
        return rate(bool(num) for num, den in zip(counts.num, counts.den, strict=True) if den)
    value = sum(counts.num) / counts.n
    low, high = _interval(ratio_draws(counts), value, len(counts.images), most)
    return Rate(value, round(counts.n), low, high)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> Rate:
    """P(margin of a positive > margin of a negative), ties counted half; interval after Hanley and McNeil (1982)."""
    n, m = len(positive), len(negative)
    if not n or not m or np.isnan([*positive, *negative]).any():
        return NOTHING
    ranks = rankdata([*positive, *negative])
    a = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    se = np.sqrt(max(0.0, a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m))
    # Perfect separation has no standard error: never narrower than a proportion's of as many as the fewer are.
    low, high = wilson(a * min(n, m), min(n, m))
    return Rate(a, n + m, float(max(0.0, min(low, a - 1.96 * se))), float(min(1.0, max(high, a + 1.96 * se))))


def harmonic_mean(values: Iterable[float]) -> float:
    """The number of figures over Σ 1/v, of those that are measured: 0 if any is 0, NaN if there are none."""
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return float("nan")
    return 0.0 if min(known) <= 0 else len(known) / sum(1 / value for value in known)


# The bootstrap's first stage: one concept, its images drawn. -----------------------------------------------------------


def _drawn_sums(
    image: Sequence[int], columns: Sequence[Sequence[float]], draws: int, seed: int
) -> Float[np.ndarray, "draws columns"]:
    """The columns' sums over images drawn with replacement.

    Images with equal sums are one kind. How many of each kind are drawn is multinomial, which is the same distribution as
    drawing the images one by one and takes time by kinds, not by images.
    """
    _, rows = np.unique(np.asarray(image), return_inverse=True)
    n_images = int(rows.max()) + 1
    sums = np.stack([np.bincount(rows, weights=column, minlength=n_images) for column in columns], 1)
    kinds, sizes = np.unique(sums, axis=0, return_counts=True)
    return np.random.default_rng(seed).multinomial(n_images, sizes / n_images, size=draws) @ kinds


def _divided(num: Float[np.ndarray, " draws"], den: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    return np.divide(num, den, out=np.full(len(num), np.nan), where=den > 0)


def ratio_draws(
    counts: Counts, base: Counts | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, " draws"]:
    """Σ num / Σ den of images drawn with replacement; as a share of the same of `base`, if given, over the same images."""
    if not counts.image:
        return np.full(draws, np.nan)
    more = () if base is None else (base.num, base.den)
    sums = _drawn_sums(counts.image, (counts.num, counts.den, *more), draws, seed)
    value = _divided(sums[:, 0], sums[:, 1])
    return value if base is None else _divided(value, _divided(sums[:, 2], sums[:, 3]))


def difference_draws(first: Counts, second: Counts, *, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, " draws"]:
    """The first's Σ num / Σ den minus the second's, over the same images, drawn with replacement."""
    if not first.image:
        return np.full(draws, np.nan)
    sums = _drawn_sums(first.image, (first.num, first.den, second.num, second.den), draws, seed)
    return _divided(sums[:, 0], sums[:, 1]) - _divided(sums[:, 2], sums[:, 3])


def auroc_draws(counts: Counts, *, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, " draws"]:
    """AUROC of images drawn with replacement, those that hold the concept and those that lack it apart."""
    margin, holds = np.asarray(counts.num), np.asarray(counts.den) > 0
    positive, negative = margin[holds], margin[~holds]
    if not len(positive) or not len(negative) or np.isnan(margin).any():
        return np.full(draws, np.nan)
    rng = np.random.default_rng(seed)
    times_p, times_n = (rng.multinomial(len(v), np.full(len(v), 1 / len(v)), size=draws) for v in (positive, negative))
    in_order = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    return np.einsum("dp,pn,dn->d", times_p, in_order, times_n, optimize=True) / (len(positive) * len(negative))


def rate_draws(found: Rate, *, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, " draws"]:
    """Where only a value and a number of cases are known: a binomial share, as if each case were an image."""
    if not found.n:
        return np.full(draws, np.nan)
    return np.random.default_rng(seed).binomial(found.n, min(1.0, max(0.0, found.value)), size=draws) / found.n


def harmonic_draws(parts: Sequence[Float[np.ndarray, " draws"]]) -> Float[np.ndarray, " draws"]:
    """`harmonic_mean` of draws of several figures, draw by draw."""
    table = np.stack(parts, 1)
    known = ~np.isnan(table)
    with np.errstate(divide="ignore"):
        inverse = np.where(known, 1 / np.maximum(table, 0), 0).sum(1)
        return np.where(known.any(1), known.sum(1) / inverse, np.nan)


# The second stage: concepts drawn. -------------------------------------------------------------------------------------


def concept_draws(
    inner: Sequence[Float[np.ndarray, " draws"]], *, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, " draws"]:
    """The mean over concepts drawn with replacement, each with its images drawn as in a row of its first stage."""
    if not inner:
        return np.full(draws, np.nan)
    table = np.stack(inner, 1)
    rng = np.random.default_rng(seed)
    which = rng.integers(0, table.shape[1], (draws, table.shape[1]))
    row = rng.integers(0, table.shape[0], (draws, table.shape[1]))  # a concept drawn twice has its images drawn twice
    return _row_means(table[row, which])


def _row_means(values: Float[np.ndarray, "draws concepts"]) -> Float[np.ndarray, " draws"]:
    known = ~np.isnan(values)
    n = known.sum(1)
    return np.where(n > 0, np.where(known, values, 0).sum(1) / np.maximum(n, 1), np.nan)


class Mean(NamedTuple):
    """A mean over concepts with its 95% interval."""

    value: float
    low: float
    high: float


def mean_over_concepts(
    values: Sequence[float],
    inner: Sequence[Float[np.ndarray, " draws"]],
    images: int,
    *,
    most: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
) -> Mean:
    """The mean of the concepts' values and the 95% interval of the two-stage bootstrap (percentiles).

    Args:
        values: each concept's value; NaN is left out.
        inner: each concept's draws from the first stage.
        images: images of all concepts together, each once: the interval is at least as wide as Wilson's for so many.
        most: the metric's greatest value, of which Wilson's interval takes a share.
        scale: what a share is divided by where values are shares of another model's: its mean.
        seed: of the draws.
    """
    value, drawn = _mean_and_draws(values, inner, seed)
    return Mean(value, *_interval(drawn, value, images, most / scale if scale else most))


def mean_difference(
    values: Sequence[float], inner: Sequence[Float[np.ndarray, " draws"]], images: int, *, seed: int = 0
) -> Mean:
    """The same of the differences of two methods. Where no answers differ, the interval is Wilson's of 0 of so many."""
    value, drawn = _mean_and_draws(values, inner, seed)
    if value != value:
        return Mean(value, value, value)
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    if high - low < 1e-9 and images:  # every draw is the same
        margin = wilson(0, images)[1]
        low, high = value - margin, value + margin
    return Mean(value, float(max(-1, min(low, value))), float(min(1, max(high, value))))


def _mean_and_draws(
    values: Sequence[float], inner: Sequence[Float[np.ndarray, " draws"]], seed: int
) -> tuple[float, Float[np.ndarray, " draws"]]:
    chosen = [i for i, value in enumerate(values) if not np.isnan(value)]
    value = float(np.mean([values[i] for i in chosen])) if chosen else float("nan")
    return value, concept_draws([inner[i] for i in chosen], seed=seed)


def _interval(drawn: Float[np.ndarray, " draws"], value: float, images: int, most: float) -> tuple[float, float]:
    """The percentiles, widened to contain the value and Wilson's interval of it on so many images."""
    if value != value:
        return value, value
    low, high = (value, value) if np.isnan(drawn).all() else np.nanpercentile(drawn, (2.5, 97.5))
    if images:
        least, greatest = (most * end for end in wilson(min(1.0, max(0.0, value / most)) * images, images))
        low, high = min(low, least), max(high, greatest)
    return float(min(low, value)), float(max(high, value))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float, float]:
    """The mean over concepts and the 95% interval of resampling the concepts alone: nothing is known of their images."""
    array: Float[np.ndarray, " concepts"] = np.asarray([v for v in values if not np.isnan(v)], dtype=np.float64)
    if not len(array):
        return float("nan"), float("nan"), float("nan")
    rows: Int[np.ndarray, "draws concepts"] = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.percentile(array[rows].mean(1), (2.5, 97.5))
    return float(array.mean()), float(low), float(high)


# Two methods. ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two methods' answers to the same questions, compared by McNemar's test."""

    metric: str
    first: str
    second: str
    both: int
    """Questions that both have right: hits of the metric."""
    only_first: int
    only_second: int
    neither: int
    p_value: float
    """McNemar's test: how likely discordant pairs so uneven are, if both methods were as good."""
    difference: Mean
    """First minus second, mean over concepts, with the interval of the paired two-stage bootstrap."""

    @property
    def n(self) -> int:
        """Questions."""
        return self.both + self.only_first + self.only_second + self.neither


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's test (McNemar 1947): exact below `EXACT_BELOW` discordant pairs, else χ² with correction.

    It takes the questions for independent. Several about one image, or of one concept, are not quite so: read it together
    with the interval of the difference, which draws concepts and images.
    """
    discordant = only_first + only_second
    found: Any = _mcnemar([[0, only_first], [only_second, 0]], exact=discordant < EXACT_BELOW, correction=True)
    return float(found.pvalue) if discordant else 1.0


DRAWN: Mapping[str, Callable[..., Float[np.ndarray, " draws"]]] = MappingProxyType({"AUROC": auroc_draws})
"""The first stage of the metrics that are no ratio of sums."""
