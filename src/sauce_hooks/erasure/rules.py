"""What an edit does to one feature, as data; and the named edits that make such rules of a concept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from sauce_hooks.bank import Concept, Subspace
from sauce_hooks.errors import EditError


@dataclass(frozen=True)
class Rule:
    """z′ = γ z + offset wherever |z| > gate, in images in which that holds on more than `share` of the tokens.

    The sign of the offset goes with that of z, which only abstopk lets be negative.
    """

    gamma: float
    offset: float = 0.0
    gate: float = 0.0
    share: float = 0.0
    replace: bool = False
    """Instead: a token on which the gate is open becomes another token of its image, on which none is."""
    subspace: Subspace | None = None
    """Where the change may be written; None: anywhere."""
    stated: float | None = None
    """The factor that the user gave by word, which another word cannot contradict; None: it is the concept's own."""

    @property
    def is_null(self) -> bool:
        """Whether it changes nothing."""
        return self.gamma == 1 and self.offset == 0 and not self.replace

    @property
    def is_plain(self) -> bool:
        """Whether it only scales, on every token: Eq. 6."""
        return self.offset == self.gate == self.share == 0 and not self.replace


def stronger(one: Rule, other: Rule) -> Rule:
    """Of two rules for a feature the one that does more; it is edited once, for (−0.5)² would bring it back.

    Which is the furthest from γ = 1, then what the other numbers say: a total order, so that the choice is commutative,
    associative and idempotent, and the order and nesting of erasers never matter.

    Raises:
        EditError: a user stated different factors.
    """
    if one == other:
        return one
    _agree(other, [one])
    first, second = _strength(one), _strength(other)
    if first == second and one.subspace != other.subspace:
        first, second = ((*s, _written_out(rule.subspace)) for s, rule in ((first, one), (second, other)))
    stated = one.stated if one.stated is not None else other.stated
    return replace(one if first >= second else other, stated=stated)


def _strength(rule: Rule) -> tuple[float | bytes, ...]:
    distance = abs(rule.gamma - 1)
    return (
        rule.replace,
        distance,
        -rule.gamma,
        abs(rule.offset),
        -rule.offset,
        -rule.gate,
        -rule.share,
        rule.subspace is None,
    )


def _written_out(subspace: Subspace | None) -> bytes:
    if subspace is None:
        return b""
    directions = torch.stack([subspace.basis_rd, subspace.reader_rd])
    return bytes([subspace.inside]) + directions.detach().cpu().double().numpy().tobytes()


Rules = Mapping[int, tuple[Rule, ...]]
"""What happens to each feature: one rule for each place where it writes."""


def merge_rules(all_rules: Iterable[Mapping[int, Rule | tuple[Rule, ...]]]) -> dict[int, tuple[Rule, ...]]:
    """One rule a feature and place: where several edits name a feature and write to the same place, the strongest.

    Two concepts that write to subspaces of their own do not stand in for one another: what a feature writes for the one
    concept erases nothing of the other. All rules that write anywhere, or anywhere but to some place, are of one place.
    """
    merged: dict[int, dict[bytes, Rule]] = {}
    for rules in all_rules:
        for feature, given in rules.items():
            held = merged.setdefault(feature, {})
            for rule in given if isinstance(given, tuple) else (given,):
                place = _place(rule)
                try:
                    _agree(rule, held.values())
                    held[place] = stronger(held[place], rule) if place in held else rule
                except EditError as problem:
                    raise EditError(f"feature {feature}: {problem}") from None
    return {feature: _ordered(held) for feature, held in merged.items()}


def _place(rule: Rule) -> bytes:
    return _written_out(rule.subspace) if rule.subspace is not None and rule.subspace.inside else b""


def _ordered(held: Mapping[bytes, Rule]) -> tuple[Rule, ...]:
    """In an order of their own; a token that is replaced keeps nothing that another rule could write to."""
    rules = [held[place] for place in sorted(held)]
    return tuple(rule for rule in rules if rule.replace) or tuple(rules)


def _agree(rule: Rule, held: Iterable[Rule]) -> None:
    for other in held:
        if rule.stated is not None and other.stated is not None and rule.stated != other.stated:
            raise _contradiction(other, rule)


def _contradiction(one: Rule, other: Rule) -> EditError:
    return EditError(
        f"contradicting factors: γ = {one.stated} and γ = {other.stated}. Give the erasers one "
        "factor, or leave gamma out: then the strongest of the concepts' own factors holds."
    )


def scale(concept: Concept, gamma: float) -> dict[int, Rule]:
    """z′ = γ z on every token. Eq. 6 of the paper."""
    return dict.fromkeys(concept.features, Rule(gamma, subspace=concept.subspace))


def gated(concept: Concept, gamma: float) -> dict[int, Rule]:
    """z′ = γ (μ_i / μ̄) z where z > μ(i, D), with μ_i = μ(i, D_c), μ̄ its mean over the concept's features.

    SAeUron (arXiv 2501.18052, Eq. 5) and SAEmnesia multiply by μ_i itself, which has the activation's unit; divided by μ̄
    the features keep their relative strength and γ is a pure number.
    """
    average = sum(_needed(concept, "means")) / len(concept.features)
    return {
        feature: Rule(gamma * mean / average, gate=gate, share=concept.share, subspace=concept.subspace)
        for feature, mean, gate in zip(concept.features, concept.means, _needed(concept, "gates"), strict=True)
    }


def clamp(concept: Concept, gamma: float) -> dict[int, Rule]:
    """z′ = γ μ(i, D_c) where z > μ(i, D), in images with more than a share of such tokens.

    Dynamic SAE Guardrails (arXiv 2504.08192), which clamps to one constant once enough tokens of an input activate a
    concept; here every feature is judged by itself, and the constant is in units of what it does on the concept.
    """
    return {
        feature: Rule(0.0, gamma * mean, gate, concept.share, subspace=concept.subspace)
        for feature, mean, gate in zip(concept.features, _needed(concept, "means"), _needed(concept, "gates"), strict=True)
    }


def replace_tokens(concept: Concept, gamma: float) -> dict[int, Rule]:
    """Where z > μ(i, D) the token becomes the most similar token of its image on which no such feature is; γ plays no part.

    PER (arXiv 2606.31699): the SAE detects, and what is written is an activation that the model has itself made.
    """
    del gamma
    gates = _needed(concept, "gates")
    return {
        f: Rule(0.0, gate=gate, share=concept.share, replace=True) for f, gate in zip(concept.features, gates, strict=True)
    }


def _needed(concept: Concept, name: str) -> tuple[float, ...]:
    values: tuple[float, ...] = getattr(concept, name)
    if len(values) != len(concept.features) or (name == "means" and concept.features and not sum(values) > 0):
        raise EditError(
            f"{concept.name!r} has no {name} of its features, which this edit needs: learn it anew with "
            "sauce_hooks.learn_concept(model, sae, name, positives, negatives), or use edit='scale'"
        )
    return values


EDITS: Mapping[str, Callable[[Concept, float], dict[int, Rule]]] = MappingProxyType(
    {"scale": scale, "gated": gated, "clamp": clamp, "replace": replace_tokens}
)
"""Edits of features by name: the rules that a concept's features get for a factor γ.

"scale" is Eq. 6, "gated" SAeUron's, "clamp" from arXiv 2504.08192, "replace" from arXiv 2606.31699.
"""
