"""Which features two or more concepts share: erasing the one then weakens the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.bank import Concept

if TYPE_CHECKING:
    import pandas as pd

    from sauce_hooks.sae import VisionSAE

SHOWN = 20
"""Pairs that are printed."""


@dataclass(frozen=True)
class SharedPair:
    """Two concepts that share features."""

    a: str
    b: str
    features: tuple[int, ...]
    """Those that both have, in ascending order."""
    jaccard: float
    """|F_a ∩ F_b| / |F_a ∪ F_b|."""
    mass_a: float
    """The part of a's scores that lies on shared features: Σ_{i ∈ F_a ∩ F_b} |s_i| / Σ_{i ∈ F_a} |s_i|."""
    mass_b: float
    """The part of b's."""
    cosine: float | None
    """Between the directions that are written, Σ_i |s_i| W_dec[i]; None without an SAE."""


@dataclass(frozen=True)
class Overlap:
    """What the concepts of a bank have in common. Prints as a small table."""

    n_concepts: int
    pairs: tuple[SharedPair, ...]
    """Those that share features, the ones that share most of their scores first."""
    features: Mapping[int, tuple[str, ...]]
    """The concepts of every feature that more than one has, in ascending order of features."""

    def to_frame(self) -> pd.DataFrame:
        """One row a pair."""
        import pandas as pd

        rows = [{**asdict(pair), "n_features": len(pair.features)} for pair in self.pairs]
        columns = ["a", "b", "n_features", "jaccard", "mass_a", "mass_b", "cosine", "features"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def __str__(self) -> str:
        said = f"{len(self.pairs)} pairs of {self.n_concepts} concepts share {len(self.features)} features"
        if not self.pairs:
            return said
        header = ("concept", "and", "features", "Jaccard", "of its scores", "of the other's", "cosine")
        rows = [header, *(_cells(pair) for pair in self.pairs[:SHOWN])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        more = len(self.pairs) - SHOWN
        return "\n".join([said, *lines, *([f"… and {more} more pairs"] if more > 0 else [])])


def overlap(concepts: Iterable[Concept] | Mapping[str, Concept], sae: VisionSAE | None = None) -> Overlap:
    """Which features concepts share, and how much of each lies on them.

    The pairs come from a sparse product, concepts × features with itself: for 1,000 concepts that takes about as long as
    making the list of those that share something.

    Args:
        concepts: a bank, or concepts.
        sae: the SAE that they belong to, for the cosine of what they write.

    A concept without scores counts its features alike.
    """
    from scipy import sparse

    listed = list(concepts.values() if isinstance(concepts, Mapping) else concepts)
    weights = [_weights(concept) for concept in listed]
    owner = np.repeat(np.arange(len(listed)), [len(concept.features) for concept in listed])
    feature = np.array([f for concept in listed for f in concept.features], dtype=np.int64)
    shape = (len(listed), int(feature.max(initial=-1)) + 1)
    holds: Any = sparse.csr_array((np.ones(len(owner), dtype=np.int64), (owner, feature)), shape=shape)
    first, second = sparse.triu(holds @ holds.T, k=1).nonzero()
    cosines = [None] * len(first) if sae is None else _cosines(listed, weights, sae)[first, second].tolist()
    pairs = [
        _pair((listed[a], listed[b]), (weights[a], weights[b]), cosine)
        for a, b, cosine in zip(first, second, cosines, strict=True)
    ]
    pairs.sort(key=lambda pair: (-max(pair.mass_a, pair.mass_b), -pair.jaccard))
    return Overlap(len(listed), tuple(pairs), _held_by_several(listed))


def _weights(concept: Concept) -> dict[int, float]:
    """Of its features, adding up to 1."""
    sizes = [abs(score) for score in concept.scores]
    total = sum(sizes)
    even = [1 / len(concept.features)] * len(concept.features) if concept.features else []
    return dict(zip(concept.features, [size / total for size in sizes] if total > 0 else even, strict=True))


def _pair(
    of: tuple[Concept, Concept], weights: tuple[dict[int, float], dict[int, float]], cosine: float | None
) -> SharedPair:
    features = sorted(weights[0].keys() & weights[1].keys())
    mass_a, mass_b = (sum(weight[feature] for feature in features) for weight in weights)
    jaccard = len(features) / len(weights[0].keys() | weights[1].keys())
    return SharedPair(of[0].name, of[1].name, tuple(features), jaccard, mass_a, mass_b, cosine)


@torch.no_grad()
def _cosines(
    concepts: Sequence[Concept], weights: Sequence[Mapping[int, float]], sae: VisionSAE
) -> Float[Tensor, "concepts concepts"]:
    W_dec: Float[Tensor, "d_sae d_in"] = sae.sae.W_dec.detach().float()
    directions = [
        W_dec.new_tensor(list(weight.values())) @ W_dec[list(concept.features)]
        for concept, weight in zip(concepts, weights, strict=True)
    ]
    units_cd = torch.nn.functional.normalize(torch.stack(directions), dim=1).cpu()
    return (units_cd @ units_cd.T).clamp(-1, 1)


def _held_by_several(concepts: Iterable[Concept]) -> dict[int, tuple[str, ...]]:
    holders: dict[int, list[str]] = {}
    for concept in concepts:
        for feature in concept.features:
            holders.setdefault(feature, []).append(concept.name)
    return {feature: tuple(names) for feature, names in sorted(holders.items()) if len(names) > 1}


def _cells(pair: SharedPair) -> tuple[str, ...]:
    cosine = "-" if pair.cosine is None else f"{pair.cosine:.2f}"
    shares = f"{pair.jaccard:.2f}", f"{pair.mass_a:.0%}", f"{pair.mass_b:.0%}", cosine
    return (_short(pair.a), _short(pair.b), str(len(pair.features)), *shares)


def _short(name: str) -> str:
    """On one line."""
    line = " ".join(name.split())
    return line if len(line) <= 30 else line[:29] + "…"
