"""The eraser as `evaluate` takes it, and other methods that a run can be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from sauce_hooks.bank import Concept
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.provenance import provenance_of


@dataclass(frozen=True, eq=False)
class Erasing:
    """A method that erases a concept as the SAE's bank has it, known again by the SAE and the concepts in the bank."""

    model: nn.Module
    sae: VisionSAE
    allow_bypass: bool = False
    """As `ConceptEraser` takes it."""

    def __call__(self, concept: str) -> ConceptEraser:
        """The eraser of one concept."""
        return ConceptEraser(self.model, self.sae, [concept], allow_bypass=self.allow_bypass)

    @cached_property
    def settings(self) -> dict[str, object]:
        """What decides what it does: a run is not gone on with after these have changed."""
        concepts = {name: _known_by(concept) for name, concept in self.sae.concepts.items()}
        return {"sae": provenance_of(self.sae)["sae"], "concepts": concepts}


@dataclass(frozen=True, eq=False)
class Known:
    """A method known again by its settings."""

    make: Callable[[str], AbstractContextManager[Any]]
    settings: Mapping[str, object]

    def __call__(self, concept: str) -> AbstractContextManager[Any]:
        """What `make` makes."""
        return self.make(concept)


def _known_by(concept: Concept) -> str:
    """All that an edit is made of."""
    plain = (concept.features, concept.gamma, concept.edit, concept.means, concept.gates, concept.share, concept.keep_norm)
    subspace, projection = concept.subspace, concept.projection
    written = [subspace.basis_rd, subspace.reader_rd] if subspace is not None else []
    written += [projection.left_rd, projection.right_rd, projection.center_d] if projection is not None else []
    inside = None if subspace is None else subspace.inside
    hashed = hashlib.sha256(f"{plain} {inside}".encode())
    for tensor in written:
        hashed.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
