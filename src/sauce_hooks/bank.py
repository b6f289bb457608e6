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

from sauce_hooks.errors import EditError, SAEFileError, UnknownConceptError

BANK_FORMAT = 1


@dataclass(frozen=True)
class Concept:
    """A named concept as features of one SAE."""

    name: str
    features: tuple[int, ...]
    """Feature indices (Eq. 5), most relevant first, without repeats."""
    scores: tuple[float, ...] = ()
    """The score of each feature, in the same order; empty if it was not scored."""
    gamma: float | None = None
    """The factor γ this concept wants (Eq. 6); None leaves it to the eraser."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False, hash=False)
    """How it was learnt: scorer, sizes of the contrast sets, tokens; for people, not read by code."""

    def __post_init__(self) -> None:
        if len(set(self.features)) != len(self.features) or any(f < 0 for f in self.features):
            raise EditError(f"the features of {self.name!r} must be distinct and not negative; got {self.features}")
        if self.scores and len(self.scores) != len(self.features):
            raise EditError(f"{self.name!r} has {len(self.features)} features but {len(self.scores)} scores")


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
