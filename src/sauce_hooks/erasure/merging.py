"""Edits as data, and how any number of them becomes one function of an activation.

Every edit is a change Δ of the *unedited* activation, and the changes of different SAEs add up. A feature that several
edits name is edited once: nesting must not scale it twice, for (−0.5)² would bring it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.bank import Projection
from sauce_hooks.erasure.edit import (
    Change,
    Columns,
    add_sparse_delta_,
    confined,
    decode_edit,
    dense_delta,
    gated_change,
    gates_open,
    keep_norm,
    project_out,
    sources,
)
from sauce_hooks.erasure.rules import Rule, Rules, merge_rules
from sauce_hooks.errors import EditError
from sauce_hooks.hookpoint import EditTokens

if TYPE_CHECKING:
    from sae_lens import SAE

Positions = Sequence[int] | None
"""Tokens of a unit that are edited; None: all of them."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is done at one place: features of an SAE by rules, subspaces projected out, or both."""

    tokens: EditTokens
    sae: SAE[Any] | None = None
    rules: Rules = field(default_factory=dict[int, tuple[Rule, ...]])
    """What happens to each feature: one rule for each place where it writes."""
    preserve_error: bool = True
    projections: tuple[Projection, ...] = ()
    keep_norm: bool = False
    """Whether every edited token gets its former norm back."""

    @property
    def gammas(self) -> dict[int, float]:
        """The factor γ of each feature, of several the one furthest from 1, which leaves it alone."""
        furthest = {f: max(rules, key=lambda rule: (abs(rule.gamma - 1), -rule.gamma)) for f, rules in self.rules.items()}
        return {feature: rule.gamma for feature, rule in furthest.items()}


def merge_edits(edits: Sequence[Edit]) -> Edit:
    """Edits of one SAE as one; the strongest rule for each feature.

    Raises:
        EditError: a user stated different factors for one feature.
    """
    return replace(
        edits[0],
        rules=merge_rules(edit.rules for edit in edits),
        projections=_distinct(p for edit in edits for p in edit.projections),
        keep_norm=any(edit.keep_norm for edit in edits),
    )


class MergedEdit:
    """All edits active at one place, as one function of the block's tokens.

    Raises:
        EditError: edits of different tokens, or one that drops the error beside one that cannot be put together with it.
    """

    def __init__(self, edits: Sequence[Edit]) -> None:
        policies: set[EditTokens] = {edit.tokens for edit in edits}
        if len(policies) > 1:
            raise EditError(f"edits of different tokens ({', '.join(sorted(policies))}) cannot be merged at one place")
        self.tokens: EditTokens = policies.pop() if policies else "all"
        of_features = [edit for edit in edits if edit.sae is not None]
        projections = _distinct(p for edit in edits for p in edit.projections)
        saes = {id(edit.sae): edit.sae for edit in of_features}
        kept = {edit.preserve_error for edit in of_features}
        if len(kept) > 1 or (kept == {False} and (len(saes) > 1 or len(of_features) < len(edits) or projections)):
            raise EditError(
                "an edit without the reconstruction error (preserve_error=False) replaces the whole activation, so it "
                "merges only with edits of the same SAE that drop it too"
            )
        self._keep_norm = any(edit.keep_norm for edit in edits)
        self._changes: list[_Sparse | _Ruled | _Decoded | _Projected] = []
        replaced: list[_Ruled] = []
        for sae in saes.values():
            assert sae is not None
            rules = merge_rules(edit.rules for edit in of_features if edit.sae is sae)
            if kept == {False}:
                self._changes.append(_Decoded(sae, rules))
                continue
            parts = [(f, rule) for f, of_feature in sorted(rules.items()) for rule in of_feature if not rule.is_null]
            self._changes += _changes(sae, [(f, rule) for f, rule in parts if not rule.replace], rules)
            replaced += _ruled(sae, [(f, rule) for f, rule in parts if rule.replace])
        if projections:
            self._changes.append(_Projected(projections))
        self._replaced = replaced

    @property
    def is_null(self) -> bool:
        """True if no activation can change."""
        return not self._changes and not self._replaced

    def __call__(self, x: Float[Tensor, "*batch tokens d"], chosen: Positions = None) -> Float[Tensor, "*batch tokens d"]:
        """The edited activations, in the dtype and on the device of `x`; tokens not `chosen` stay as they are."""
        with torch.autocast(x.device.type, enabled=False):  # the model's own lower precision is not for the edit
            out = x.clone(memory_format=torch.contiguous_format)
            for change in self._changes:
                change.add_to(out, x, chosen)
            if self._replaced:
                where = _where(chosen)
                out[..., where, :] = _replace(out[..., where, :], x[..., where, :], self._replaced)
            return keep_norm(out, x) if self._keep_norm else out


