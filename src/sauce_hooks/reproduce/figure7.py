"""Figure 7: what attacks cost each method, and the bounds that this library sets itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sauce_hooks.bank import Rate, write_text_atomically
from sauce_hooks.errors import ResumeError
from sauce_hooks.evaluation import ORIGINAL, Method
from sauce_hooks.evaluation.attacks import Attacked, Leak, run_attacks
from sauce_hooks.evaluation.erasing import Erasing
from sauce_hooks.evaluation.run import known_by
from sauce_hooks.evaluation.store import Store, settings_of, slug
from sauce_hooks.reproduce.finding import Claim, Finding, bars, new_figure, percent, points
from sauce_hooks.reproduce.study import OURS, Study
from sauce_hooks.reproduce.table2 import PAPER_RIVALS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = ("second language", "quantisation")
"""The paper's two attacks, that every method stands."""
OURS_ALONE = ("paraphrases", "adversarial images")
"""Ours, for the bounds; they take too long for all."""
SHOWN = {"second language": "", "quantisation": "4 bit, tower too"}
"""The setting that is drawn and compared, by how it begins."""


def units(study: Study) -> list[tuple[str, ...]]:
    """One attack on one concept each, the longest first."""
    concrete = study.tasks["concrete"]
    spread = concrete[:: max(1, len(concrete) // study.size.attacked)][: study.size.attacked]
    few = spread[:: max(1, len(spread) // study.size.perturbed)][: study.size.perturbed]
    known = study.attacks() if study.attacks is not None else {}
    return [
        (attack, concept)
        for attack in (*reversed(OURS_ALONE), *COMPARED)
        if attack in known
        for concept in (few if attack == "adversarial images" else spread)
    ]


def fill(study: Study, folder: Path, unit: tuple[str, ...]) -> None:
    """One attack on one concept, every method that stands it."""
    path = _part(folder, unit)
    _settled(study, folder)
    if path.is_file():
        return
    attack, concept = unit
    assert study.attacks is not None
    n = study.size.perturbed_n if attack == "adversarial images" else study.size.attack_n
    probes = study.attack_probes((concept,), n) if study.attack_probes else study.probes(n, 0)
    attacked = run_attacks(
        study.model,
        probes,
        (concept,),
        processor=study.processor,
        methods=_methods(study, attack),
        attacks=[study.attacks()[attack]],
        training=study.training((concept,)) if study.training else None,
        batch_size=study.batch_size,
        progress=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps([asdict(leak) for leak in attacked.leaks]))


def _settled(study: Study, folder: Path) -> None:
    """The folder is of this study, or it says what differs."""
    size = {name: value for name, value in asdict(study.size).items() if name.startswith(("attack", "perturb"))}
    shown = study.probes(0, 0)
    judge = study.judge.name if study.judge else "mentions"
    settings = {**settings_of(study.model, shown, judge), "size": size}
    Store(folder, {**settings, "methods": {name: known_by(method) for name, method in _all(study).items()}})


def _all(study: Study) -> dict[str, Method]:
    """The methods of the paper's figure. Those that only ask in other words have nothing that could be attacked."""
    every = {OURS: Erasing(study.model, study.sae, study.allow_bypass), **study.methods()}
    return {name: every[name] for name in (*PAPER_RIVALS, OURS) if name in every}


def _methods(study: Study, attack: str) -> dict[str, Method]:
    every = _all(study)
    return every if attack in COMPARED else {OURS: every[OURS]}


def _part(folder: Path, unit: tuple[str, ...]) -> Path:
    attack, concept = unit
    return folder / "parts" / slug(attack) / f"{slug(concept)}.json"


def _leaks(path: Path) -> list[Leak]:
    try:
        return [
            Leak(
                str(leak["attack"]),
                str(leak["setting"]),
                str(leak["method"]),
                str(leak["concept"]),
                {str(figure): Rate(**rate) for figure, rate in leak["rates"].items()},
            )
            for leak in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ResumeError(f"{path} is no finished part of the attacks ({problem!r}): remove it to have it anew") from problem


def read(study: Study, folder: Path) -> Finding:
    """The figure, once every unit is filled."""
    import pandas as pd

    _settled(study, folder)
    attacked = Attacked([leak for unit in units(study) for leak in _leaks(_part(folder, unit))])
    settings = dict.fromkeys((leak.attack, leak.setting) for leak in attacked.leaks)
    # Of phrasings, the worst is what counts.
    shown = [(attack, setting) for attack, setting in settings if attack != "paraphrases" or setting.startswith("worst")]
    rows = [
        {"attack": attack, "setting": setting, "method": method}
        | {figure: percent(attacked.mean(attack, setting, method, figure)) for figure in _FIGURES}
        for attack, setting in shown
        for method in attacked.methods
        if any((leak.attack, leak.setting, leak.method) == (attack, setting, method) for leak in attacked.leaks)
    ]
    size = study.size
    return Finding(
        "figure7",
        "Figure 7: attacks",
        f"Concrete concepts of {study.name} under attack. Asked in another language and rounded to 4 bits: every method on "
        f"{size.attacked} concepts, {size.attack_n} test images with each and as many without. Paraphrases: SAUCE on the "
        f"same. Adversarial images (PGD through the eraser, 8/255): SAUCE on {size.perturbed} concepts, {size.perturbed_n} "
        "images with each and without. Intervals are over concepts.",
        pd.DataFrame(rows),
        attacked.to_frame(),
        lambda: _drawn(attacked),
        [_least(attacked), *_bounds(attacked)],
    )


_FIGURES = ("UA_d before", "UA_d", "UA_g before", "UA_g", "recovered_d", "forged_d")


def _losses(attacked: Attacked, method: str) -> dict[str, float]:
    """Points of UA_d that each of the paper's attacks costs."""
    found: dict[str, float] = {}
    for attack, setting in _drawn_settings(attacked).items():
        before, after = (attacked.mean(attack, setting, method, name)[0] for name in ("UA_d before", "UA_d"))
        found[attack] = before - after
    return found


def _drawn_settings(attacked: Attacked) -> dict[str, str]:
    return {
        leak.attack: leak.setting
        for leak in reversed(attacked.leaks)
        if leak.attack in SHOWN and leak.setting.startswith(SHOWN[leak.attack])
    }


def _least(attacked: Attacked) -> Claim:
    """Section 5.4: SAUCE, GA and GD lose 5% and KL and PO 10%; "SAUCE remains relatively robust"."""
    methods = [name for name in attacked.methods if name != ORIGINAL]
    lost = {method: _losses(attacked, method) for method in methods}
    measured = [attack for attack in SHOWN if all(attack in by for by in lost.values())]
    said = "; ".join(
        f"{attack}: " + ", ".join(f"{method} {points(-by[attack])}" for method, by in lost.items()) for attack in measured
    )
    cost = {
        method: {attack: max(0.0, by[attack]) for attack in measured} for method, by in lost.items()
    }  # a gain costs nothing
    least = [all(cost[OURS][attack] <= by[attack] for attack in measured) for method, by in cost.items() if method != OURS]
    return Claim(
        "attacks cost SAUCE the least UA_d, of all methods and in either attack",
        "Figure 7",
        said or "not measured",
        all(least) if measured and least else None,
    )


def _bounds(attacked: Attacked) -> list[Claim]:
    return [
        Claim(str(goal["goal"]), "goal", str(goal["measured"]), goal["reached"] == "reached", "goal")
        for goal in attacked.goals()
        if goal["method"] == OURS
    ]


def _drawn(attacked: Attacked) -> Figure:
    figure, panels = new_figure(1, 3.8)
    methods = [method for method in attacked.methods if method != ORIGINAL]
    settings = _drawn_settings(attacked)
    series: dict[str, Any] = {}
    for attack, setting in settings.items():
        series.setdefault("as asked", [attacked.mean(attack, setting, method, "UA_d before") for method in methods])
        series[f"{attack} ({setting})"] = [attacked.mean(attack, setting, method, "UA_d") for method in methods]
    bars(panels[0], methods, series)
    panels[0].set_ylabel("UA_d, percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure
