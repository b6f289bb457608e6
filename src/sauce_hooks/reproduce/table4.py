"""Table 4: an SAE of one model's tower, used in other models."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.errors import SAEMismatchError
from sauce_hooks.evaluation import Method, Results, evaluate
from sauce_hooks.evaluation.erasing import Erasing, Known
from sauce_hooks.reproduce.finding import Claim, Finding, bars, held, new_figure, percent, points
from sauce_hooks.reproduce.study import OURS, Relative, Study
from sauce_hooks.reproduce.table2 import mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("UA_g", "UA_d", "IRA", "CRA", "MME")
DROPPED = "SAUCE, error dropped"
"""As the paper edits: the SAE's reconstruction takes the place of everything the tower computed."""
LOST = 0.03
RUINED = 0.20
"""The paper loses 27 to 50 points in each column."""


def units(study: Study) -> list[tuple[str, ...]]:
    """One model and concept each; all of a model in turn, as loading one takes long."""
    return [(relative.name, concept) for relative in models(study) for concept in study.tasks["concrete"]]


def models(study: Study) -> list[Relative]:
    """The SAE's own model first."""
    return [Relative(study.name, "transfers", lambda: (study.model, study.processor)), *study.relatives]


def fill(study: Study, folder: Path, unit: tuple[str, ...]) -> None:
    """Erase one concept in one model."""
    name, concept = unit
    (relative,) = (relative for relative in models(study) if relative.name == name)
    measured(study, folder, relative, (concept,))


_loaded: dict[str, tuple[nn.Module, Any]] = {}
"""The last relative that this process used."""


def measured(study: Study, folder: Path, relative: Relative, concepts: tuple[str, ...]) -> Results:
    """What is finished is read, what is not is done."""
    if relative.name not in _loaded:
        _loaded.clear()
        _loaded[relative.name] = relative.load()
    model, processor = _loaded[relative.name]
    shown = study.probes(study.size.n, study.size.retained)
    if relative.wording is not None:
        shown = replace(shown, wording=relative.wording(processor))
    place = folder / f"answers-{[known.name for known in models(study)].index(relative.name)}"
    return evaluate(
        model,
        study.sae,
        shown,
        concepts,
        processor=processor,
        methods=_methods(study, model, allow_mismatch=relative.expected == "ruined"),
        judge=study.judge,
        out=place,
        batch_size=study.batch_size,
        progress=False,
    )


def _methods(study: Study, model: nn.Module, *, allow_mismatch: bool) -> dict[str, Method]:
    settings = {**Erasing(model, study.sae).settings, "allow_mismatch": allow_mismatch}

    def erasing(preserve_error: bool) -> Method:
        def make(concept: str) -> AbstractContextManager[Any]:
            return ConceptEraser(
                model,
                study.sae,
                [concept],
                allow_mismatch=allow_mismatch,
                allow_bypass=study.allow_bypass,
                preserve_error=preserve_error,
            )

        return Known(make, {**settings, "preserve_error": preserve_error})

    return {OURS: erasing(True), DROPPED: erasing(False)}


def read(study: Study, folder: Path) -> Finding:
    """The table, once every unit is filled."""
    import pandas as pd

    concepts = study.tasks["concrete"]
    found = {relative.name: measured(study, folder, relative, concepts) for relative in models(study)}
    rows = [
        {"model": name, "method": method} | {metric: percent(mean(results, method, metric)) for metric in COLUMNS}
        for name, results in found.items()
        for method in results.methods
    ]
    data = pd.concat([results.to_frame().assign(model=name) for name, results in found.items()])
    return Finding(
        "table4",
        "Table 4: the same SAE in other models",
        f"The SAE and the concepts of {study.name}, used in models around the same tower and another one; "
        f"{len(concepts)} concrete concepts, {study.size.n} test images with each. IRA, CRA and MME are shares of what "
        "the same model has without any erasure.",
        pd.DataFrame(rows),
        data,
        lambda: _drawn(found),
        _claims(study, found),
        [f"{name}: {remark}" for name, results in found.items() for remark in results.remarks()],
    )


def _claims(study: Study, found: dict[str, Results]) -> list[Claim]:
    own = found[study.name]
    claims: list[Claim] = []
    for relative in study.relatives:
        results = found[relative.name]

        def change(method: str, results: Results = results) -> dict[str, float]:
            return {metric: mean(results, method, metric)[0] - mean(own, method, metric)[0] for metric in COLUMNS}

        ours, dropped = change(OURS), change(DROPPED)
        said = ", ".join(f"{metric} {points(value)}" for metric, value in ours.items())
        if relative.expected == "transfers":
            lost = -float(np.mean(list(ours.values())))
            claims.append(
                Claim(
                    f"{relative.name}: the same tower under a larger language model loses at most {100 * LOST:.0f} points "
                    "in the mean of the five columns",
                    "Table 4",
                    f"{said}; mean {points(-lost)}",
                    held(LOST - lost),
                )
            )
            continue
        refused = refusal(study, relative)
        claims.append(
            Claim(
                f"{relative.name}: another resolution is refused unless asked for",
                "Table 4",
                refused or "it was not refused",
                refused is not None,
                "goal",
            )
        )
        for method, by in ((OURS, ours), (DROPPED, dropped)):
            claims.append(
                Claim(
                    f"{relative.name}: another resolution ruins it, by {100 * RUINED:.0f} points or more in the mean of the "
                    f"five columns ({method})",
                    "Table 4",
                    ", ".join(f"{metric} {points(value)}" for metric, value in by.items())
                    + f"; mean {points(float(np.mean(list(by.values()))))}",
                    held(-RUINED - float(np.mean(list(by.values())))),
                )
            )
    return claims


def refusal(study: Study, relative: Relative) -> str | None:
    """What an eraser says that is put on this model without more ado; None if it is taken."""
    model, _ = _loaded.get(relative.name) or relative.load()
    try:
        ConceptEraser(model, study.sae, [study.tasks["concrete"][0]])
    except SAEMismatchError as problem:
        return f"{type(problem).__name__}: {str(problem).split('. ')[0]}"
    return None


def _drawn(found: dict[str, Results]) -> Figure:
    figure, panels = new_figure(2, 3.8)
    for panel, method in zip(panels, (OURS, DROPPED), strict=True):
        bars(
            panel, COLUMNS, {name: [mean(results, method, metric) for metric in COLUMNS] for name, results in found.items()}
        )
        panel.set_title(method)
    panels[0].set_ylabel("percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
