"""How many images a concept takes: tuned on 20 positive images and on 200, reported on the same test scenes.

`python -m sauce_hooks.scenes.few` prints the table that docs/concepts.md shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from sauce_hooks.bank import ConceptBank
from sauce_hooks.concepts.tuning import Figures
from sauce_hooks.evaluation.markdown import markdown_table
from sauce_hooks.evaluation.measure import measure_probes, tune_concept
from sauce_hooks.evaluation.metrics import bootstrap_mean
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes.bundled import load
from sauce_hooks.scenes.learning import SIBLING_SEED, contrast_sets
from sauce_hooks.scenes.probes import probes, wording
from sauce_hooks.scenes.world import DOMAINS, domain_of, sample

N_SIBLINGS, N_SIBLING = 3, 12
"""Siblings that are kept apart, and images of each."""
KS = (4, 16)
METRICS = ("UA_d", "UA_g", "SRA")
PER_DOMAIN = 2


def tuned_on(model: Any, processor: Any, sae: VisionSAE, concept: str, n: int, test: Any) -> Figures:
    """What erasing a concept does on test scenes, if it is learnt and tuned on `n` positive images and as many others."""
    siblings = [name for name in DOMAINS[domain_of(concept)] if name != concept][:N_SIBLINGS]
    images = {
        name: [s.image for s in sample(N_SIBLING, seed=SIBLING_SEED + i, contains=name, lacks=concept, split="train")]
        for i, name in enumerate(siblings)
    }
    with_it, without = ([scene.image for scene in scenes[:n]] for scenes in contrast_sets(concept))
    options: dict[str, Any] = {"processor": processor, "wording": wording(), "tuning": {"ks": KS}, "batch_size": 128}
    alone = replace(sae, concepts=ConceptBank())  # nothing is known of other concepts
    found = tune_concept(model, alone, concept, with_it, without, siblings=images, **options)
    measure = measure_probes(model, sae, test, concept, processor=processor, metrics=METRICS, batch_size=128)
    return measure.of(replace(found, effect=None))


def run(ns: Sequence[int] = (20, 200), concepts: Sequence[str] | None = None) -> str:
    """Measure and print; a row for each number of images, then the difference of the last to the first.

    Args:
        ns: numbers of positive images.
        concepts: the first `PER_DOMAIN` of each domain by default.
    """
    model, processor, sae = load()
    chosen = list(concepts or [name for names in DOMAINS.values() for name in names[:PER_DOMAIN]])
    test = probes(50, retained=0, negatives=0)
    console = Console()
    found: dict[int, list[Figures]] = {n: [] for n in ns}
    with warnings.catch_warnings():  # that some do not reach the target is a finding here
        warnings.simplefilter("ignore", UserWarning)
        for concept in chosen:
            for n in ns:
                found[n].append(tuned_on(model, processor, sae, concept, n, test))
                figures = ", ".join(f"{metric} {100 * found[n][-1][metric].value:.1f}" for metric in METRICS)
                console.print(f"{concept}, {n} images: {figures}")
    values = {n: {m: [figures[m].value for figures in of_n] for m in METRICS} for n, of_n in found.items()}
    first, last = values[ns[0]], values[ns[-1]]
    rows = {f"{n} images": of_n for n, of_n in values.items()}
    rows["difference"] = {m: [b - a for a, b in zip(first[m], last[m], strict=True)] for m in METRICS}
    lines = [[name, *("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in bootstrap_mean(row[m]))) for m in METRICS)]
             for name, row in rows.items()]  # fmt: skip
    table = markdown_table(["", *METRICS], lines)
    console.print(table, markup=False, soft_wrap=True)
    return table


def main(
    n: Annotated[list[int] | None, typer.Option(help="A number of positive images; repeat for several.")] = None,
    concepts: Annotated[list[str] | None, typer.Option("--concepts", help="A concept; repeat for several.")] = None,
) -> None:
    """How many images a concept takes."""
    run(n or (20, 200), concepts)


if __name__ == "__main__":
    typer.run(main)
