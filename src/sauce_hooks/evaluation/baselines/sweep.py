"""The learning rate of a method, chosen on validation images of a few concepts and used for all."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from sauce_hooks.errors import DivergedError, ImagesError
from sauce_hooks.evaluation.probes import ProbeSet
from sauce_hooks.evaluation.run import Method, evaluate

if TYPE_CHECKING:
    import pandas as pd

CRITERION = "the harmonic mean of forgetting, (UA_d + UA_g) / 2, and retention, (IRA + CRA) / 2"
"""What a learning rate is chosen by, in words."""


@dataclass(frozen=True)
class Point:
    """One learning rate tried on one concept."""

    lr: float
    concept: str
    forgetting: float
    """(UA_d + UA_g) / 2."""
    retention: float
    """(IRA + CRA) / 2."""
    diverged: bool = False
    """Whether training gave weights that are not finite; the figures are those of the original model then."""

    @property
    def merit(self) -> float:
        """`CRITERION`; 0 where training diverged."""
        return 0.0 if self.diverged else harmonic_mean([self.forgetting, self.retention])


@dataclass(frozen=True)
class Sweep:
    """Everything that was tried, and what came of it."""

    method: str
    points: tuple[Point, ...]

    @property
    def merits(self) -> dict[float, float]:
        """The mean of the criterion over concepts, by learning rate."""
        return {
            lr: float(np.mean([point.merit for point in self.points if point.lr == lr]))
            for lr in sorted({point.lr for point in self.points})
        }

    @property
    def chosen(self) -> float:
        """The learning rate of the largest mean; of equals, the least."""
        merits = self.merits
        return max(merits, key=merits.__getitem__)

    @property
    def at_an_end(self) -> bool:
        """Whether the choice is the least or the largest rate tried, so that a wider sweep might find a better one."""
        return self.chosen in (min(self.merits), max(self.merits))

    def to_frame(self) -> pd.DataFrame:
        """One row a point."""
        import pandas as pd

        return pd.DataFrame(
            {
                "method": self.method,
                "lr": point.lr,
                "concept": point.concept,
                "forgetting": point.forgetting,
                "retention": point.retention,
                "merit": point.merit,
                "diverged": point.diverged,
                "chosen": point.lr == self.chosen,
            }
            for point in self.points
        )


def sweep(
    model: nn.Module,
    candidates: Mapping[str, Mapping[float, Method]],
    probes: ProbeSet,
    concepts: Sequence[str],
    *,
    processor: Any,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Sweep]:
    """Measure every candidate on every concept. Weights that are cached are not trained again.

    Args:
        model: the original model.
        candidates: by the method's name and the learning rate; such as `Retrained`s that differ in nothing else.
        probes: validation images: none that are trained on, nor those reported on later.
        concepts: a few, spread over the domains.
        processor: the model's processor.
        batch_size: questions asked at once.
        progress: show a progress bar.

    Returns:
        By method, all points; `.chosen` is the rate to use.

    Raises:
        ImagesError: too few images to measure forgetting and retention with.
    """
    diverged: set[tuple[str, str]] = set()
    names = {f"{method} {lr!r}": (method, lr) for method, rates in candidates.items() for lr in rates}
    methods = {name: _tolerant(candidates[method][lr], name, diverged) for name, (method, lr) in names.items()}
    results = evaluate(
        model, None, probes, concepts, processor=processor, methods=methods, batch_size=batch_size, progress=progress
    )
    found: dict[str, list[Point]] = {method: [] for method in candidates}
    for name, (method, lr) in names.items():
        for concept in concepts:
            value = {metric: rate.value for metric, rate in results.scores[name, concept].items()}
            if absent := [metric for metric in ("UA_d", "UA_g", "IRA", "CRA") if np.isnan(value[metric])]:
                raise ImagesError(f"{concept!r}: no question to measure {', '.join(absent)} with; give more images")
            forgetting, retention = (value["UA_d"] + value["UA_g"]) / 2, (value["IRA"] + value["CRA"]) / 2
            found[method].append(Point(lr, concept, forgetting, retention, (name, concept) in diverged))
    return {method: Sweep(method, tuple(points)) for method, points in found.items()}


def _tolerant(method: Method, name: str, diverged: set[tuple[str, str]]) -> Method:
    """The same, but where training diverges the model stays as it is and that is noted."""

    @contextmanager
    def entered(concept: str) -> Generator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(method(concept))
            except DivergedError:
                diverged.add((name, concept))
            yield

    return entered
