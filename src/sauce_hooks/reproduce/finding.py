"""What an experiment found: figures, a table, a picture, and of each claim whether it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sauce_hooks.bank import write_text_atomically
from sauce_hooks.evaluation.markdown import markdown_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OUTCOMES = {
    ("paper", True): "reproduced",
    ("paper", False): "not reproduced",
    ("goal", True): "reached",
    ("goal", False): "not reached",
}


@dataclass(frozen=True)
class Claim:
    """Something that is said, by the paper or as a goal of this library, and what was measured of it."""

    said: str
    source: str
    """Where it is from: a table or figure of the paper, or "goal"."""
    measured: str
    """The figures, with their intervals."""
    holds: bool | None
    """None: nothing could be measured."""
    kind: Literal["paper", "goal"] = "paper"

    @property
    def outcome(self) -> str:
        """In words."""
        return "not measured" if self.holds is None else OUTCOMES[self.kind, self.holds]


@dataclass(frozen=True)
class Finding:
    """One table or figure of the paper, made anew."""

    name: str
    """As on the command line: "table2"."""
    title: str
    lead: str
    """What was done, in a sentence or two."""
    table: pd.DataFrame
    """For people: figures with their intervals, as text."""
    data: pd.DataFrame
    """For programs: a row a figure."""
    draw: Callable[[], Figure] = field(repr=False)
    claims: Sequence[Claim] = ()
    remarks: Sequence[str] = ()

    def to_markdown(self) -> str:
        """The table, the claims and the remarks."""
        claims = [[c.said, c.source, c.measured, c.outcome] for c in self.claims]
        parts = [
            f"## {self.title}",
            self.lead,
            markdown_table(list(self.table.columns), self.table.to_numpy().tolist()),
            f"![{self.title}]({self.name}.png)",
            markdown_table(["claim", "from", "measured", "outcome"], claims) if claims else "",
            *self.remarks,
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, folder: Path) -> None:
        """`{name}.csv`, `.md`, `.png` and `.svg`, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / f"{self.name}.csv", self.data.to_csv(index=False))
        write_text_atomically(folder / f"{self.name}.md", self.to_markdown())
        figure = self.draw()
        for ending in ("png", "svg"):
            partial = folder / f".{self.name}.partial.{ending}"
            figure.savefig(partial, format=ending, dpi=150, metadata={"Date": None} if ending == "svg" else None)
            partial.replace(folder / f"{self.name}.{ending}")


def percent(mean: tuple[float, float, float]) -> str:
    """A mean and its interval, in percent."""
    value, low, high = (100 * number for number in mean)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]" if value == value else "–"


def points(value: float) -> str:
    """A difference of shares, in points."""
    if math.isnan(value):
        return "–"
    return f"{round(100 * value, 1) or 0.0:+.1f}".replace("-", "−").replace("+0.0", "0.0")


def held(*margins: float, strict: bool = False) -> bool | None:
    """Whether every margin is at least 0 (`strict`: above it); None if one of them could not be measured."""
    if any(map(math.isnan, margins)):
        return None
    return all(margin > 0 if strict else margin >= 0 for margin in margins)


def new_figure(columns: int, height: float = 3.4) -> tuple[Figure, Sequence[Any]]:
    """An empty figure of some panels side by side, that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, columns, squeeze=False, sharey=True)
    for panel in axes[0]:
        panel.set_ylim(0, 112)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    return figure, list(axes[0])


def bars(panel: Any, groups: Sequence[str], series: dict[str, Sequence[tuple[float, float, float]]]) -> None:
    """Grouped bars with 95% intervals; one series a colour, one group a place on the axis. Shares, drawn in percent."""
    width = 0.85 / max(1, len(series))
    for i, (name, means) in enumerate(series.items()):
        at = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        heights = [100 * value if value == value else 0.0 for value, _, _ in means]
        spread = [[max(0.0, 100 * (v - low)) for v, low, _ in means], [max(0.0, 100 * (high - v)) for v, _, high in means]]
        spread = [[0.0 if s != s else s for s in side] for side in spread]
        panel.bar(at, heights, width * 0.92, yerr=spread, label=name, error_kw={"elinewidth": 0.8, "alpha": 0.7})
    panel.set_xticks(range(len(groups)), groups)
