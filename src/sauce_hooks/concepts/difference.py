"""Differences of concepts: "red, but not what orange shares"."""

from __future__ import annotations

from dataclasses import replace

from sauce_hooks.bank import Concept
from sauce_hooks.errors import EditError


def difference(concept: Concept, *others: Concept, name: str | None = None) -> Concept:
    """The features of a concept that none of the others has, with the concept's own settings for them.

    What it was measured to do is left out, and a projection it may have: those are of all of it.

    Args:
        concept: the concept.
        others: those whose features are left out.
        name: of the new concept; by default the names with a minus between them.

    Raises:
        EditError: nothing is left, or the concept is a projection, which has no features to leave out.
    """
    if concept.edit == "project":
        raise EditError(f"{concept.name!r} is erased by a projection: there are no features of other concepts to leave out")
    taken = {feature for other in others for feature in other.features}
    kept = [i for i, feature in enumerate(concept.features) if feature not in taken]
    names = [other.name for other in others]
    if not kept:
        raise EditError(f"all {len(concept.features)} features of {concept.name!r} are also those of {', '.join(names)}")

    return replace(
        concept,
        name=" − ".join([concept.name, *names]) if name is None else name,
        features=tuple(concept.features[i] for i in kept),
        scores=tuple(concept.scores[i] for i in kept if concept.scores),
        means=tuple(concept.means[i] for i in kept if concept.means),
        gates=tuple(concept.gates[i] for i in kept if concept.gates),
        provenance={**concept.provenance, "difference": [concept.name, *names]},
        projection=None,
        effect=None,
    )
