"""What is known of a concept, as plain data: which features carry it, how strongly to edit them, where that came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.errors import EditError


@dataclass(frozen=True)
class Rate:
    """A share, with what it was counted from and its 95% interval (Wilson's, where a share is of independent answers)."""

    value: float
    n: int
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""


@dataclass(frozen=True)
class CurvePoint:
    """One setting that was tried when a concept was tuned, and what came of it."""

    k: int
    gamma: float
    edit: str
    """The edit's name, and where it was allowed to write, in words; empty for the eraser's own."""
    figures: Mapping[str, Rate]
    """By the names of `evaluation.METRICS`."""
    chosen: bool = False


@dataclass(frozen=True)
class Effect:
    """What an erasure was measured to do: what a user of the concept may expect on images like those."""

    images: str
    """Which images it was measured on, in words."""
    figures: Mapping[str, Rate]
    """With the concept erased, by the names of `evaluation.METRICS`."""
    original: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    """The same of the model as it is."""
    curve: tuple[CurvePoint, ...] = ()
    """Every setting that was tried, if the concept was tuned."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """Where in the residual stream an edit may write: of a change Δ only (Δ Rᵀ) B, or all but that."""

    basis_rd: Float[Tensor, "r d"]
    """B: the directions that are written, or not."""
    inside: bool
    """True: only what lies in the span is written. False: nothing that lies in it is."""
    read_rd: Float[Tensor, "r d"] | None = None
    """R: how a change is read, R Bᵀ = 1. None: by the basis itself, whose rows are orthonormal then."""

    @property
    def reader_rd(self) -> Float[Tensor, "r d"]:
        """R, also where it is the basis itself."""
        return self.basis_rd if self.read_rd is None else self.read_rd

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Subspace)
            and self.inside == other.inside
            and torch.equal(self.basis_rd, other.basis_rd)
            and torch.equal(self.reader_rd, other.reader_rd)
        )

    def __hash__(self) -> int:
        return hash((self.inside, self.basis_rd.shape))


@dataclass(frozen=True, eq=False)
class Projection:
    """A dense erasure, x′ = x − ((x − c) Rᵀ) L with R Lᵀ = 1: no feature of an SAE plays a part."""

    left_rd: Float[Tensor, "r d"]
    """L: the directions that are written."""
    right_rd: Float[Tensor, "r d"]
    """R: the directions that are read; equal to L where the projection is orthogonal."""
    center_d: Float[Tensor, " d"]
    """c: what is left where the concept was."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Projection) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in ("left_rd", "right_rd", "center_d")
        )

    def __hash__(self) -> int:
        return hash(self.left_rd.shape)


@dataclass(frozen=True)
class Concept:
    """A named concept as features of one SAE, and how it wants to be erased.

    Raises:
        EditError: a feature named twice or negative, or scores, means or gates that are not one a feature.
    """

    name: str
    features: tuple[int, ...]
    """Feature indices (Eq. 5), most relevant first, without repeats."""
    scores: tuple[float, ...] = ()
    """The score of each feature, in the same order; empty if it was not scored."""
    gamma: float | None = None
    """The factor γ this concept wants (Eq. 6); None leaves it to the eraser."""
    edit: str | None = None
    """The edit it wants, by its name in `erasure.EDITS`; None leaves it to the eraser."""
    means: tuple[float, ...] = ()
    """μ(i, D_c): the mean activation of each feature over the images with the concept, for edits that need it."""
    gates: tuple[float, ...] = ()
    """μ(i, D_c ∪ D_nc): the mean over all images, for edits that act only above it."""
    share: float = 0.0
    """Edits with a gate act on a feature only in images in which it is above it on more than this share of the tokens."""
    keep_norm: bool = False
    """Whether every edited token gets its former norm back."""
    subspace: Subspace | None = None
    """Where the edit may write; None: anywhere."""
    projection: Projection | None = None
    """What the edit "project" does instead of editing features."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False, hash=False)
    """How it was learnt: scorer, sizes of the contrast sets, tokens; for people, not read by code."""
    effect: Effect | None = field(default=None, compare=False, hash=False)
    """What erasing it was measured to do; None if nobody measured."""

    def __post_init__(self) -> None:
        if len(set(self.features)) != len(self.features) or any(f < 0 for f in self.features):
            raise EditError(f"the features of {self.name!r} must be distinct and not negative; got {self.features}")
        for name in ("scores", "means", "gates"):
            values = getattr(self, name)
            if values and len(values) != len(self.features):
                raise EditError(f"{self.name!r} has {len(self.features)} features but {len(values)} {name}")


@dataclass(frozen=True)
class SAERecord:
    """What is remembered of the SAE that a bank's features are of, to know that SAE again."""

    architecture: str
    """As SAE-Lens calls it. Like the next two of no weight in a comparison."""
    hook_point: str
    """Dotted path of the block."""
    tower: str | None
    """Digest of the tower's record; None if there is none."""
    d_in: int
    d_sae: int
    values: tuple[float, ...]
    """A coordinate each of some features' directions, at unit length: of decoder rows, then of encoder columns."""

    TOLERANCE = 2.0**-7
    """Relative. Rounding to bfloat16 moves a weight by half of this at the most."""
    SMALLEST = 1e-5

    def difference(self, other: SAERecord) -> str | None:
        """In what another SAE differs from this one, as words; None if nothing is known in which they do.

        Another precision, and decoder norms that were folded into the encoder, are no difference.
        """
        for name in ("d_sae", "d_in"):
            then, now = getattr(self, name), getattr(other, name)
            if then != now:
                return f"{name} is {now}, not {then}"
        pairs = list(zip(self.values, other.values, strict=False))
        differing = sum(abs(a - b) > self.TOLERANCE * max(abs(a), abs(b)) + self.SMALLEST for a, b in pairs)
        return f"of {len(pairs)} weights that were compared, {differing} differ" if differing else None
