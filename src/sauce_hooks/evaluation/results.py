"""The table: every metric of every method and concept, with the original model's value and a 95% interval beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sauce_hooks.evaluation.answers import Answer
from sauce_hooks.evaluation.markdown import in_cell, markdown_table
from sauce_hooks.evaluation.metrics import FORGETTING, KEPT, METRICS, MOST, OUTCOMES, SHOWN, Rate
from sauce_hooks.evaluation.probes import PROTOCOL_VERSION
from sauce_hooks.evaluation.statistics import (
    DRAWN,
    Comparison,
    Counts,
    Mean,
    difference_draws,
    harmonic_draws,
    mcnemar,
    mean_difference,
    mean_over_concepts,
    rate_draws,
    ratio_draws,
)

if TYPE_CHECKING:
    import pandas as pd

ORIGINAL = "original model"
"""What the model without any erasure is called in every table."""
RELATIVE = ("IRA", "IRA_near", "CRA", "SRA", "SRA_d", "SRA_g")
"""Metrics that are read as a share of the original model's value."""
_NO_COUNTS: Mapping[str, Counts] = MappingProxyType({})


def _nothing() -> Mapping[Any, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Example:
    """One image with what each method said, for people to look at."""

    erased: str
    answer: Answer
    method: str


@dataclass(frozen=True)
class Results:
    """What an evaluation found."""

    scores: Mapping[tuple[str, str], Mapping[str, Rate]]
    """By (method, erased concept), then by metric. The original model is the method `ORIGINAL`."""
    domains: Mapping[str, tuple[str, ...]]
    examples: Sequence[Example] = field(default=())
    counts: Mapping[tuple[str, str], Mapping[str, Counts]] = field(default_factory=_nothing)
    """What each score was counted from, question by question; intervals of means and comparisons are made of it."""
    left_out: Mapping[str, str] = field(default_factory=_nothing)
    """Concepts that do not count in means, because the original model does not know them, and why."""
    failures: Mapping[tuple[str, str], str] = field(default_factory=_nothing)
    """By (method, concept), the error that a method failed with; there is no score then."""
    nearest: Mapping[str, str] = field(default_factory=_nothing)
    """The sibling that IRA_near is of."""
    notes: Sequence[str] = ()
    """What a reader of the table must know."""
    judge: str = "mentions"
    """Who decided whether a description names a concept."""
    protocol: int = PROTOCOL_VERSION

    @property
    def methods(self) -> list[str]:
        """Every method, the original model first."""
        return list(dict.fromkeys(method for method, _ in self.scores))

    @property
    def concepts(self) -> list[str]:
        """Every erased concept."""
        return list(dict.fromkeys(concept for _, concept in self.scores))

    def to_frame(self) -> pd.DataFrame:
        """One row a method, concept and metric.

        Columns: value, n, low, high; the original model's value; whether the concept counts in means (`eligible`); and,
        of the answers that the metric was counted from, how many were correct, wrong, a refusal and invalid. "Correct" is
        what the image shows: a model that forgets answers wrongly.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for (method, concept), rates in self.scores.items():
            domain = next(d for d, names in self.domains.items() if concept in names)
            counts = self.counts.get((method, concept), _NO_COUNTS)
            for metric, found in rates.items():
                original = self.scores[ORIGINAL, concept][metric].value
                outcomes = counts[metric].outcomes if metric in counts else {}
                rows.append(
                    {"method": method, "domain": domain, "concept": concept, "metric": metric, **asdict(found),
                     "original": original, "eligible": concept not in self.left_out,
                     **{outcome: outcomes.get(outcome) for outcome in OUTCOMES}}
                )  # fmt: skip
        return pd.DataFrame(rows).astype(dict.fromkeys(OUTCOMES, "Int64")) if rows else pd.DataFrame(rows)

    def eligible(self, method: str, concepts: Sequence[str] | None = None) -> list[str]:
        """The concepts that a mean of a method is over: known to the original model, and not failed at."""
        chosen = self.concepts if concepts is None else concepts
        return [c for c in chosen if c not in self.left_out and (method, c) in self.scores]

    def mean(self, method: str, metric: str, concepts: Sequence[str] | None = None, *, relative: bool = False) -> Mean:
        """The mean over the concepts that count, and its 95% interval: concepts and their images resampled.

        `relative` divides each concept's value by the original model's, for retention metrics; both are resampled together.
        """
        chosen = self.eligible(method, concepts)
        values = [self.scores[method, c][metric].value for c in chosen]
        base = [self.scores[ORIGINAL, c][metric].value for c in chosen]
        if relative:
            values = [v / b if b else float("nan") for v, b in zip(values, base, strict=True)]
        inner = [self._draws(method, c, metric, relative=relative) for c in chosen]
        measured = [b for b, v in zip(base, values, strict=True) if v == v]
        return mean_over_concepts(
            values,
            inner,
            self._images(method, chosen, metric),
            most=MOST.get(metric, 1.0),
            scale=float(np.mean(measured)) if relative and measured else 1.0,
        )

    def interval(self, method: str, concept: str, metric: str) -> tuple[float, float]:
        """The 95% interval of one concept's value that resampling its images gives."""
        value = self.scores[method, concept][metric].value
        drawn, images = self._draws(method, concept, metric), self._images(method, [concept], metric)
        return mean_over_concepts([value], [drawn], images, most=MOST.get(metric, 1.0))[1:]

    def _images(self, method: str, concepts: Sequence[str], metric: str) -> int:
        """How many images scores were counted from, those that several concepts share once.

        Of AUROC, the fewer of those with and without the concept.
        """
        shown: set[int] = set()
        more = 0
        for concept in concepts:
            counts = self.counts.get((method, concept), _NO_COUNTS).get("UA_d" if metric == "H" else metric)
            if counts is None:
                more += self.scores[method, concept][metric].n
            elif metric == "AUROC":
                more += int(min(counts.n, len(counts.den) - counts.n))
            else:
                shown |= counts.images
        return len(shown) + more

    def _draws(self, method: str, concept: str, metric: str, *, relative: bool = False) -> Float[np.ndarray, " draws"]:
        """A concept's value with its images resampled."""
        counts = self.counts.get((method, concept), _NO_COUNTS)
        if metric == "H" and counts:
            kept = [np.minimum(self._draws(method, concept, m, relative=True), 1) for m in KEPT]
            return harmonic_draws([*(self._draws(method, concept, m) for m in FORGETTING), *kept])
        seed = list(METRICS).index(metric)  # one for all methods, another for each metric
        if metric in DRAWN and metric in counts:
            return DRAWN[metric](counts[metric], seed=seed)
        original = self.counts.get((ORIGINAL, concept), _NO_COUNTS)
        if metric in counts and (not relative or metric in original):
            return ratio_draws(counts[metric], original[metric] if relative else None, seed=seed)
        value = rate_draws(self.scores[method, concept][metric], seed=seed)
        if not relative:
            return value * MOST.get(metric, 1.0)
        base = rate_draws(self.scores[ORIGINAL, concept][metric], seed=seed + len(METRICS))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(base > 0, value / base, np.nan)

    def compare(self, first: str, second: str, metric: str, concepts: Sequence[str] | None = None) -> Comparison:
        """Two methods' answers to the same questions: McNemar's test, and the difference of their means with its interval.

        Args:
            first: a method.
            second: another.
            metric: a share of questions, such as UA_d or IRA; of others there are no pairs.
            concepts: which erased concepts; all that count by default.

        Raises:
            ValueError: a method that was not evaluated, or a metric that is no share of questions.
        """
        for method in (first, second):
            if method not in self.methods:
                raise ValueError(f"no method {method!r} was evaluated; there are {', '.join(self.methods)}")
        chosen = [c for c in self.eligible(first, concepts) if c in self.eligible(second, concepts)]
        pairs = [(self._counted(first, c, metric), self._counted(second, c, metric)) for c in chosen]
        cells = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
        for a, b in pairs:
            for hit_a, den_a, hit_b, den_b in zip(a.num, a.den, b.num, b.den, strict=True):
                if den_a and den_b:
                    cells[bool(hit_a), bool(hit_b)] += 1
        values = [self.scores[first, c][metric].value - self.scores[second, c][metric].value for c in chosen]
        inner = [difference_draws(a, b, seed=i) for i, (a, b) in enumerate(pairs)]
        return Comparison(
            metric, first, second, cells[True, True], cells[True, False], cells[False, True], cells[False, False],
            mcnemar(cells[True, False], cells[False, True]),
            mean_difference(values, inner, self._images(first, chosen, metric)),
        )  # fmt: skip

    def _counted(self, method: str, concept: str, metric: str) -> Counts:
        counts = self.counts.get((method, concept), _NO_COUNTS).get(metric)
        if counts is None or not counts.proportion or metric in DRAWN:
            raise ValueError(f"{metric} of {method!r} is not counted question by question, so there is nothing to pair")
        return counts

    def summary(self, groups: Mapping[str, Sequence[str]] | None = None, *, metrics: Sequence[str] = SHOWN) -> pd.DataFrame:
        """Means over groups of concepts (one group of all by default), in percent, one row a group and method."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for group, members in (groups or {"all": self.concepts}).items():
            chosen = [c for c in self.concepts if c in members]
            for method in self.methods if chosen else ():
                n = len(self.eligible(method, chosen))
                said = f"{n}" if n == len(chosen) else f"{n} of {len(chosen)}"
                row: dict[str, Any] = {"concepts": f"{group} ({said})", "method": method}
                for metric in metrics:
                    relative = metric in RELATIVE and method != ORIGINAL
                    value, low, high = self.mean(method, metric, chosen, relative=relative)
                    measured = value == value
                    row[metric] = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]" if measured else "not measured"
                rows.append(row)
        return pd.DataFrame(rows)

    def remarks(self) -> list[str]:
        """What stands under a table: which concepts are left out and why, what failed, and who judged."""
        return [
            *(f"Left out of the means: {concept}: {reason}." for concept, reason in self.left_out.items()),
            *(f"Failed: {method}, {concept}: {error}" for (method, concept), error in self.failures.items()),
            *self.notes,
        ]

    def to_markdown(self, groups: Mapping[str, Sequence[str]] | None = None, *, metrics: Sequence[str] = SHOWN) -> str:
        """The summary as a Markdown table. Retention of a method is a share of the original model's. Remarks follow."""
        frame = self.summary(groups, metrics=metrics)
        table = markdown_table(list(frame.columns), frame.to_numpy().tolist())
        return "\n".join([table, *(f"\n{in_cell(remark)}" for remark in self.remarks())])

    def to_html(self, groups: Mapping[str, Sequence[str]] | None = None, *, metrics: Sequence[str] = SHOWN) -> str:
        """The summary as an HTML table, escaped, with the remarks under it."""
        table = self.summary(groups, metrics=metrics).to_html(index=False, border=0, classes="results", escape=True)
        return "\n".join([table, *(f'<p class="remark">{html.escape(remark)}</p>' for remark in self.remarks())])
