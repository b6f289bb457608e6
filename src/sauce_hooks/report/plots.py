"""Plots as plain data: two sets of images on one axis, ROC curves, forgetting against what stays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Float

from sauce_hooks.bank import CurvePoint, Rate
from sauce_hooks.evaluation import METRICS
from sauce_hooks.evaluation.metrics import auroc
from sauce_hooks.report.figures import FAMILIES, Figure
from sauce_hooks.report.rendering import figure_text, number, short

_BINS = 32

Values = Float[np.ndarray, "_"]
"""One of each image of a set."""


@dataclass(frozen=True)
class MirrorBar:
    """One bin, as shares of the two sets."""

    low: float
    high: float
    positive: float
    negative: float


@dataclass(frozen=True)
class Mirror:
    """How a value above 0 is distributed over two sets of images."""

    bars: tuple[MirrorBar, ...]
    zero_positive: float
    """Share of the images at 0, which have no bar."""
    zero_negative: float

    @property
    def tallest(self) -> float:
        """The largest share."""
        return max((max(bar.positive, bar.negative) for bar in self.bars), default=0.0)

    @property
    def largest(self) -> float:
        """The end of the axis."""
        return self.bars[-1].high if self.bars else 0.0


def mirror(positive: Values, negative: Values) -> Mirror:
    """Two histograms on one axis; values at 0 are counted apart, for they would dwarf all others."""
    largest = float(max(positive.max(), negative.max()))
    zeros = float((positive == 0).mean()), float((negative == 0).mean())
    if largest <= 0:
        return Mirror((), *zeros)
    (over, edges), (under, _) = (np.histogram(v[v > 0], _BINS, (0, largest)) for v in (positive, negative))
    bars = zip(edges[:-1], edges[1:], over / len(positive), under / len(negative), strict=True)
    return Mirror(tuple(MirrorBar(*map(float, bar)) for bar in bars), *zeros)


@dataclass(frozen=True)
class RocPoint:
    """What a threshold catches: shares of the two sets at or above it."""

    threshold: float
    positive: float
    negative: float


@dataclass(frozen=True)
class Roc:
    """How well a value tells images with a concept from images without it."""

    name: str
    meaning: str
    area: Rate
    points: tuple[RocPoint, ...]
    marked: tuple[RocPoint, ...]
    """Those with a text of their own."""
    spread: Mirror
    means: tuple[float, float]
    """With, without."""


def roc(name: str, meaning: str, positive: Values, negative: Values) -> Roc:
    """Every threshold, from the strictest on."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    over, under = (1 - np.searchsorted(np.sort(v), thresholds) / len(v) for v in (positive, negative))
    points = [RocPoint(math.inf, 0.0, 0.0)]
    points += [RocPoint(float(t), float(p), float(n)) for t, p, n in zip(thresholds, over, under, strict=True)]
    limits = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5)
    marked = [max((p for p in points if p.negative <= limit), key=lambda p: p.positive) for limit in limits]
    return Roc(
        name,
        meaning,
        auroc(positive.tolist(), negative.tolist()),
        tuple(points),
        tuple(dict.fromkeys(p for p in marked if math.isfinite(p.threshold))),
        mirror(positive, negative),
        (float(positive.mean()), float(negative.mean())),
    )


@dataclass(frozen=True)
class Tried:
    """One setting on a curve, in percent, with what it says when pointed at."""

    forgotten: float
    kept: float
    label: str
    chosen: bool


@dataclass(frozen=True)
class Tradeoff:
    """Forgetting against one metric of what stays."""

    metric: str
    meaning: str
    points: tuple[Tried, ...]
    lines: tuple[tuple[Tried, ...], ...]
    """Settings that differ in γ alone, by γ."""
    original: Figure | None
    low: tuple[float, float]
    """Where the axes begin: forgetting, keeping. Both end at 100."""


def forgotten(figures: Mapping[str, Rate]) -> float:
    """UA in percent: the smaller of UA_d and UA_g, for what is forgotten in one form only is not; NaN if unknown."""
    values = [figures[name].value for name in ("UA_d", "UA_g") if name in figures]
    return 100 * min(values) if values else math.nan


def tradeoff(metric: str, curve: Sequence[CurvePoint], original: Mapping[str, Rate]) -> Tradeoff | None:
    """A metric of retention against forgetting over all settings that were tried; None if none tells both."""

    def tried(point: CurvePoint) -> Tried | None:
        kept = 100 * point.figures[metric].value if metric in point.figures else math.nan
        x = forgotten(point.figures)
        known = math.isfinite(x) and math.isfinite(kept)
        return Tried(x, kept, setting(point), point.chosen) if known else None

    by_gamma = sorted(curve, key=lambda p: (p.edit, p.k, p.gamma))
    lines = [[tried(p) for p in group] for _, group in groupby(by_gamma, key=lambda p: (p.edit, p.k))]
    known = [tuple(point for point in line if point is not None) for line in lines]
    points = [point for line in known for point in line]
    if not points:
        return None
    before = Figure.of(original[metric]) if metric in original else None
    heights = [p.kept for p in points] + ([before.value] if before else [])

    def start(values: Iterable[float]) -> float:
        return max(0.0, min(90.0, 10.0 * math.floor(min(values) / 10)))

    return Tradeoff(
        metric,
        METRICS.get(metric, ""),
        tuple(sorted(points, key=lambda p: p.chosen)),  # the chosen one on top
        tuple(line for line in known if len(line) > 1),
        before,
        (start(p.forgotten for p in points), start(heights)),
    )


def setting(point: CurvePoint) -> str:
    """A setting and its figures, in one line."""
    figures = ", ".join(f"{name} {figure_text(found)}" for name, found in ordered(point.figures) if _known(found))
    return f"k = {point.k}, γ = {number(point.gamma)}, {short(point.edit)}: {figures}"


def ordered(figures: Mapping[str, Rate]) -> list[tuple[str, Rate]]:
    """Figures in the order of a page: what is forgotten, what is kept, the rest."""
    order = [name for names in FAMILIES.values() for name in names]
    return sorted(figures.items(), key=lambda f: order.index(f[0]) if f[0] in order else len(order))


def _known(found: Rate) -> bool:
    return all(math.isfinite(value) for value in (found.value, found.low, found.high))
