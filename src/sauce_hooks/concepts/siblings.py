"""Features that a concept shares with its siblings, found by contrast within the domain.

Against images of anything else, what all tigers and cats have in common speaks for "tiger", and erasing it takes the cats
too. Against images of cats it says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.concepts.scores import Scorer
from sauce_hooks.concepts.statistics import SetStatistics

ROUNDING = 1e-12
"""A score this near to 0 says nothing: sums of equal numbers in another order differ by as much."""


def worst_contrast(
    score: Scorer, positives: SetStatistics, negatives: SetStatistics, siblings: Mapping[str, SetStatistics]
) -> Float[Tensor, " d_sae"]:
    """S(i) = min over D in {D_nc, D_1, …, D_s} of score(D_c, D)(i): what a feature tells apart where it tells least.

    A feature that is as active on some sibling as on the concept scores 0 or less and cannot be selected; one that is
    weaker there is worth less. Without siblings it is the score itself.

    Args:
        score: the score of a concept's images against others.
        positives: images with the concept, D_c.
        negatives: images without it, D_nc.
        siblings: by name, images of other concepts of its domain that lack it, D_1 to D_s.
    """
    return torch.stack([score(positives, others) for others in (negatives, *siblings.values())]).amin(0)


def left_out(
    score: Scorer,
    positives: SetStatistics,
    negatives: SetStatistics,
    siblings: Mapping[str, SetStatistics],
    features: Collection[int],
) -> dict[str, list[int]]:
    """Of these features, those that score above 0 against the negatives but not against some sibling, by that sibling.

    Each is named once, under the sibling on which it scores lowest.
    """
    found: dict[str, list[int]] = {}
    if siblings:
        alone_f = score(positives, negatives)
        lowest_f, which_f = torch.stack([score(positives, others) for others in siblings.values()]).min(0)
        names = list(siblings)
        for feature in features:
            if alone_f[feature] > ROUNDING and lowest_f[feature] <= ROUNDING:
                found.setdefault(names[int(which_f[feature])], []).append(feature)
    return found
