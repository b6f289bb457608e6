"""Which concepts the original model knows: the forgetting of what was never known means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sauce_hooks.bank import Rate


@dataclass(frozen=True)
class Eligibility:
    """What the original model must know of a concept for it to count. Concepts below are reported, and left out of means."""

    accuracy: float = 0.5
    """Of its answers to "is c there?", in as many images without c as with it (the metric `known`), the lower end of
    Wilson's interval must be above this: it answers surely better than a coin, or than one who always says the same."""
    named: float = 0.25
    """Share of the images of c whose description names c, at least. Below it UA_g is high before anything is erased."""

    def reason(self, rates: Mapping[str, Rate]) -> str | None:
        """Why a concept does not count, by the original model's figures; None if it does."""
        known, named, described = rates["known"], 1 - rates["UA_g"].value, rates["UA_g"].n
        if known.n and known.low <= self.accuracy:
            return (
                f"the original model answers {_percent(known.value)} of {known.n} yes/no questions for it rightly, so "
                f"surely no more than {_percent(known.low)}; over {_percent(self.accuracy)} is asked"
            )
        if described and named < self.named:
            return (
                f"the original model names it in {_percent(named)} of {described} descriptions of its images; "
                f"{_percent(self.named)} is asked"
            )
        return None


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
