"""Runs experiments: their units are shared among processes, and what is finished lies on disk, where all of them meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from sauce_hooks.evaluation.store import slug
from sauce_hooks.evaluation.workers import in_processes
from sauce_hooks.reproduce import figure6, figure7, table2, table4
from sauce_hooks.reproduce.finding import Finding
from sauce_hooks.reproduce.page import write_findings
from sauce_hooks.reproduce.sharing import once, share
from sauce_hooks.reproduce.study import Study
from sauce_hooks.sae.progress import progress_bar


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper."""

    about: str
    units: Callable[[Study], list[tuple[str, ...]]]
    """What can be done apart."""
    fill: Callable[[Study, Path, tuple[str, ...]], None]
    """Does one unit and keeps it in a folder; does nothing if it is there."""
    read: Callable[[Study, Path], Finding]
    """The finding, once every unit is there."""


EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "table2": Experiment("SAUCE and its rivals", table2.units, table2.fill, table2.read),
        "table4": Experiment("the same SAE in other models", table4.units, table4.fill, table4.read),
        "figure6": Experiment("many concepts at once", figure6.units, figure6.fill, figure6.read),
        "figure7": Experiment("attacks", figure7.units, figure7.fill, figure7.read),
    }
)
"""The paper's tables and figures that are made again, by the name that `sauce-hooks reproduce` takes."""


def reproduce(
    make: Callable[[], Study],
    out: Path,
    names: Sequence[str] = tuple(EXPERIMENTS),
    *,
    jobs: int = 1,
    console: Console | None = None,
) -> list[Finding]:
    """Run experiments, or go on where an earlier run was cut off, and write what they found.

    In `out`: a CSV, a Markdown file and a picture of each, `index.html` with all, and a folder each of what is finished.
    Under `accelerate launch` (or torchrun) every process takes the next unit that none is at; the first one writes.

    Args:
        make: makes the study, anew in every process; picklable.
        out: where to write.
        names: which of `EXPERIMENTS`.
        jobs: processes of one core each on this machine; 1 works in this process. Not with `accelerate launch`.
        console: where to print what was found; a quiet one shows no progress either.

    Returns:
        The findings; none in other processes than the first.

    Raises:
        ValueError: an unknown experiment.
        ResumeError: the folder holds results of another study.
    """
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"unknown experiment {unknown[0]!r}; known: {', '.join(EXPERIMENTS)}")
    console = console or Console()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out.mkdir(parents=True, exist_ok=True)
    study = make()
    found: list[Finding] = []
    for name in names:
        experiment, folder = EXPERIMENTS[name], out / name
        todo = experiment.units(study)
        with progress_bar(len(todo), name, "unit", show=rank == 0 and not console.quiet) as bar:
            if world > 1:
                _share(study, experiment, folder, todo, out / "done" / name, bar.update)
            else:
                _fill(make, study, name, folder, todo, jobs, bar.update)
        if rank == 0:
            finding = experiment.read(study, folder)
            finding.write(out)
            found.append(finding)
            write_findings(found, out / "index.html", study.name)
            for claim in finding.claims:
                console.print(f"  {claim.outcome}: {claim.said}: {claim.measured}", markup=False, highlight=False)
    if rank == 0:
        console.print(f"written to {out}", markup=False)
    return found


def _fill(
    make: Callable[[], Study],
    study: Study,
    name: str,
    folder: Path,
    work: Sequence[tuple[str, ...]],
    jobs: int,
    after: Callable[[], object],
) -> None:
    """Does the work, here or in other processes."""
    if jobs == 1 or len(work) < 2:
        for unit in work:
            EXPERIMENTS[name].fill(study, folder, unit)
            after()
        return
    EXPERIMENTS[name].fill(study, folder, work[0])  # lays the folder out, before others write to it
    units = [(name, folder, unit) for unit in work]
    in_processes(_do, units, jobs, start=_start, given=(make,), after=after)


_study: list[Study] = []


def _start(make: Callable[[], Study]) -> None:
    _study.append(make())


def _do(what: tuple[str, Path, tuple[str, ...]]) -> None:
    name, folder, unit = what
    EXPERIMENTS[name].fill(_study[0], folder, unit)


def _share(
    study: Study,
    experiment: Experiment,
    folder: Path,
    todo: Sequence[tuple[str, ...]],
    done: Path,
    advance: Callable[[], object],
) -> None:
    """One of several processes: does whatever nobody else is at, and comes back when all is done.

    They meet on disk and not at a barrier: a process group gives up on one that is hours behind.
    """
    by_name = {" ".join(unit): unit for unit in todo}

    def path_of(name: str) -> Path:
        return done / slug(name)

    def work(name: str) -> None:
        experiment.fill(study, folder, by_name[name])
        path_of(name).touch()
        advance()

    first = next(iter(by_name))
    once(path_of(first), lambda path: work(first))  # lays the folder out, before others write to it
    share(list(by_name), path_of, work)
