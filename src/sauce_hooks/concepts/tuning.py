"""How many features, and how strongly: the search for the smallest edit that does what is asked of it.

What an edit does is not computed here but measured: a `Measure` asks the model, and `evaluation` makes such measures.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from sauce_hooks.bank import Concept, CurvePoint, Effect, Rate
from sauce_hooks.errors import ContrastError, ModelBelowGateError

Figures = Mapping[str, Rate]
"""What was measured, by the names of `evaluation.METRICS`."""

FORGETTING = ("UA_d", "UA_g")
"""Figures that grow with the strength of an edit."""
KEEPING = ("SRA", "IRA", "CRA")
"""Figures that fall with it; the higher their mean, the more is kept."""
DEFAULT_KS = (1, 2, 4, 8, 16, 32)
WITHOUT_GAMMA = ("replace", "project")
"""Edits in which γ plays no part: they are tried with γ = 0 alone."""


@dataclass(frozen=True)
class Target:
    """What a figure must come to: a least value, or a loss against the original model of so much at the most.

    Raises:
        ContrastError: neither or both are given, or a loss of what grows as a concept is forgotten.
    """

    metric: str
    at_least: float | None = None
    """A share, from 0 to 1."""
    at_most_lost: float | None = None
    """A share of the original model's, likewise: 0.02 is 2 points."""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most_lost is None):
            raise ContrastError(f"a target for {self.metric} takes either at_least=... or at_most_lost=...")
        if self.at_most_lost is not None and self.metric in FORGETTING:
            raise ContrastError(f"{self.metric} grows as a concept is forgotten: ask for at_least=... of it")

    def missed_by(self, figures: Figures, original: Figures) -> float:
        """How far the figure is from the target; 0 if it reaches it.

        Raises:
            ContrastError: the figure is not measured, or there was nothing to count.
        """
        found = _value(self.metric, figures)
        bound = self.at_least if self.at_most_lost is None else _value(self.metric, original) - self.at_most_lost
        assert bound is not None
        return max(0.0, bound - found) if bound - found > 1e-9 else 0.0  # rounding is no miss

    def __str__(self) -> str:
        if self.at_most_lost is None:
            return f"{self.metric} at least {self.at_least:.3g}"
        return f"{self.metric} at most {self.at_most_lost:.3g} lost"


FORGOTTEN = (Target("UA_d", at_least=0.96), Target("UA_g", at_least=0.96))
"""The concept is no longer affirmed, nor named in descriptions."""


@dataclass(frozen=True)
class Measure:
    """A way to find out what erasing a concept does."""

    of: Callable[[Concept], Figures]
    """The figures with the concept erased as it says."""
    original: Figures
    """The same figures of the model as it is."""
    images: str
    """Which images that is measured on, in words."""


