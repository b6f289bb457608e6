"""Scores and edits side by side, at equal retention: what each forgets if it may cost so much and no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sauce_hooks.bank import Concept, Subspace, write_text_atomically
from sauce_hooks.concepts import SCORERS, SetStatistics
from sauce_hooks.concepts.learn import contrast
from sauce_hooks.concepts.projections import PROJECTIONS
from sauce_hooks.concepts.readout import keep_apart, read_out_score
from sauce_hooks.concepts.tuning import Figures, Measure, Target, Tuning, smallest_edit
from sauce_hooks.evaluation.markdown import markdown_table
from sauce_hooks.evaluation.measure import measure_probes
from sauce_hooks.evaluation.metrics import bootstrap_mean
from sauce_hooks.evaluation.workers import in_processes
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.progress import progress_bar
from sauce_hooks.scenes.bundled import load
from sauce_hooks.scenes.learning import Moments, contrast_moments, contrast_statistics, sibling_statistics
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.world import CONCEPTS, DOMAINS, domain_of

K = 4
"""Features a concept: in the middle of what tuning takes. The scores differ in which they are."""
LOST = 0.03
"""Share of the same-image retained accuracy that an edit may cost on validation scenes."""
GAMMAS = (0.0, -0.5, -1.5)
"""From mild to strong."""
N_VALIDATION, N_TEST = 16, 16
"""Scenes of the concept that γ is chosen on, and that are reported on."""
TARGET = Target("SRA", at_most_lost=LOST)
METRICS = ("UA_d", "UA_g", "SRA")
DENSE = "no feature"
"""The row of the rivals that need no SAE."""


@dataclass(frozen=True)
class Ways:
    """Where an edit of one concept may write."""

    outside: Subspace
    """Anywhere but in the span of the other concepts' read-outs."""
    apart: Subspace
    """Along the direction that its own reader alone sees, towards what is there without it."""
    sibling: Subspace
    """The same, towards its siblings."""

    @classmethod
    def of(cls, concept: str, moments: Moments) -> Ways:
        """From the tokens of every concept's contrast sets."""
        apart = keep_apart(moments)
        others_od = torch.cat([apart[other].reader_rd for other in moments if other != concept]).double()
        _, size_r, basis_rd = torch.linalg.svd(torch.nn.functional.normalize(others_od, dim=-1), full_matrices=False)
        outside = Subspace(basis_rd[size_r > 1e-4 * size_r[0]].float(), inside=False)
        siblings = [name for name in DOMAINS[domain_of(concept)] if name != concept]
        return cls(outside, apart[concept], keep_apart(moments, towards={concept: siblings})[concept])


EDITS_TRIED: Mapping[str, Callable[[Concept, Ways], Concept]] = MappingProxyType(
    {
        "scale": lambda concept, ways: concept,
        "scale, norms kept": lambda concept, ways: replace(concept, keep_norm=True),
        "scale, out of the others' span": lambda concept, ways: replace(concept, subspace=ways.outside),
        "scale, apart": lambda concept, ways: replace(concept, subspace=ways.apart),
        "scale, apart, as a sibling": lambda concept, ways: replace(concept, subspace=ways.sibling),
        "gated": lambda concept, ways: replace(concept, edit="gated"),
        "clamp": lambda concept, ways: replace(concept, edit="clamp"),
        "replace": lambda concept, ways: replace(concept, edit="replace"),
    }
)
"""Edits of a concept's features, by name."""


@dataclass(frozen=True)
class Cell:
    """One score with one edit of one concept, at the strongest γ that costs no more than `LOST`."""

    concept: str
    score: str
    edit: str
    gamma: float | None
    reached: bool
    """Whether any γ costs so little."""
    validation: Figures
    test: Figures


def rankings(sae: VisionSAE, concept: str, sets: Sequence[SetStatistics], siblings: Any, ways: Ways) -> dict[str, Concept]:
    """The concept's `K` best features by every score."""
    with_it, without = sets
    found = {name: contrast(concept, with_it, without, scorer=name, k=K) for name in SCORERS}
    found["sauce, against siblings"] = contrast(concept, with_it, without, siblings, k=K)
    found["read-out"] = contrast(concept, with_it, without, scorer=read_out_score(sae.sae.W_dec, ways.apart), k=K)
    return found


def cells(model: Any, processor: Any, sae: VisionSAE, concept: str, moments: Moments) -> list[Cell]:
    """Every score with every edit for one concept, and the dense rivals."""
    sets = contrast_statistics(model, processor, sae, concept)
    ways = Ways.of(concept, moments)
    ranked = rankings(sae, concept, sets, sibling_statistics(model, processor, sae, concept), ways)
    tried = {(score, edit): make(c, ways) for score, c in ranked.items() for edit, make in EDITS_TRIED.items()}
    for name, fit in PROJECTIONS.items():
        tried[DENSE, name] = Concept(concept, (), edit="project", projection=fit(*moments[concept]))

    validation, test = (
        _remembered(measure_probes(model, sae, images, concept, processor=processor, metrics=METRICS, batch_size=128))
        for images in (
            probes(N_VALIDATION, retained=0, negatives=0, split="val", seed=1),
            probes(N_TEST, retained=0, negatives=0),
        )
    )
    found: list[Cell] = []
    for (score, edit), candidate in tried.items():
        chosen = _strongest(candidate, validation)
        plain = replace(chosen, effect=None)
        assert chosen.effect is not None
        reached = not TARGET.missed_by(chosen.effect.figures, validation.original)
        found.append(Cell(concept, score, edit, chosen.gamma, reached, chosen.effect.figures, test.of(plain)))
    original = (validation.original, test.original)
    return [Cell(concept, "original", "", None, True, *original), *found]


