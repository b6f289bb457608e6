"""Edits as data, and how any number of them becomes one function of an activation.

Every edit is a change Δ of the *unedited* activation, and the changes of different SAEs add up. A feature that several
edits name is edited once: nesting must not scale it twice, for (−0.5)² would bring it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.erasure.edit import Columns, decode_edit, dense_delta_edit, project_out, sparse_delta_edit
from sauce_hooks.errors import EditError
from sauce_hooks.hookpoint import EditTokens

if TYPE_CHECKING:
    from sae_lens import SAE

Change = Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """Scale features of an SAE (Eq. 6)."""

    sae: SAE[Any]
    gammas: dict[int, float]
    """The factor γ of each feature; 1 leaves it alone."""
    preserve_error: bool
    tokens: EditTokens


@dataclass(frozen=True, eq=False)
class ProjectionEdit:
    """Remove a subspace, without an SAE: what lies along it becomes what the centre has there."""

    directions_rd: Float[Tensor, "r d"]
    center_d: Float[Tensor, " d"]
    tokens: EditTokens


Edit = FeatureEdit | ProjectionEdit


def merge_gammas(all_gammas: Iterable[dict[int, float]]) -> dict[int, float]:
    """One factor a feature: where several edits name it, the strongest, which is the one furthest from 1.

    Concepts tuned apart may share a feature and want different factors; the strongest forgets all of them. The rule is
    commutative, associative and idempotent, so the order and the nesting of erasers never matter.
    """
    merged: dict[int, float] = {}
    for gammas in all_gammas:
        for feature, gamma in gammas.items():
            merged[feature] = max(merged.get(feature, 1.0), gamma, key=lambda g: (abs(g - 1), -g))
    return merged


class MergedEdit:
    """All edits active at one place, as one function of the block's tokens."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        policies: set[EditTokens] = {edit.tokens for edit in edits}
        if len(policies) > 1:
            raise EditError(f"edits of different tokens ({', '.join(sorted(policies))}) cannot be merged at one place")
        self.tokens: EditTokens = policies.pop() if policies else "all"
        features = [edit for edit in edits if isinstance(edit, FeatureEdit)]
        saes = {id(edit.sae): edit.sae for edit in features}
        kept = {edit.preserve_error for edit in features}
        if len(kept) > 1 or (kept == {False} and (len(saes) > 1 or len(features) < len(edits))):
            raise EditError(
                "an edit without the reconstruction error (preserve_error=False) replaces the whole activation, so it "
                "merges only with edits of the same SAE that drop it too"
            )
        self._changes = [
            _scale(sae, merge_gammas(e.gammas for e in features if e.sae is sae), kept == {True}) for sae in saes.values()
        ]
        projections = [edit for edit in edits if isinstance(edit, ProjectionEdit)]
        if projections:
            self._changes.append(_projection(projections))

    @property
    def is_null(self) -> bool:
        """True if no activation can change."""
        return all(change.is_null for change in self._changes)

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The edited activations, in the dtype and on the device of `x`."""
        live = [change for change in self._changes if not change.is_null]
        if len(live) == 1:
            return live[0](x).to(x.dtype)
        return (x + sum(change(x) - x for change in live)).to(x.dtype)


class _Compiled:
    """A change with its tensors, which follow the activation to whatever device and dtype it has."""

    def __init__(self, tensors: dict[str, Tensor], apply: Callable[..., Tensor], is_null: bool = False) -> None:
        self.is_null = is_null
        self._tensors, self._apply = tensors, apply
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        # Computed in the finer of both precisions: bf16 activations meet an fp32 SAE in fp32, fp64 ones in fp64.
        own = next(t.dtype for t in self._tensors.values() if t.is_floating_point())
        place = (x.device, torch.promote_types(x.dtype, own))
        if place not in self._placed:
            self._placed[place] = {
                name: t.to(place[0], place[1] if t.is_floating_point() else None) for name, t in self._tensors.items()
            }
        return self._apply(x.to(place[1]), **self._placed[place])


def _scale(sae: SAE[Any], gammas: dict[int, float], preserve_error: bool) -> _Compiled:
    effective = {f: g for f, g in gammas.items() if g != 1} if preserve_error else gammas
    features_k = torch.tensor(sorted(effective), dtype=torch.long, device=sae.W_dec.device)
    gamma_k = torch.tensor([effective[f] for f in sorted(effective)], device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    columns = Columns.of(sae, features_k) if preserve_error else None
    if columns is not None:

        def sparse(x: Tensor, gamma_k: Tensor, **tensors: Tensor) -> Tensor:
            return sparse_delta_edit(x, Columns(**tensors), gamma_k)

        return _Compiled({**vars(columns), "gamma_k": gamma_k}, sparse, is_null=not effective)
    whole = dense_delta_edit if preserve_error else decode_edit

    def dense(x: Tensor, gamma_k: Tensor) -> Tensor:  # the SAE stays where it is; the activations come to it
        home = sae.W_dec.device
        return whole(x.to(home), sae, features_k, gamma_k.to(home)).to(x.device)

    return _Compiled({"gamma_k": gamma_k}, dense, is_null=preserve_error and not effective)


def _projection(edits: Sequence[ProjectionEdit]) -> _Compiled:
    center = edits[0].center_d
    if any(not torch.equal(edit.center_d, center) for edit in edits):
        raise EditError("projections with different centres cannot be merged at one place")
    stacked = torch.cat([edit.directions_rd for edit in edits])
    # An orthonormal basis of the union: a direction that several edits name is removed once.
    _, singular, basis = torch.linalg.svd(stacked.double(), full_matrices=False)
    basis = basis[singular > 1e-6 * singular.max()].to(stacked.dtype)
    return _Compiled({"directions_rd": basis, "center_d": center}, project_out)
