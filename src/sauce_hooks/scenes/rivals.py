"""The rivals on the bundled world: their data, their learning rates, and a comparison of all of them.

python -m sauce_hooks.scenes.rivals --out runs/rivals --concepts red --concepts tiger
python -m sauce_hooks.scenes.rivals --out runs/rivals --sweep          # choose the learning rates anew
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console

from sauce_hooks.bank import write_text_atomically
from sauce_hooks.evaluation import Method, Probe, Results, evaluate
from sauce_hooks.evaluation.baselines import (
    METHODS,
    OBJECTIVES,
    ForgetRetain,
    Materials,
    Retrained,
    Settings,
    Sweep,
    forget_retain,
    make_methods,
    sweep,
)
from sauce_hooks.evaluation.baselines.weights import Kind
from sauce_hooks.evaluation.erasing import Erasing
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes.bundled import load
from sauce_hooks.scenes.learning import CONTRAST_SEED, N_CONTRAST, SIBLING_SEED, contrast_sets
from sauce_hooks.scenes.probes import probes, wording
from sauce_hooks.scenes.world import CONCEPTS, DOMAINS, Scene, domain_of, sample

REFUSALS = ("there is no answer.", "there is no answer here.")
"""Words that the bundled model has; neither begins with yes or no."""
INSTRUCTION = "please tell no {}."
"""The same. The model has never been taught to follow instructions, and so this is a row that should do nothing."""
SWEPT = ("tiger", "soccer", "red", "happy", "wood")
"""Concepts that learning rates are chosen on, one of each domain."""
LRS: Mapping[Kind, tuple[float, ...]] = MappingProxyType(
    {"lora": (3e-3, 5.6e-3, 1e-2, 3e-2, 1e-1), "full": (3e-4, 1e-3, 3e-3)}
)
"""What is tried."""
CHOSEN: Mapping[Kind, Mapping[str, float]] = MappingProxyType(
    {
        "lora": MappingProxyType({"GA": 5.6e-3, "GD": 1e-2, "KL": 1e-2, "PO": 1e-2, "NPO": 5.6e-3}),
        "full": MappingProxyType({"GA": 1e-3, "GD": 1e-3, "KL": 1e-3, "PO": 3e-3, "NPO": 1e-3}),
    }
)
"""What a sweep over `SWEPT` chose, by method. Where there is nothing, `run` sweeps first."""


def settings(rates: Mapping[str, float], kind: Kind = "lora") -> dict[str, Settings]:
    """The settings of weight-updating methods, from their learning rates."""
    return {method: Settings(lr, kind) for method, lr in rates.items()}


def data(concept: str, n: int = N_CONTRAST) -> ForgetRetain:
    """The training scenes that features are selected from, with the concept; and as many with others of its domain.

    Yes/no answers and descriptions are the true ones, as in the model's own training.
    """
    domain = DOMAINS[domain_of(concept)]
    holding = sample(n, seed=CONTRAST_SEED + 2 * CONCEPTS.index(concept), contains=concept, split="train")
    siblings = [name for name in domain if name != concept]
    first = SIBLING_SEED + len(CONCEPTS) * CONCEPTS.index(concept)  # as for the statistics of siblings
    share = -(-n // len(siblings))
    each = [sample(share, seed=first + domain.index(name), contains=name, lacks=concept, split="train") for name in siblings]
    others = [scene for turn in zip(*each, strict=True) for scene in turn][:n]
    captions = {id(scene.image): scene.caption for scene in (*holding, *others)}

    def as_probes(scenes: Sequence[Scene]) -> list[Probe]:
        return [Probe(scene.image, scene.concepts) for scene in scenes]

    def describe(shown: Sequence[Probe]) -> list[str]:
        return [captions[id(probe.image)] for probe in shown]

    return forget_retain(concept, as_probes(holding), as_probes(others), domain, wording(), describe, REFUSALS)


def materials(
    model: Any,
    processor: Any,
    sae: VisionSAE,
    *,
    rates: Mapping[str, float] | None = None,
    kind: Kind = "lora",
    folder: Path | None = None,
) -> Materials:
    """What the methods of `METHODS` need, from the bundled world; `rates` are `CHOSEN` ones by default."""
    known = CHOSEN[kind] if rates is None else rates

    def sets(concept: str) -> tuple[Any, Any]:
        with_it, without = ([scene.image for scene in scenes] for scenes in contrast_sets(concept))
        return with_it, without

    return Materials(model, processor, sae, sets, cache(data), settings(known, kind), folder, INSTRUCTION)


def choose(
    model: Any,
    processor: Any,
    methods: Sequence[str] = tuple(OBJECTIVES),
    *,
    kind: Kind = "lora",
    folder: Path | None = None,
    concepts: Sequence[str] = SWEPT,
    progress: bool = True,
) -> dict[str, Sweep]:
    """Sweep the learning rate of weight-updating methods on validation scenes."""
    shown = cache(data)
    candidates: dict[str, dict[float, Method]] = {
        method: {lr: Retrained(model, processor, method, shown, Settings(lr, kind), folder) for lr in LRS[kind]}
        for method in methods
    }
    validation = probes(16, retained=4, negatives=4, split="val")
    return sweep(model, candidates, validation, concepts, processor=processor, progress=progress)


def run(
    out: Path,
    concepts: Sequence[str] = CONCEPTS,
    methods: Sequence[str] | None = None,
    *,
    kind: Kind = "lora",
    n: int = 50,
    retained: int = 10,
) -> Results:
    """Every method side by side on test scenes; `results.csv` and `table.md` in `out`, trained weights in `out/weights`."""
    model, processor, sae = load()
    rates = CHOSEN[kind]
    if unknown := [method for method in methods or () if method not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
    trained = [method for method in methods or OBJECTIVES if method in OBJECTIVES]
    if missing := [method for method in trained if method not in rates]:
        found = run_sweep(out, kind=kind, methods=missing)
        rates = {**rates, **{method: one.chosen for method, one in found.items()}}
    given = materials(model, processor, sae, rates=rates, kind=kind, folder=out / "weights")
    rivals: dict[str, Method] = {"SAUCE": Erasing(model, sae), **make_methods(given, methods)}
    shown = probes(n, retained=retained, negatives=min(n, 2 * retained))
    results = evaluate(model, sae, shown, concepts, processor=processor, methods=rivals, out=out / "answers")
    table = results.to_markdown()
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / "results.csv", results.to_frame().to_csv(index=False))
    write_text_atomically(out / "table.md", f"{table}\n")
    return results


def run_sweep(
    out: Path, *, kind: Kind = "lora", concepts: Sequence[str] = SWEPT, methods: Sequence[str] = tuple(OBJECTIVES)
) -> dict[str, Sweep]:
    """Choose the learning rates; every point is in `sweep-{kind}.csv`."""
    import pandas as pd

    model, processor, _ = load()
    found = choose(model, processor, methods, kind=kind, folder=out / "weights", concepts=concepts)
    out.mkdir(parents=True, exist_ok=True)
    points = pd.concat([one.to_frame() for one in found.values()])
    which = "" if set(methods) == set(OBJECTIVES) else f"-{'-'.join(methods)}"
    write_text_atomically(out / f"sweep-{kind}{which}.csv", points.to_csv(index=False))
    return found


def main(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="The folder for results; trained weights there are used again.")
    ],
    concepts: Annotated[
        list[str] | None, typer.Option(help="A concept to erase; repeat for several. All by default.")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option(help="A method; repeat for several. All by default.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights outside the tower instead of LoRA.")] = False,
    sweeping: Annotated[bool, typer.Option("--sweep", help="Choose learning rates on validation scenes.")] = False,
    n: Annotated[int, typer.Option(min=1, help="Test images of each erased concept.")] = 50,
    retained: Annotated[int, typer.Option(min=1, help="Test images of each retained concept.")] = 10,
) -> None:
    """Compare the rivals on the bundled world, or choose their learning rates."""
    console = Console()
    kind: Kind = "full" if full else "lora"
    if sweeping:
        for method, found in run_sweep(
            out, kind=kind, concepts=concepts or SWEPT, methods=methods or tuple(OBJECTIVES)
        ).items():
            merits = ", ".join(f"{lr:g}: {100 * merit:.1f}" for lr, merit in found.merits.items())
            end = " (at an end of what was tried)" if found.at_an_end else ""
            console.print(f"{method}: {found.chosen:g}{end}; {merits}", markup=False, soft_wrap=True)
        return
    results = run(out, concepts or CONCEPTS, methods, kind=kind, n=n, retained=retained)
    console.print(results.to_markdown(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
