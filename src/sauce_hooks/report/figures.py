"""The numbers of a page: what an evaluation found, in percent, with what it was before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sauce_hooks.evaluation import METRICS, ORIGINAL, Rate, Results
from sauce_hooks.evaluation.results import RELATIVE

Aim = Literal["high", "low", "chance"]

AIMS: Mapping[str, Aim] = MappingProxyType(
    {
        "AUROC": "chance",
        "known": "chance",
        "POPE_yes": "chance",
        "CHAIR_i": "low",
        "CHAIR_s": "low",
        "refusal": "low",
        "invalid": "low",
    }
)
"""What a metric should be after an erasure, where that is not "high"."""
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "What is forgotten": ("UA_d", "UA_g", "AUROC"),
        "What is kept": ("IRA", "CRA", "SRA", "SRA_d", "SRA_g"),
        "How it answers": ("TNR", "invalid"),
    }
)
"""The metrics by what they ask; any that no group names follow in a last one."""


@dataclass(frozen=True)
class Figure:
    """A share in percent with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Rate | tuple[float, float, float]) -> Figure | None:
        """From a rate, or a mean and its interval; None if there was nothing to count."""
        value, low, high = (found.value, found.low, found.high) if isinstance(found, Rate) else found
        return None if math.isnan(value) else cls(100 * value, 100 * low, 100 * high)


@dataclass(frozen=True)
class MetricRow:
    """A metric of the original model and of the model that forgets."""

    name: str
    meaning: str
    aim: Aim
    before: Figure | None
    after: Figure | None
    kept: Figure | None
    """After as a share of before, for metrics of retention."""


def forgetting(results: Results) -> str:
    """The method the page is about: the first that is not the original model."""
    return next(method for method in results.methods if method != ORIGINAL)


def metric_rows(results: Results, concept: str | None = None) -> dict[str, list[MetricRow]]:
    """Every metric by group: of one erased concept, or the mean over all."""
    method = forgetting(results)

    def figure(method: str, metric: str) -> Figure | None:
        return Figure.of(results.mean(method, metric) if concept is None else results.scores[method, concept][metric])

    def row(metric: str) -> MetricRow:
        chosen = None if concept is None else [concept]
        return MetricRow(
            name=metric,
            meaning=METRICS[metric],
            aim=AIMS.get(metric, "high"),
            before=figure(ORIGINAL, metric),
            after=figure(method, metric),
            kept=Figure.of(results.mean(method, metric, chosen, relative=True)) if metric in RELATIVE else None,
        )

    grouped = {name: [row(m) for m in metrics if m in METRICS] for name, metrics in FAMILIES.items()}
    rest = [m for m in METRICS if not any(m in metrics for metrics in FAMILIES.values())]
    if rest:
        grouped["More"] = [row(m) for m in rest]
    return grouped
