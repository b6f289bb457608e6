"""How often a judge agrees with labels made by hand."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sauce_hooks.bank import Rate
from sauce_hooks.errors import UnjudgedAnswersWarning
from sauce_hooks.evaluation.judges.data import read_text
from sauce_hooks.evaluation.judges.opinion import Judge, Verdict, verdicts_of
from sauce_hooks.evaluation.metrics import rate

TRUSTED_FROM = 0.90
"""Below this agreement results must say that their judge is not to be relied on."""

Part = Literal["development", "held_out"]


@dataclass(frozen=True)
class Case:
    """A description, labelled by hand."""

    part: Part
    """"development": to write judges with; "held_out": only to measure them."""
    concept: str
    truth: bool
    """Whether the description affirms that the image shows the concept."""
    case: str
    """What is difficult about it."""
    text: str


@dataclass(frozen=True)
class Disagreement:
    """A case that a judge sees otherwise."""

    case: Case
    said: Verdict


@dataclass(frozen=True)
class Agreement:
    """A judge against labels made by hand: the share on which they agree, and Cohen's kappa."""

    judge: str
    accuracy: Rate
    """Share of cases where judge and label agree, with its Wilson interval; unsure counts as a mention."""
    kappa: float
    """Cohen's kappa: agreement beyond chance; NaN if the judge or the labels say the same of all."""
    unsure: int
    """Cases that it could not tell."""
    disagreements: tuple[Disagreement, ...]

    @property
    def trusted(self) -> bool:
        """Whether it agrees with at least 90% of the labels."""
        return self.accuracy.value >= TRUSTED_FROM

    @property
    def warning(self) -> str | None:
        """What results must say if the judge is not to be trusted; None if it is."""
        if self.trusted:
            return None
        a = self.accuracy
        return (
            f"The judge {self.judge} agrees with only {100 * a.value:.1f}% [{100 * a.low:.1f}, {100 * a.high:.1f}] of {a.n} "
            f"descriptions labelled by hand (kappa {self.kappa:.2f}; {100 * TRUSTED_FROM:.0f}% are wanted). "
            "Don't rely on what it counted: use a better judge."
        )


@cache
def labelled(part: Part | None = None) -> tuple[Case, ...]:
    """The descriptions labelled by hand; docs/judges.md says how."""
    cases = (Case(**json.loads(line)) for line in read_text("labelled.jsonl").splitlines())
    return tuple(case for case in cases if part in (None, case.part))


def agreement(judge: Judge, cases: Sequence[Case] | None = None) -> Agreement:
    """How often a judge agrees with labels made by hand.

    Args:
        judge: the judge.
        cases: what to measure on; the part that no judge was developed on by default, `labelled("held_out")`.

    Raises:
        ValueError: no cases.
    """
    from statsmodels.stats.inter_rater import cohens_kappa

    cases = labelled("held_out") if cases is None else cases
    if not cases:
        raise ValueError("no cases to measure a judge on")
    said: dict[int, Verdict] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnjudgedAnswersWarning)  # they are counted below
        for concept in dict.fromkeys(case.concept for case in cases):
            at = [i for i, case in enumerate(cases) if case.concept == concept]
            said.update(zip(at, verdicts_of(judge, [cases[i].text for i in at], concept), strict=True))
    table = [[0, 0], [0, 0]]
    for i, case in enumerate(cases):
        table[case.truth][said[i] is not False] += 1
    one_sided = any(sum(row) == 0 for row in (*table, *zip(*table, strict=True)))
    kappa: Any = math.nan if one_sided else cohens_kappa(table, return_results=False)
    return Agreement(
        judge=judge.name,
        accuracy=rate(case.truth == (said[i] is not False) for i, case in enumerate(cases)),
        kappa=float(kappa),
        unsure=sum(verdict is None for verdict in said.values()),
        disagreements=tuple(
            Disagreement(case, said[i]) for i, case in enumerate(cases) if case.truth != (said[i] is not False)
        ),
    )