def _strongest(candidate: Concept, measure: Measure) -> Concept:
    import warnings

    with warnings.catch_warnings():  # that some edits cost too much at any strength is a finding here
        warnings.simplefilter("ignore", UserWarning)
        return smallest_edit(candidate, Tuning(measure, TARGET, ks=(K,), gammas=GAMMAS))


def _remembered(measure: Measure) -> Measure:
    """Scores often agree on the features: each setting is measured once, whatever the scores and in whatever order."""
    figures = cache(measure.of)

    def of(concept: Concept) -> Figures:
        order = np.argsort(concept.features)
        sorted_too = {name: tuple(np.asarray(getattr(concept, name))[order].tolist()) for name in ("means", "gates")}
        features = tuple(sorted(concept.features))
        return figures(replace(concept, features=features, scores=(), **(sorted_too if features else {})))

    return replace(measure, of=of)


# The command. --------------------------------------------------------------------------------------------------------


def run(out_dir: Path = Path("frontier"), jobs: int = 2, concepts: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure every cell, go on where an earlier run stopped, and write `cells.csv` and `frontier.md` in `out_dir`.

    Args:
        out_dir: where to write, a file for each concept meanwhile.
        jobs: processes, of one core each.
        concepts: all by default.

    Returns:
        The fields of every `Cell`.
    """
    names = list(concepts or CONCEPTS)
    out_dir.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _file(out_dir, name).exists()]
    if missing:
        model, processor, sae = load()
        moments = contrast_moments(model, processor, sae)
        with progress_bar(len(names), "measure concepts", "concept", show=True, done=len(names) - len(missing)) as bar:
            units = [(out_dir, name) for name in missing]
            in_processes(_measure, units, jobs, start=_start, given=(moments,), after=bar.update)
    found: list[dict[str, Any]] = []
    for name in names:
        found += json.loads(_file(out_dir, name).read_text(encoding="utf-8"))
    page = markdown(found)
    write_text_atomically(out_dir / "cells.csv", frame(found).to_csv(index=False))
    write_text_atomically(out_dir / "frontier.md", page)
    Console().print(page, markup=False, soft_wrap=True)
    return found


_moments: Moments = {}


def _start(moments: Moments) -> None:
    global _moments
    _moments = moments


def _measure(what: tuple[Path, str]) -> None:
    out_dir, concept = what
    model, processor, sae = load()
    found = [asdict(cell) for cell in cells(model, processor, sae, concept, _moments)]
    write_text_atomically(_file(out_dir, concept), json.dumps(found))


def _file(out_dir: Path, concept: str) -> Path:
    return out_dir / f"{concept}.json"


def frame(found: Sequence[Mapping[str, Any]]) -> Any:
    """A row a cell and split, as a pandas `DataFrame`."""
    import pandas as pd

    facts = ("concept", "score", "edit", "gamma", "reached")
    return pd.DataFrame(
        {name: cell[name] for name in facts}
        | {"split": split}
        | {f"{metric}_{part}": value for metric in METRICS for part, value in cell[split][metric].items()}
        for cell in found
        for split in ("validation", "test")
    )


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """Two tables of forgetting at equal retention: on the validation scenes that choices are made by, and on test scenes."""
    parts: list[str] = []
    for split in ("validation", "test"):
        scores = list(dict.fromkeys(cell["score"] for cell in found if cell["edit"] in EDITS_TRIED))
        edits = list(EDITS_TRIED)
        rows = [[score, *(_summary(found, score, edit, split) for edit in edits)] for score in scores]
        dense = ", ".join(f"{name}: {_summary(found, DENSE, name, split)}" for name in PROJECTIONS)
        parts += [
            f"**{split.capitalize()} scenes.** Forgetting (the mean of UA_d and UA_g) [95% over concepts] / SRA, "
            f"each concept at the strongest γ that loses at most {100 * LOST:g} points of SRA on validation scenes; k = {K}",
            "",
            markdown_table(["score", *edits], rows),
            "",
            f"Without features: {dense}. Original model: {_summary(found, 'original', '', split)}.",
            "",
        ]
    return "\n".join(parts)


def _summary(found: Sequence[Mapping[str, Any]], score: str, edit: str, split: str) -> str:
    figures = [cell[split] for cell in found if (cell["score"], cell["edit"]) == (score, edit)]
    forgotten = [(f["UA_d"]["value"] + f["UA_g"]["value"]) / 2 for f in figures]
    mean, low, high = (100 * value for value in bootstrap_mean(forgotten))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}] / {100 * float(np.mean([f['SRA']['value'] for f in figures])):.1f}"
