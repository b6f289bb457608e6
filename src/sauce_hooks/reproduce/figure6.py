"""Figure 6: many concepts at once. Forgetting and utility as more and more erasers are merged.

For every size the same concepts are erased, in groups of that size that share none, and the same other concepts are asked
for: so what differs between sizes is merging alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.evaluation import ORIGINAL, Results, ask, prepare
from sauce_hooks.evaluation.erasing import Erasing
from sauce_hooks.evaluation.metrics import count
from sauce_hooks.evaluation.probes import ProbeSet, WholeWords, other_questions, own_questions, pope_questions
from sauce_hooks.evaluation.store import Finished, Store, settings_of
from sauce_hooks.hookpoint import evaluating
from sauce_hooks.reproduce.finding import Claim, Finding, held, new_figure, percent, points
from sauce_hooks.reproduce.study import Study, Task
from sauce_hooks.reproduce.table2 import mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNLEARNING, UTILITY = ("UA_g", "UA_d"), ("IRA", "CRA", "MME")
"""The figure's two scores are the means of these (section 5.4)."""
METRICS = (*UNLEARNING, *UTILITY)
COST = 0.05
UNLEARNING_LOST = 0.01
"""What "no unlearning is lost" allows, in the mean of UA_g and UA_d."""


def groups(tasks: Mapping[Task, tuple[str, ...]], size: int) -> list[tuple[str, ...]]:
    """Every concept once, in groups of a size: within a task if that comes out even, else of both.

    A group has concepts of all domains of its task, as far as there are.

    Raises:
        ValueError: the concepts do not come out even.
    """
    within = all(len(names) % size == 0 for names in tasks.values())
    pools = list(tasks.values()) if within else [sum(tasks.values(), ())]
    if any(len(pool) % size for pool in pools):
        raise ValueError(f"groups of {size} do not come out even over {[len(pool) for pool in pools]} concepts")
    return [pool[i :: len(pool) // size] for pool in pools for i in range(len(pool) // size)]


def erased(study: Study) -> dict[Task, tuple[str, ...]]:
    """The first concepts of each task, as many of each, so that every size comes out even.

    Raises:
        ValueError: there are too few for any number of them to.
    """
    for n in range(min(map(len, study.tasks.values())), 0, -1):
        if all(n % size == 0 or (n * len(study.tasks)) % size == 0 for size in study.size.merged):
            return {task: names[:n] for task, names in study.tasks.items()}
    counted = ", ".join(f"{len(names)} {task}" for task, names in study.tasks.items())
    raise ValueError(f"groups of {', '.join(map(str, study.size.merged))} do not come out even over {counted} concepts")


def called(size: int) -> str:
    """The method of a size."""
    return f"{size} at once"


def units(study: Study) -> list[tuple[str, ...]]:
    """One group of one size each, the largest first; no size is the original model."""
    tasks = erased(study)
    every = [(str(size), *group) for size in sorted(study.size.merged, reverse=True) for group in groups(tasks, size)]
    return [("0", *sum(tasks.values(), ())), *every]


def fill(study: Study, folder: Path, unit: tuple[str, ...]) -> None:
    """Erase one group at once, and ask about each of its concepts and about all that are never erased."""
    size, group = int(unit[0]), unit[1:]
    method = called(size) if size else ORIGINAL
    store, probes = _store(study, folder)
    missing = [concept for concept in group if store.load(method, concept, list(group)) is None]
    if not missing:
        return
    judge = study.judge or WholeWords(probes.wording)
    with evaluating(study.model), _erasing(study, group) if size else nullcontext():
        others = _answers(study, probes, [*other_questions(probes), *pope_questions(probes)])
        for concept in missing:
            asked = [q for q in own_questions(probes, concept) if q.concept in (None, concept)]
            own = _answers(study, probes, asked)
            scored = count(concept, own, others, probes, judge=judge)
            texts = [a.text for a in own if a.question.kind == "describe"]
            store.save(method, concept, list(group), Finished(scored.rates, scored.counts, None, texts))


def _erasing(study: Study, group: tuple[str, ...]) -> ConceptEraser:
    return ConceptEraser(study.model, study.sae, group, allow_bypass=study.allow_bypass)


def _answers(study: Study, probes: ProbeSet, questions: Any) -> list[Any]:
    batches = prepare(questions, probes.wording, study.processor, study.batch_size)
    return list(ask(study.model, batches, probes.wording, study.processor))


def _store(study: Study, folder: Path) -> tuple[Store, ProbeSet]:
    """The images of concepts that are never erased are asked about, whatever else they hold."""
    probes = study.probes(study.size.n, study.size.retained)
    gone = sum(erased(study).values(), ())
    kept = {concept: some for concept, some in probes.retained.items() if concept not in gone}
    shown = replace(probes, retained=kept)
    judge = study.judge or WholeWords(shown.wording)
    settings = {**settings_of(study.model, shown, judge.name), "erasers": Erasing(study.model, study.sae).settings}
    return Store(folder / "answers", settings), shown


def read(study: Study, folder: Path) -> Finding:
    """The figure, once every unit is filled."""
    import pandas as pd

    store, probes = _store(study, folder)
    done: dict[tuple[str, str], Finished] = {}
    for unit in units(study):
        method = called(int(unit[0])) if int(unit[0]) else ORIGINAL
        for concept in unit[1:]:
            found = store.load(method, concept, list(unit[1:]))
            assert found is not None, f"{unit} is not filled"
            done[method, concept] = found
    order = [ORIGINAL, *(called(size) for size in sorted(study.size.merged))]
    keys = sorted(done, key=lambda key: order.index(key[0]))
    results = Results({key: done[key].rates for key in keys}, probes.domains, counts={key: done[key].counts for key in keys})
    rows = [
        {"concepts": f"{task} ({len(names)})", "erased": method}
        | {metric: percent(mean(results, method, metric, names)) for metric in METRICS}
        | {"unlearning score": _score(results, method, UNLEARNING, names), "utility score": _utility(results, method, names)}
        for task, names in erased(study).items()
        for method in order
    ]
    frame = pd.DataFrame(rows)
    for column in ("unlearning score", "utility score"):
        frame[column] = [f"{100 * value:.1f}" for value in frame[column]]
    n_erased = sum(map(len, erased(study).values()))
    return Finding(
        "figure6",
        "Figure 6: many concepts at once",
        f"{n_erased} concepts of {study.name}, in groups of {', '.join(map(str, sorted(study.size.merged)))} "
        "erased at once: every concept in exactly one group of each size. Utility is asked of the "
        f"{len(probes.concepts) - n_erased} concepts that no group holds, in all their images, also in those that hold "
        "an erased one.",
        frame,
        results.to_frame(),
        lambda: _drawn(results, study),
        _claims(results, study),
    )


def _score(results: Results, method: str, metrics: tuple[str, ...], names: tuple[str, ...]) -> float:
    return float(np.mean([mean(results, method, metric, names)[0] for metric in metrics]))


def _utility(results: Results, method: str, names: tuple[str, ...]) -> float:
    """IRA and CRA as shares of the original model's, too."""
    return 1.0 if method == ORIGINAL else _score(results, method, UTILITY, names)


def _claims(results: Results, study: Study) -> list[Claim]:
    sizes = sorted(study.size.merged)
    claims: list[Claim] = []
    for task, names in erased(study).items():
        utility = {size: _utility(results, called(size), names) for size in sizes}
        forgotten = {size: _score(results, called(size), UNLEARNING, names) for size in sizes}
        for said, values, most in (
            (f"{task}: merging costs at most {100 * COST:.0f} points of utility", utility, COST),
            (f"{task}: merging costs no unlearning (at most {100 * UNLEARNING_LOST:.0f} point)", forgotten, UNLEARNING_LOST),
        ):
            lost = max(values[sizes[0]] - value for value in values.values())
            measured = ", ".join(f"{size}: {100 * value:.1f}" for size, value in values.items())
            measured += f"; largest loss {points(-lost)}"
            claims.append(
                Claim(
                    f"{said}, {sizes[0]} → {sizes[-1]}",
                    "Figure 6",
                    measured,
                    held(most - lost),
                )
            )
    return claims


def _drawn(results: Results, study: Study) -> Figure:
    figure, panels = new_figure(len(study.tasks))
    sizes = sorted(study.size.merged)
    for panel, (task, names) in zip(panels, erased(study).items(), strict=True):
        for label, metrics in (("unlearning score", UNLEARNING), ("utility score", UTILITY)):
            scores = [_score(results, called(size), metrics, names) for size in sizes]
            panel.plot(range(len(sizes)), [100 * score for score in scores], marker="o", label=label)
        for metric in METRICS:
            means = [100 * mean(results, called(size), metric, names)[0] for size in sizes]
            panel.plot(range(len(sizes)), means, linewidth=0.8, alpha=0.5, label=metric)
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        panel.set_xlabel("concepts erased at once")
        panel.set_title(f"{task} concepts")
    panels[0].set_ylabel("percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
