"""In what two banks differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from sauce_hooks.bank.format import written_field
from sauce_hooks.bank.records import Concept


@dataclass(frozen=True)
class ConceptDiff:
    """What is another in a concept that two banks have."""

    fields: tuple[str, ...]
    """The names of the fields that differ."""
    features_added: tuple[int, ...] = ()
    features_removed: tuple[int, ...] = ()
    gamma: tuple[float | None, float | None] | None = None
    """The factors before and after, if they differ."""

    def __str__(self) -> str:
        parts: list[str] = []
        if "features" in self.fields:
            moved = "" if self.features_added or self.features_removed else " in another order"
            parts.append(f"features +{len(self.features_added)} −{len(self.features_removed)}{moved}")
        if self.gamma is not None:
            before, after = ("none" if gamma is None else f"{gamma:g}" for gamma in self.gamma)
            step = "" if None in self.gamma else f" ({_step(self.gamma):+g})"
            parts.append(f"γ {before} → {after}{step}")
        return ", ".join(parts + [name for name in self.fields if name not in ("features", "gamma")])


@dataclass(frozen=True)
class BankDiff:
    """What must happen to one bank to make it another, but for its order. Prints; is false if nothing must."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: Mapping[str, ConceptDiff] = field(default_factory=dict[str, ConceptDiff])
    groups: tuple[str, ...] = ()
    """Groups that only one of them has, or that have other members."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.groups)

    def __str__(self) -> str:
        lines = [f"+ {name!r}" for name in self.added] + [f"− {name!r}" for name in self.removed]
        lines += [f"~ {name!r}: {change}" for name, change in self.changed.items()]
        return "\n".join(lines + [f"~ group {name!r}" for name in self.groups]) or "no difference"


def compare(one: Mapping[str, Concept], other: Mapping[str, Concept]) -> BankDiff:
    """What must happen to `one` to make it `other`."""
    pairs = ((name, _changes(one[name], other[name])) for name in one if name in other)
    return BankDiff(
        added=tuple(name for name in other if name not in one),
        removed=tuple(name for name in one if name not in other),
        changed={name: change for name, change in pairs if change.fields},
    )


def _changes(before: Concept, after: Concept) -> ConceptDiff:
    differing = tuple(f.name for f in fields(Concept) if not _equal(before, after, f.name))
    old, new = set(before.features), set(after.features)
    return ConceptDiff(
        fields=differing,
        features_added=tuple(f for f in after.features if f not in old),
        features_removed=tuple(f for f in before.features if f not in new),
        gamma=(before.gamma, after.gamma) if "gamma" in differing else None,
    )


def _equal(before: Concept, after: Concept, name: str) -> bool:
    """As they would be saved where that tells more: a rate of no cases is NaN, and NaN is not equal to itself."""
    if getattr(before, name) == getattr(after, name):
        return True
    return name in ("provenance", "effect") and written_field(before, name) == written_field(after, name)


def _step(gamma: tuple[float | None, float | None]) -> float:
    before, after = gamma
    return (after or 0.0) - (before or 0.0)