class _Sparse:
    """Features scaled, from their columns alone."""

    def __init__(self, columns: Columns, rules: Sequence[Rule]) -> None:
        gamma_k = torch.tensor([rule.gamma for rule in rules], device=columns.W_dec_kd.device, dtype=columns.W_dec_kd.dtype)
        self._columns, self._written_kd = columns, _confined_rows((gamma_k - 1)[:, None] * columns.W_dec_kd, rules)
        self._placed: dict[tuple[torch.device, torch.dtype], list[tuple[Columns, Tensor]]] = {}

    def add_to(self, out: Tensor, x: Tensor, chosen: Positions) -> None:
        place = (x.device, x.dtype)
        if place not in self._placed:
            written_kd = self._written_kd.to(*place)
            parts = self._columns.to(*place).parts(max(1, x.shape[-1] // 2))  # z is half as wide as x at most
            self._placed[place] = [(columns, written_kd[part]) for part, columns in parts]
        kept = None if chosen is None else _kept(tuple(chosen), x.shape[:-1], *place)
        add_sparse_delta_(out, x, self._placed[place], kept)


_Parts = Sequence[tuple[int, Rule]]
"""Features with a rule each; a feature stands there once for each place where it writes."""
_NO_RULES: Rules = MappingProxyType({})
_NULL = Rule(1.0)


class _Rules:
    """Rules of several features as tensors, where their SAE is."""

    def __init__(self, sae: SAE[Any], parts: _Parts, every: Rules = _NO_RULES) -> None:
        self.features_k = torch.tensor([f for f, _ in parts], dtype=torch.long, device=sae.W_dec.device)
        free = [_free(f, rule, every) for f, rule in parts]
        self._values_4k = _table(sae, [rule for _, rule in parts])
        self._free_4k = None if all(rule.is_null for rule in free) else _table(sae, free)

    def change(self, z: Tensor) -> Tensor:
        """Δz; of a feature that is also changed everywhere, as much as goes beyond that."""
        change = gated_change(z, *self._values_4k)
        if self._free_4k is not None:
            everywhere = gated_change(z, *self._free_4k)
            change = torch.where(change.abs() > everywhere.abs(), change - everywhere, 0)
        return change.to(z.dtype)

    def opened(self, z: Tensor) -> Tensor:
        """Where a gate is open."""
        return gates_open(z, *self._values_4k[2:])


def _table(sae: SAE[Any], rules: Sequence[Rule]) -> Float[Tensor, "4 k"]:
    table = [[rule.gamma, rule.offset, rule.gate, rule.share] for rule in rules]
    return torch.tensor(table, device=sae.W_dec.device, dtype=sae.W_dec.dtype).reshape(-1, 4).T.contiguous()


def _free(feature: int, rule: Rule, every: Rules) -> Rule:
    """Of a rule that writes to one place: the feature's rule that writes anywhere, which has been there already."""
    if rule.subspace is None or not rule.subspace.inside:
        return _NULL
    return next((other for other in every.get(feature, ()) if other.subspace is None), _NULL)


class _Ruled:
    """Features changed by their rules, from their columns where there are such, else through the whole SAE.

    The activations come to the SAE. All features have one subspace: what is decoded is confined to it as a whole.
    """

    def __init__(self, sae: SAE[Any], parts: _Parts, every: Rules = _NO_RULES) -> None:
        self._sae, self._rules = sae, _Rules(sae, parts, every)
        self._columns = Columns.of(sae, self._rules.features_k)
        self._subspace = parts[0][1].subspace

    def add_to(self, out: Tensor, x: Tensor, chosen: Positions) -> None:
        where, part = _part(x, chosen, self._sae.W_dec)
        out[..., where, :] += self.of(part).to(x.device, x.dtype)

    def of(self, part: Tensor) -> Tensor:
        """Δ of activations that are where the SAE is."""
        return confined(self._delta(part, self._rules.change), self._subspace)

    def found(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens on which a gate is open; and what would have to be added there to take these features out."""
        part = x.to(self._sae.W_dec.device, torch.promote_types(x.dtype, self._sae.W_dec.dtype))
        columns = self._columns_for(part)
        z = self._sae.encode(part)[..., self._rules.features_k] if columns is None else columns.encode(part)
        opened = self._rules.opened(z)
        change = self._delta(part, lambda z: torch.where(opened, -z, 0))
        return opened.any(-1).to(x.device), change.to(x.device, x.dtype)

    def _delta(self, part: Tensor, change: Change) -> Tensor:
        columns = self._columns_for(part)
        if columns is None:
            return dense_delta(part, self._sae, self._rules.features_k, change)
        return change(columns.encode(part)) @ columns.W_dec_kd

    def _columns_for(self, part: Tensor) -> Columns | None:
        return None if self._columns is None else self._columns.to(part.device, part.dtype)


class _Decoded:
    """The whole activation decoded anew, without the error. Alone at its place, as `MergedEdit` has made sure."""

    def __init__(self, sae: SAE[Any], rules: Rules) -> None:
        parts = [(f, rule) for f, of_feature in sorted(rules.items()) for rule in of_feature]
        if any(rule.replace for _, rule in parts):
            raise EditError(
                "an edit that replaces tokens keeps the reconstruction error of the SAE: leave preserve_error=False out"
            )
        self._sae, self._rules = sae, _Rules(sae, [(f, rule) for f, rule in parts if rule.subspace is None])
        self._confined = _ruled(sae, [(f, rule) for f, rule in parts if rule.subspace is not None], rules)

    def add_to(self, out: Tensor, x: Tensor, chosen: Positions) -> None:
        where, part = _part(x, chosen, self._sae.W_dec)
        edited = decode_edit(part, self._sae, self._rules.features_k, self._rules.change)
        edited = sum((confined_change.of(part) for confined_change in self._confined), start=edited)
        out[..., where, :] = edited.to(x.device, x.dtype)


class _Projected:
    """The union of several projections: what any of them reads is set to its target, and only what they write changes."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        left_rd, self._right_rd = (torch.cat([getattr(p, name) for p in projections]) for name in ("left_rd", "right_rd"))
        self._target_r = torch.cat([p.right_rd @ p.center_d for p in projections])
        # L′ = (L Rᵀ)⁺ L: directions of different concepts are not orthogonal, and one that is named twice is removed once.
        crossed_rr = left_rd.double() @ self._right_rd.double().T
        self._left_rd = (torch.linalg.pinv(crossed_rr, rtol=1e-6) @ left_rd.double()).to(left_rd.dtype)

    def add_to(self, out: Tensor, x: Tensor, chosen: Positions) -> None:
        where, part = _part(x, chosen, self._right_rd)
        edited = project_out(part, *(t.to(part.dtype) for t in (self._left_rd, self._right_rd, self._target_r)))
        out[..., where, :] += (edited - part).to(x.device, x.dtype)


def _changes(sae: SAE[Any], parts: _Parts, every: Rules) -> list[_Sparse | _Ruled]:
    """What rules that replace no token come to: the plain ones at once by the fast path, if the SAE has one."""
    columns = None
    scaled = [rule.is_plain and _free(f, rule, every).is_plain for f, rule in parts]
    plain = [part for part, is_scaled in zip(parts, scaled, strict=True) if is_scaled]
    if plain:
        columns = Columns.of(sae, torch.tensor([f for f, _ in plain], device=sae.W_dec.device))
    if columns is None:
        return [*_ruled(sae, parts, every)]
    beyond = [replace(rule, gamma=_beyond(rule.gamma, _free(f, rule, every).gamma)) for f, rule in plain]
    ruled = [part for part, is_scaled in zip(parts, scaled, strict=True) if not is_scaled]
    return [_Sparse(columns, beyond), *_ruled(sae, ruled, every)]


def _beyond(gamma: float, everywhere: float) -> float:
    """What is left of a factor after another: γ − 1 = (γ′ − 1) + (γ″ − 1), if it goes further at all."""
    return 1 + (gamma - everywhere) if abs(gamma - 1) > abs(everywhere - 1) else 1.0


def _ruled(sae: SAE[Any], parts: _Parts, every: Rules = _NO_RULES) -> list[_Ruled]:
    """One change for the features of each subspace."""
    by_subspace: dict[int, list[tuple[int, Rule]]] = {}
    for feature, rule in parts:
        by_subspace.setdefault(id(rule.subspace), []).append((feature, rule))
    return [_Ruled(sae, group, every) for group in by_subspace.values()]


def _confined_rows(written_kd: Float[Tensor, "k d"], rules: Sequence[Rule]) -> Float[Tensor, "k d"]:
    """Every row confined to the subspace of its rule."""
    by_subspace: dict[int, list[int]] = {}
    for row, rule in enumerate(rules):
        if rule.subspace is not None:
            by_subspace.setdefault(id(rule.subspace), []).append(row)
    for rows in by_subspace.values():
        written_kd[rows] = confined(written_kd[rows], rules[rows[0]].subspace)
    return written_kd


def _replace(out: Tensor, x: Tensor, replaced: Sequence[_Ruled]) -> Tensor:
    """Flagged tokens become the edited token that is most like them without the concept; see `sources`."""
    found = [features.found(x) for features in replaced]
    flagged = torch.stack([opened for opened, _ in found]).any(0)
    without = sum((change for _, change in found), start=torch.zeros_like(x))
    source = sources(x, x + without, flagged)
    moved = out.gather(-2, source.clamp_min(0)[..., None].expand(out.shape))
    return torch.where((source < 0)[..., None], out + without, moved)  # nothing to take: the features alone go


def _distinct(projections: Iterable[Projection]) -> tuple[Projection, ...]:
    """Each once, in an order of their own, so that the result does not hang on the order in which they came."""
    return tuple(kept for _, kept in sorted({_written_out(p): p for p in projections}.items(), key=lambda item: item[0]))


def _written_out(projection: Projection) -> bytes:
    tensors = (projection.left_rd, projection.right_rd, projection.center_d)
    return b"".join(t.detach().cpu().double().numpy().tobytes() for t in tensors)


def _where(chosen: Positions) -> Any:
    if chosen is None:
        return slice(None)
    return slice(chosen.start, chosen.stop) if isinstance(chosen, range) else list(chosen)


def _part(x: Tensor, chosen: Positions, home: Tensor) -> tuple[Any, Tensor]:
    """Where the chosen tokens are, and they themselves where the edit's own tensors are and as finely as those."""
    where = _where(chosen)
    return where, x[..., where, :].to(home.device, torch.promote_types(x.dtype, home.dtype))


@lru_cache(maxsize=64)
def _kept(
    chosen: tuple[int, ...], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, " n"] | None:
    """1 for every chosen token of every unit, 0 for the others; remembered, so that a forward copies nothing to a GPU."""
    kept_t = torch.zeros(shape[-1], dtype=dtype)
    kept_t[list(chosen)] = 1
    return None if len(chosen) == shape[-1] else kept_t.expand(shape).reshape(-1).to(device)
