"""What an eraser says of itself: what is attached where, with which features, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sauce_hooks.erasure.attach import attachments
from sauce_hooks.erasure.attachment import Scope
from sauce_hooks.hookpoint import Place

if TYPE_CHECKING:
    from sauce_hooks.erasure.eraser import ConceptEraser


@dataclass(frozen=True)
class EraserStatus:
    """A snapshot; it does not change with the eraser."""

    attached: int
    """How many times it is on (each `with` counts)."""
    scope: Scope
    """What it erases: whatever goes through the model, or only what this thread or task runs."""
    path: str
    """The block whose output is edited."""
    place: Place
    """Whether that is in the vision tower or behind it."""
    block: int
    """Index of that block."""
    n_blocks: int
    reads: tuple[int, ...]
    """The blocks that the language side reads."""
    concepts: Mapping[str, tuple[int, ...]]
    """The features of each concept."""
    gammas: Mapping[int, float]
    """The factor of every feature."""
    rows: tuple[tuple[str, ...], ...] | None
    """The concepts of each row of a batch, for an eraser for rows."""
    preserve_error: bool
    """Whether the SAE's reconstruction error is kept."""
    others: int
    """How many other edits are on at the same block."""
    images_seen: int
    """Calls of the model with images since it was attached."""
    tower_runs: int
    """Forwards of the vision tower since then."""
    edits_run: int
    """How often the edit ran in them."""
    proven: bool
    """Whether the language side was seen to read the edited activations; that takes one forward with an image."""
    problem: str | None
    """Why it does not take effect, if that came out."""

    def __str__(self) -> str:
        state = f"on {self.attached} times" if self.attached > 1 else "on" if self.attached else "off"
        effect = self.problem or ("proven" if self.proven else "not yet seen: no image so far")
        lines = {
            "eraser": f"{state}, scope {self.scope!r}, {self.others} other edits at this block",
            "block": f"{self.path} ({self._where()})",
            **{f"  {name}": _features(features, self.gammas) for name, features in self.concepts.items()},
            "error": "kept" if self.preserve_error else "dropped",
            "runs": f"{self.images_seen} calls with images, {self.tower_runs} of the tower, {self.edits_run} of the edit",
            "effect": effect,
        }
        if self.rows is not None:
            lines["rows"] = "; ".join(", ".join(row) or "nothing" for row in self.rows)
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def _where(self) -> str:
        if self.place == "projector":
            return "the projector"
        counted = f"{self.block + 1} of {self.n_blocks}"
        if self.place == "language":
            return f"language layer {counted}"
        return f"{counted}; read: {', '.join(str(i + 1) for i in self.reads)}"


def _features(features: tuple[int, ...], gammas: Mapping[int, float]) -> str:
    shown = ", ".join(f"{feature} (γ = {gammas.get(feature, 1):g})" for feature in features[:8])
    return f"{len(features)} features: {shown}" + (", …" if len(features) > 8 else "")


def _total(counts: list[int], default: int) -> int:
    return sum(counts, start=default)


def status_of(eraser: ConceptEraser) -> EraserStatus:
    """The status of an eraser."""
    own, point = eraser._attachments, eraser.hook_point  # pyright: ignore[reportPrivateUsage]
    there = [a for a in attachments(eraser.model) if a.hook_point.path == point.path]
    concepts = [*eraser.concepts, *(concept for row in eraser.rows or () for concept in row)]
    edits = [eraser.edit, *(eraser._row_edits or ())]  # pyright: ignore[reportPrivateUsage]
    # On twice it has seen the same runs twice, but with scope "task" each time other ones.
    together = _total if eraser.scope == "task" else max
    return EraserStatus(
        attached=len(own),
        scope=eraser.scope,
        path=point.path,
        place=point.place,
        block=point.layer,
        n_blocks=point.n_layers,
        reads=point.reads,
        concepts={concept.name: concept.features for concept in concepts},
        gammas={feature: gamma for edit in edits for feature, gamma in edit.gammas.items()},
        rows=None if eraser.rows is None else tuple(tuple(c.name for c in row) for row in eraser.rows),
        preserve_error=eraser.edit.preserve_error,
        others=len([a for a in there if a not in own]),
        images_seen=together([a.images_seen for a in own], default=0),
        tower_runs=together([a.tower_runs for a in own], default=0),
        edits_run=together([a.edits_run for a in own], default=0),
        proven=any(a.proven for a in own),
        problem=next((a.problem for a in own if a.problem), None),
    )
