"""The ways to see one concept that are worth trying: which features, and where their edit may write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sauce_hooks.bank import Concept, Subspace
from sauce_hooks.concepts.learn import contrast, scorer_name
from sauce_hooks.concepts.projections import TokenMoments
from sauce_hooks.concepts.readout import keep_apart, read_out_score
from sauce_hooks.concepts.scores import Scorer
from sauce_hooks.concepts.statistics import SetStatistics
from sauce_hooks.errors import ContrastError
from sauce_hooks.sae import VisionSAE


class Sets(NamedTuple):
    """What is known of a concept's images: of features and of tokens."""

    positives: SetStatistics
    negatives: SetStatistics
    siblings: Mapping[str, SetStatistics]
    """By name, images of other concepts of its domain, without the concept."""
    moments: Mapping[str, tuple[TokenMoments, TokenMoments]]
    """Tokens of images with and without: of the concept, of its siblings, and of whatever else must be kept apart."""


def ways(
    sae: VisionSAE,
    name: str,
    sets: Sets,
    *,
    k: int,
    scorers: Sequence[str | Scorer] = ("sauce",),
    others: Iterable[Subspace] = (),
) -> list[Concept]:
    """A concept for every way; each says in `provenance["written"]` where its edit writes.

    The features by score against siblings, written anywhere; and those that the concept's own reader sees most, written
    where no other concept is read (`keep_apart`), so that a thing becomes what is there without it, or becomes a sibling.
    `smallest_edit` finds out which is best.

    Args:
        sae: the SAE.
        name: the concept.
        sets: what is known of its images, and of others.
        k: features at the most.
        scorers: for the features that are written anywhere; each is a way of its own.
        others: subspaces of further concepts to be kept apart from, such as those in a bank.

    Raises:
        ContrastError: in no way a feature tells the concept from the rest.
    """
    siblings = [sibling for sibling in sets.siblings if sibling in sets.moments]
    others = list(others)
    found: list[Concept] = []
    problem: ContrastError | None = None

    def try_it(written: str, scorer: str | Scorer, siblings: Mapping[str, SetStatistics], subspace: Subspace | None) -> None:
        nonlocal problem
        try:
            seen = contrast(name, sets.positives, sets.negatives, siblings, scorer=scorer, k=k, subspace=subspace)
            found.append(replace(seen, provenance={**seen.provenance, "written": written}))
        except ContrastError as why:
            problem = problem or why

    for scorer in scorers:
        by = "" if len(scorers) == 1 else f", by {scorer_name(scorer)}"
        try_it(f"anywhere{by}", scorer, sets.siblings, None)
    for written, towards in (("apart, as it is without", None), ("apart, as a sibling", siblings)):
        if towards is None or towards:
            subspace = keep_apart(sets.moments, others, towards={name: towards or ()})[name]
            try_it(written, read_out_score(sae.sae.W_dec, subspace), {}, subspace)
    if not found:
        assert problem is not None
        raise problem
    return found