@dataclass(frozen=True)
class Tuning:
    """What is tried, what is asked, and how it is measured.

    The setting that is taken is the smallest edit that reaches the target: of those that reach it, the one that keeps most
    (the mean of `KEEPING`, as far as it is measured); of equal ones, the one that writes least. In the mean over images with
    the concept an edit writes Σ (γ − 1) μ_i W_dec[i]; its size is taken as |1 − γ| · ‖μ‖, as for orthonormal decoder rows.
    A target that says nothing of forgetting would be reached by doing nothing: there, the setting that forgets most
    (the lesser of `FORGETTING`) comes before the one that keeps most.

    Raises:
        ContrastError: nothing to try, or no target.
    """

    measure: Measure
    target: Target | Sequence[Target] = FORGOTTEN
    """All of them must be reached."""
    ks: Sequence[int] = DEFAULT_KS
    """Numbers of features, the best ones each time."""
    gammas: Sequence[float] = (0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0)
    """Factors γ, in any order: an edit is the stronger, the further γ is from 1."""
    edits: Sequence[str | None] = (None,)
    """Names of edits (`erasure.EDITS`); None is the concept's own, or else the eraser's."""
    whole: bool = False
    """Measure every setting. Otherwise γ is found by halving, a handful of measurements a number of features: forgetting
    grows along γ, so what is milder than a γ that falls short, or stronger than one that suffices, need not be tried."""

    def __post_init__(self) -> None:
        if not (self.ks and self.gammas and self.edits and self.targets) or min(self.ks) < 1:
            raise ContrastError("tuning needs a target, and at least one k (1 or more), one gamma and one edit to try")

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, one or several."""
        return (self.target,) if isinstance(self.target, Target) else tuple(self.target)


def smallest_edit(concepts: Concept | Sequence[Concept], tuning: Tuning) -> Concept:
    """The concept with the number of features, the γ and the edit that `tuning` finds, and its measured effect.

    The features must be in order, the best first, and as many as the largest k. Several concepts are several ways to see one
    and the same: other features, or another subspace to write in; the best of all is taken. `effect.curve` has every setting
    that was measured, by concept, edit, features and strength. If none reaches the target, the one that comes closest is
    taken; a warning and `effect.images` say so.

    Raises:
        ContrastError: a figure that the target is about is not measured.
        ModelBelowGateError: the original model has nothing to forget: it reaches the targets of forgetting as it is.
    """
    candidates = [concepts] if isinstance(concepts, Concept) else list(concepts)
    concept, targets, original = candidates[0], tuning.targets, tuning.measure.original
    forgetting = [target for target in targets if target.metric in FORGETTING]
    if forgetting and original and not any(target.missed_by(original, original) for target in forgetting):
        raise ModelBelowGateError(
            f"{concept.name!r}: there is nothing to forget. The model as it is has {_said(forgetting, original)} on "
            f"{tuning.measure.images}: it does not know the concept, or is not asked so that it can show it"
        )

    points: dict[Concept, CurvePoint] = {}

    def measured(candidate: Concept) -> Figures:
        if candidate not in points:
            gamma = candidate.gamma or 0.0
            figures = tuning.measure.of(candidate)
            done = ", ".join(filter(None, (candidate.edit, candidate.provenance.get("written"))))
            points[candidate] = CurvePoint(len(candidate.features), gamma, done, figures)
        return points[candidate].figures

    def past(candidate: Concept) -> bool:
        """Whether it is on the far side of the place on its line that is looked for; once past, stronger ones are too."""
        asked, figures = forgetting or targets, measured(candidate)
        reached = not any(target.missed_by(figures, original) for target in asked)
        return reached if forgetting else not reached

    gammas = sorted(set(tuning.gammas), key=lambda gamma: (abs(gamma - 1), gamma))
    for way, edit in product(candidates, dict.fromkeys(tuning.edits)):
        for k in sorted({min(k, len(way.features)) for k in tuning.ks}):
            start = replace(first_features(way, k), edit=edit or way.edit)
            line = [replace(start, gamma=gamma) for gamma in ((0.0,) if start.edit in WITHOUT_GAMMA else gammas)]
            if tuning.whole:
                for candidate in line:
                    measured(candidate)
            else:
                bisect_left(line, True, key=past)  # measures both sides of the place where `past` changes

    def merit(candidate: Concept) -> tuple[float, ...]:
        figures = points[candidate].figures
        missed = [target.missed_by(figures, original) for target in targets]
        forgotten = 0.0 if forgetting else min(_known(FORGETTING, figures), default=0.0)
        kept = _known(KEEPING, figures)
        return -max(missed), -sum(missed), forgotten, sum(kept) / max(1, len(kept)), -_size(candidate), -points[candidate].k

    chosen = max(points, key=merit)
    figures, images = points[chosen].figures, tuning.measure.images
    reached = not any(target.missed_by(figures, original) for target in targets)
    if not reached:
        missed = f"nothing that was tried reaches the target ({'; '.join(map(str, targets))})"
        closest = f"{missed}: the closest has {_said(targets, figures)}"
        warnings.warn(
            f"{concept.name!r}: {closest}, with {len(chosen.features)} features at γ = {chosen.gamma:g}. Try more features "
            "(ks), stronger factors (gammas), another edit, or ask for less.",
            stacklevel=2,
        )
        images = f"{images}; {closest}"
    curve = tuple(replace(point, chosen=candidate is chosen) for candidate, point in points.items())
    return replace(
        chosen,
        provenance={
            **chosen.provenance,
            "k": len(chosen.features),
            "target": "; ".join(map(str, targets)),
            "reached": reached,
        },
        effect=Effect(images, figures, original, curve),
    )


def _size(concept: Concept) -> float:
    """|1 − γ| · ‖μ‖ over its features; where no means are known, they count as 1."""
    return abs(1 - (concept.gamma or 0.0)) * math.hypot(*(concept.means or [1.0] * len(concept.features)))


def first_features(concept: Concept, k: int) -> Concept:
    """The concept with its `k` best features alone."""
    of_features = ("features", "scores", "means", "gates")
    return replace(concept, **{name: getattr(concept, name)[:k] for name in of_features})


def _value(metric: str, figures: Figures) -> float:
    if metric not in figures or math.isnan(figures[metric].value):
        known = [name for name, rate in figures.items() if not math.isnan(rate.value)]
        raise ContrastError(
            f"the target asks for {metric}, which is not measured here (measured: {', '.join(known) or 'nothing'}). "
            "IRA, for example, takes images of sibling concepts."
        )
    return figures[metric].value


def _known(metrics: Sequence[str], figures: Figures) -> list[float]:
    return [figures[m].value for m in metrics if m in figures and not math.isnan(figures[m].value)]


def _said(targets: Sequence[Target], figures: Figures) -> str:
    return ", ".join(f"{target.metric} {figures[target.metric].value:.3g}" for target in targets)
