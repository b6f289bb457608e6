"""Table 2: forgetting and utility of SAUCE and its rivals, on concrete and on abstract concepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sauce_hooks.evaluation import ORIGINAL, Results, evaluate
from sauce_hooks.reproduce.finding import Claim, Finding, bars, held, new_figure, percent, points
from sauce_hooks.reproduce.study import OURS, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_RIVALS = ("GA", "GD", "KL", "PO")
"""The paper's Table 2 compares SAUCE with these."""
SHARES = ("IRA", "CRA", "SRA", "MME")
"""Given as shares of the original model's value."""
COLUMNS = ("UA_g", "UA_d", "IRA", "CRA", "MME", "SRA", "TNR", "H")
"""The paper's five, and what goes past it."""
GOALS = {
    "concrete": {"UA_d": 0.95, "UA_g": 0.93, "IRA": 0.95, "CRA": 0.97, "SRA": 0.90},
    "abstract": {"UA_d": 0.92, "UA_g": 0.90, "IRA": 0.90, "CRA": 0.93, "SRA": 0.85},
}
"""What this library aims at on the bundled world."""


def units(study: Study) -> list[tuple[str, ...]]:
    """One concept each."""
    return [(concept,) for concept in study.concepts]


def fill(study: Study, folder: Path, unit: tuple[str, ...]) -> None:
    """Erase one concept by every method."""
    measured(study, folder, unit)


def measured(study: Study, folder: Path, concepts: Sequence[str]) -> Results:
    """What is finished is read, what is not is done."""
    return evaluate(
        study.model,
        study.sae,
        study.probes(study.size.n, study.size.retained),
        concepts,
        processor=study.processor,
        methods=study.methods(),
        judge=study.judge,
        out=folder / "answers",
        batch_size=study.batch_size,
        progress=False,
    )


def read(study: Study, folder: Path) -> Finding:
    """The table, once every unit is filled."""
    results = measured(study, folder, study.concepts)
    return Finding(
        "table2",
        "Table 2: forgetting and utility",
        f"{len(study.concepts)} concepts of {study.name}, erased one at a time by every method; "
        f"{study.size.n} test images with each. IRA, CRA, MME and SRA are shares of the original model's value.",
        results_table(results, study, COLUMNS),
        results.to_frame(),
        lambda: _drawn(results, study),
        [*paper_claims(results), *goals(results, study)],
        results.remarks(),
    )


def mean(results: Results, method: str, metric: str, concepts: Sequence[str] | None = None) -> tuple[float, float, float]:
    """As the table gives it."""
    relative = metric in SHARES and method != ORIGINAL
    return tuple(results.mean(method, metric, concepts, relative=relative))  # pyright: ignore[reportReturnType]


def results_table(results: Results, study: Study, metrics: Sequence[str]) -> Any:
    """A row a task and method."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"concepts": f"{task} ({len(results.eligible(method, names))})", "method": method}
            | {metric: percent(mean(results, method, metric, names)) for metric in metrics}
            for task, names in study.tasks.items()
            for method in results.methods
        ]
    )


def forgetting(results: Results, method: str, concepts: Sequence[str] | None = None) -> float:
    """(UA_g + UA_d) / 2."""
    return float(np.mean([mean(results, method, metric, concepts)[0] for metric in ("UA_g", "UA_d")]))


def paper_claims(results: Results) -> list[Claim]:
    """Section 5.3: SAUCE leads; GA and GD fall behind KL and PO on IRA."""
    rivals = [method for method in PAPER_RIVALS if method in results.methods]
    if OURS not in results.methods or not rivals:
        return [
            Claim("SAUCE is first on mean UA and mean IRA", "Table 2", "its rivals were not run", None),
            Claim("GA and GD are clearly under KL and PO on IRA", "Table 2", "they were not run", None),
        ]
    claims: list[Claim] = []
    ours = forgetting(results, OURS)
    best = max(rivals, key=lambda method: forgetting(results, method))
    apart = [results.compare(OURS, best, metric) for metric in ("UA_g", "UA_d")]
    claims.append(
        Claim(
            "SAUCE is first on mean UA",
            "Table 2",
            f"(UA_g + UA_d) / 2: SAUCE {100 * ours:.1f}, next {best} {100 * forgetting(results, best):.1f}; "
            + ", ".join(f"{c.metric} {_difference(c.difference)}" for c in apart),
            held(ours - forgetting(results, best), strict=True),
        )
    )
    best = max(rivals, key=lambda method: mean(results, method, "IRA")[0])
    claims.append(
        Claim(
            "SAUCE is first on mean IRA",
            "Table 2",
            f"SAUCE {percent(mean(results, OURS, 'IRA'))}, next {best} {percent(mean(results, best, 'IRA'))}; "
            f"IRA {_difference(results.compare(OURS, best, 'IRA').difference)}",
            held(mean(results, OURS, "IRA")[0] - mean(results, best, "IRA")[0], strict=True),
        )
    )
    if set(PAPER_RIVALS) <= set(rivals):
        pairs = [results.compare(low, high, "IRA").difference for low in ("GA", "GD") for high in ("KL", "PO")]
        claims.append(
            Claim(
                "GA and GD are clearly under KL and PO on IRA (each of the four differences below 0 with its interval)",
                "Table 2",
                ", ".join(f"{method} {percent(mean(results, method, 'IRA'))}" for method in PAPER_RIVALS),
                held(*(-pair.high for pair in pairs), strict=True),
            )
        )
    return claims


def _difference(found: Any) -> str:
    return f"{points(found.value)} [{points(found.low)}, {points(found.high)}]"


def goals(results: Results, study: Study) -> list[Claim]:
    """The library's own."""
    claims: list[Claim] = []
    for task, names in study.tasks.items():
        found = {metric: mean(results, OURS, metric, names) for metric in GOALS[task]}
        asked = ", ".join(f"{metric} {100 * least:.0f}" for metric, least in GOALS[task].items())
        claims.append(
            Claim(
                f"{task} concepts reach {asked}",
                "goal",
                ", ".join(f"{metric} {percent(value)}" for metric, value in found.items()),
                held(*(found[metric][0] - least for metric, least in GOALS[task].items())),
                "goal",
            )
        )
    return claims


def _drawn(results: Results, study: Study) -> Figure:
    metrics = COLUMNS[:5]
    figure, panels = new_figure(len(study.tasks), 3.8)
    for panel, (task, names) in zip(panels, study.tasks.items(), strict=True):
        shown = [method for method in (*PAPER_RIVALS, OURS) if method in results.methods]
        bars(panel, metrics, {method: [mean(results, method, metric, names) for metric in metrics] for method in shown})
        panel.set_title(f"{task} concepts")
    panels[0].set_ylabel("percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure
