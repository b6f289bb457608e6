"""What is known of a concept, as plain data: which features carry it, how strongly to edit them, where that came from.

This module stands beside `errors` under all rooms: an SAE is saved with its bank, the concepts room fills it, the erasure
room reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.errors import EditError, SAEFileError, UnknownConceptError

BANK_FORMAT = 1


@dataclass(frozen=True)
class Rate:
    """A share, with what it was counted from."""

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
    """Where in the residual stream an edit may write."""

    basis_rd: Float[Tensor, "r d"]
    """Orthonormal rows."""
    inside: bool
    """True: only what lies in the span is written. False: nothing that lies in it is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subspace) and self.inside == other.inside and torch.equal(self.basis_rd, other.basis_rd)

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
    """A named concept as features of one SAE, and how it wants to be erased."""

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


class ConceptBank(Mapping[str, Concept]):
    """Concepts by name. A mapping that saves, loads and merges; unknown names are answered with the nearest known one."""

    def __init__(self, concepts: Iterable[Concept] = ()) -> None:
        self._concepts = {concept.name: concept for concept in concepts}

    def __getitem__(self, name: str) -> Concept:
        try:
            return self._concepts[name]
        except KeyError:
            raise UnknownConceptError(name, self._concepts) from None

    def __contains__(self, name: object) -> bool:
        return name in self._concepts

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __len__(self) -> int:
        return len(self._concepts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConceptBank) and self._concepts == other._concepts

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"ConceptBank({', '.join(self._concepts)})"

    def add(self, concept: Concept) -> None:
        """Store a concept under its name, replacing an older one of that name."""
        self._concepts[concept.name] = concept

    def __or__(self, other: ConceptBank) -> ConceptBank:
        """Both banks' concepts; where both know a name, the right one's."""
        return ConceptBank([*self._concepts.values(), *other._concepts.values()])

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        data = {"format": BANK_FORMAT, "concepts": [asdict(concept) for concept in self.values()]}
        write_text_atomically(Path(path), json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ConceptBank:
        """Read what `save` wrote; `SAEFileError` if it is anything else."""
        try:
            data = cast(dict[str, Any], json.loads(Path(path).read_text(encoding="utf-8")))
            if data["format"] != BANK_FORMAT:
                raise SAEFileError(f"{path} is a bank of format {data['format']}; this version reads {BANK_FORMAT}")
            return cls(
                Concept(
                    name=str(c["name"]),
                    features=tuple(int(f) for f in c["features"]),
                    scores=tuple(float(s) for s in c["scores"]),
                    gamma=None if c["gamma"] is None else float(c["gamma"]),
                    provenance=dict(c["provenance"]),
                )
                for c in data["concepts"]
            )
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, SAEFileError):
                raise
            raise SAEFileError(f"{path} is no concept bank: {problem!r}") from problem


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # no mkstemp: the file keeps its usual permissions
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
