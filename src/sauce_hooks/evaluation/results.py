"""The table: every metric of every method and concept, with the original model's value and a 95% interval beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sauce_hooks.evaluation.answers import Answer
from sauce_hooks.evaluation.metrics import METRICS, Rate, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

ORIGINAL = "original model"
RELATIVE = ("IRA", "CRA", "SRA", "SRA_d", "SRA_g")
"""Metrics that are read as a share of the original model's value."""


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

    @property
    def methods(self) -> list[str]:
        """Every method, the original model first."""
        return list(dict.fromkeys(method for method, _ in self.scores))

    @property
    def concepts(self) -> list[str]:
        """Every erased concept."""
        return list(dict.fromkeys(concept for _, concept in self.scores))

    def to_frame(self) -> pd.DataFrame:
        """One row a method, concept and metric: value, interval, number of cases, the original model's value."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for (method, concept), rates in self.scores.items():
            domain = next(d for d, names in self.domains.items() if concept in names)
            for metric, found in rates.items():
                original = self.scores[ORIGINAL, concept][metric].value
                rows.append(
                    {"method": method, "domain": domain, "concept": concept, "metric": metric, **asdict(found),
                     "original": original}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def mean(
        self, method: str, metric: str, concepts: Sequence[str] | None = None, *, relative: bool = False
    ) -> tuple[float, float, float]:
        """The mean over concepts and its 95% interval (concepts resampled).

        `relative` divides each concept's value by the original model's, for retention metrics.
        """
        chosen = self.concepts if concepts is None else concepts
        values = [self.scores[method, c][metric].value for c in chosen]
        if relative:
            base = [self.scores[ORIGINAL, c][metric].value for c in chosen]
            values = [v / b if b else float("nan") for v, b in zip(values, base, strict=True)]
        return bootstrap_mean(values)

    def summary(self, groups: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
        """Means over groups of concepts (one group of all by default), in percent, one row a group and method."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for group, members in (groups or {"all": self.concepts}).items():
            chosen = [c for c in self.concepts if c in members]
            for method in self.methods if chosen else ():
                row: dict[str, Any] = {"concepts": f"{group} ({len(chosen)})", "method": method}
                for metric in METRICS:
                    relative = metric in RELATIVE and method != ORIGINAL
                    value, low, high = self.mean(method, metric, chosen, relative=relative)
                    row[metric] = f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                rows.append(row)
        return pd.DataFrame(rows)

    def to_markdown(self, groups: Mapping[str, Sequence[str]] | None = None) -> str:
        """The summary as a Markdown table. Retention of a method is a share of the original model's."""
        frame = self.summary(groups)
        lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
        return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)

    def to_html(self, groups: Mapping[str, Sequence[str]] | None = None) -> str:
        """The summary as an HTML table, escaped."""
        return self.summary(groups).to_html(index=False, border=0, classes="results", escape=True)
