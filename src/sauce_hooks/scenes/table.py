"""The comparison in the README: every concept of the bundled world erased by several methods, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from sauce_hooks.bank import Concept, write_text_atomically
from sauce_hooks.concepts.projections import learn_projection
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.evaluation import Method, Results, evaluate
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes.bundled import competence, load, load_paper_sae
from sauce_hooks.scenes.learning import contrast_sets
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.world import CONCEPTS, CONCRETE, DOMAINS

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "objects, sports": tuple(c for domain in DOMAINS if domain in CONCRETE for c in DOMAINS[domain]),
        "colours, emotions, materials": tuple(c for domain in DOMAINS if domain not in CONCRETE for c in DOMAINS[domain]),
    }
)
"""The paper's two tasks."""


def methods(model: Any, processor: Any, sae: VisionSAE, paper: VisionSAE) -> dict[str, Method]:
    """What is compared, by name."""

    @cache
    def rival(concept: str) -> Concept:
        sets = ([scene.image for scene in scenes] for scenes in contrast_sets(concept))
        apart = VisionSAE(sae.sae, sae.hook_point, sae.tokens, tower=sae.tower)  # with a bank of its own
        return learn_projection(model, apart, concept, *sets, processor=processor)

    return {
        "paper's settings": lambda concept: ConceptEraser(model, paper, [concept], preserve_error=False),
        "ours, error dropped": lambda concept: ConceptEraser(model, sae, [concept], preserve_error=False),
        "ours": lambda concept: ConceptEraser(model, sae, [concept]),
        "difference of means": lambda concept: ConceptEraser(model, sae, [rival(concept)]),
    }


def run(out_dir: Path = Path("results"), n: int = 50, retained: int = 10, concepts: Sequence[str] | None = None) -> Results:
    """Measure, print and write the comparison; `results.csv` and `table.md` in `out_dir`.

    Args:
        out_dir: where to write.
        n: test images that hold each erased concept, and as many that lack it.
        retained: test images of each concept for IRA, CRA and the true-negative rate.
        concepts: which to erase; all by default.

    Raises:
        ModelBelowGateError: the model does not know enough for its forgetting to mean anything.
    """
    console = Console()
    model, processor, sae = load()
    found = competence(model, processor).require()
    by_domain = ", ".join(f"{domain} {100 * share:.1f}%" for domain, share in found.yes_no.items())
    gate = (
        f"Original model on test scenes: yes/no {by_domain}; true concepts named {100 * found.named:.1f}%, "
        f"false ones {100 * found.false:.1f}%."
    )
    console.print(gate)
    results = evaluate(
        model,
        sae,
        probes(n, retained=retained),
        list(concepts or CONCEPTS),
        processor=processor,
        methods=methods(model, processor, sae, load_paper_sae()),
    )
    table = results.to_markdown(GROUPS)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out_dir / "results.csv", results.to_frame().to_csv(index=False))
    write_text_atomically(out_dir / "table.md", f"{gate}\n\n{table}\n")
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"written to {out_dir}")
    return results
