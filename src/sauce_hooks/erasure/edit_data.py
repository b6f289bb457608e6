"""Edits as tensors and plain data, and back: what a baked model holds, and what is written to disk.

An edit is a frozen dataclass of numbers, texts, tensors, further such records and an SAE. Its tensors are taken out by
name; what remains is JSON. Nothing but our own records and SAE-Lens's SAEs can come back out of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sauce_hooks import bank
from sauce_hooks.erasure import merging, rules
from sauce_hooks.erasure.edit import Columns
from sauce_hooks.erasure.merging import Edit

_RECORDS: dict[str, Any] = {
    name: kind for module in (bank, merging, rules) for name, kind in vars(module).items() if is_dataclass(kind)
}
"""What an edit may be made of."""
_BY_FEATURE = ("W_enc", "b_enc", "W_dec", "threshold")
"""Weights of an element-wise SAE that each feature has its own part of."""


@dataclass(frozen=True)
class EditData:
    """Edits, taken apart."""

    plan: dict[str, Any]
    """JSON-ready; tensors are named in it."""
    tensors: dict[str, Tensor]

    def edits(self) -> tuple[Edit, ...]:
        """The edits, put together again around these very tensors.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: the plan is damaged, or does not fit the tensors.
        """
        return tuple(edit for edit, _ in self.numbered())

    def numbered(self) -> tuple[tuple[Edit, tuple[int, ...] | None], ...]:
        """Every edit with the numbers that its features had in the whole SAE; None if it holds that, or no SAE."""
        built: list[Any] = []
        for data in self.plan["records"]:
            built.append(self._built(data, built))
        edits = [built[i] for i in self.plan["edits"]]
        numbers = {id(built[sae["record"]]): tuple(sae["features"] or ()) or None for sae in self.plan["saes"]}
        return tuple((edit, numbers.get(id(edit.sae))) for edit in edits)

    def _built(self, data: Any, built: Sequence[Any]) -> Any:
        if isinstance(data, list):
            return tuple(self._built(item, built) for item in data)
        if not isinstance(data, dict):
            return data
        ((kind, value),) = cast(dict[str, Any], data).items()
        if kind == "tensor":
            return self.tensors[value]
        if kind == "record":
            return built[value]
        if kind == "mapping":
            return {key: self._built(item, built) for key, item in value}
        if kind == "sae":
            return _sae(value["config"], self._built(value["weights"], built))
        return _RECORDS[kind](**{name: self._built(item, built) for name, item in value.items()})


def take_apart(edits: Sequence[Edit]) -> EditData:
    """Edits as a plan and tensors; of an SAE whose features are independent of each other, only those that are edited."""
    parts = _Parts()
    slim = _slimmed(edits, parts)
    plan = [parts.data(edit, f"edit{i}")["record"] for i, edit in enumerate(slim)]
    return EditData({"records": parts.records, "saes": parts.saes, "edits": plan}, parts.tensors)


def put_beside(held: EditData, edits: Sequence[Edit]) -> list[Edit]:
    """Held edits and others as one list, those of one and the same SAE on one object, so that they merge as they should."""
    return [*(_on_one_of(_saes(edits), *pair) for pair in held.numbered()), *edits]


def shared_features(held: EditData, edit: Edit) -> tuple[int, ...]:
    """The features of an edit that are among the held ones: the same numbers of the same SAE."""
    restored = [_on_one_of(_saes([edit]), *pair) for pair in held.numbered()] if edit.sae is not None else []
    mine = {feature for other in restored if other.sae is edit.sae for feature in other.rules}
    return tuple(sorted(mine & set(edit.rules)))


class _Parts:
    """What has been taken apart so far; what stands in several places is one record, and comes back as one object."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.records: list[Any] = []
        self.saes: list[dict[str, Any]] = []
        self._known: list[tuple[Any, int]] = []

    def data(self, value: Any, name: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            known = next((other for other, tensor in self.tensors.items() if tensor is value), None)
            if known is None and name in self.tensors:
                raise TypeError(f"two tensors of an edit would be called {name!r}")
            self.tensors[known or name] = value
            return {"tensor": known or name}
        if isinstance(value, Mapping):
            items = cast(Mapping[Any, Any], value).items()
            return {"mapping": [[key, self.data(item, f"{name}_{key}")] for key, item in items]}
        if isinstance(value, tuple | list):
            return [self.data(item, f"{name}_{i}") for i, item in enumerate(cast(Sequence[Any], value))]
        return {"record": self._record(value, name)}

    def add_sae(self, sae: Any, features: tuple[int, ...] | None) -> None:
        """Note an SAE, all of one or only some features."""
        config = json.loads(json.dumps({**sae.cfg.to_dict(), "metadata": {}}, default=str))
        weights = self.data(dict(sae.state_dict()), f"sae{len(self.saes)}")
        index = self._note(sae, {"sae": {"config": config, "weights": weights}})
        self.saes.append({"record": index, "features": features and list(features)})

    def _record(self, value: Any, name: str) -> int:
        known = next((index for other, index in self._known if other is value), None)
        if known is not None:
            return known
        kind = type(value).__name__
        if _RECORDS.get(kind) is not type(value):
            raise TypeError(f"an edit holds a {kind}, which cannot be baked")
        return self._note(
            value, {kind: {f.name: self.data(getattr(value, f.name), f"{name}_{f.name}") for f in fields(value)}}
        )

    def _note(self, value: Any, data: Any) -> int:
        self.records.append(data)
        self._known.append((value, len(self.records) - 1))
        return len(self.records) - 1


def _slimmed(edits: Sequence[Edit], parts: _Parts) -> list[Edit]:
    """The edits with as little of their SAEs as they need."""
    slim = {id(edit): edit for edit in edits}
    for sae in _saes(edits):
        same = [edit for edit in edits if edit.sae is sae]
        features = tuple(sorted({feature for edit in same for feature in edit.rules}))
        index = torch.tensor(features, dtype=torch.long, device=sae.W_dec.device)
        if not all(edit.preserve_error for edit in same) or Columns.of(sae, index) is None:
            parts.add_sae(sae, None)
            continue
        few = _few(sae, index) if features else None
        if few is not None:
            parts.add_sae(few, features)
        number = {feature: i for i, feature in enumerate(features)}
        slim.update({id(edit): _renumbered(edit, few, number) for edit in same})
    return [slim[id(edit)] for edit in edits]


def _few(sae: Any, features_k: Tensor) -> Any:
    weights = {
        name: weight.index_select(1 if name == "W_enc" else 0, features_k) if name in _BY_FEATURE else weight
        for name, weight in sae.state_dict().items()
    }
    return _sae({**sae.cfg.to_dict(), "metadata": {}, "d_sae": len(features_k)}, weights)


def _sae(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """An SAE around these very tensors."""
    from sae_lens import SAE

    sae = SAE.from_dict({**config, "device": "meta"})  # nothing is drawn for weights that are given
    sae.load_state_dict(dict(weights), assign=True)
    sae.device = sae.W_dec.device
    return sae.eval().requires_grad_(False)


def _renumbered(edit: Edit, sae: Any, number: Mapping[int, int]) -> Edit:
    return replace(edit, sae=sae, rules={number[feature]: rule for feature, rule in edit.rules.items()})


def _saes(edits: Sequence[Edit]) -> list[Any]:
    """Every SAE once."""
    return list({id(edit.sae): edit.sae for edit in edits if edit.sae is not None}.values())


def _on_one_of(saes: Sequence[Any], edit: Edit, features: tuple[int, ...] | None) -> Edit:
    """A held edit on that one of some SAEs that it was made with; as it is held, if it was made with none of them."""
    for sae in saes if edit.sae is not None else ():
        if _is_of(edit.sae, sae, features):
            return _renumbered(edit, sae, dict(enumerate(features or range(sae.W_dec.shape[0]))))
    return edit


def _is_of(held: Any, sae: Any, features: tuple[int, ...] | None) -> bool:
    """Whether one SAE is, or is some features of, another: weight by weight."""
    here, there = held.state_dict(), sae.state_dict()
    if here.keys() != there.keys() or held.cfg.architecture() != sae.cfg.architecture():
        return False
    if features and max(features) >= sae.W_dec.shape[0]:
        return False
    for name, weight in there.items():
        if features is not None and name in _BY_FEATURE:
            weight = weight.index_select(1 if name == "W_enc" else 0, torch.tensor(features, device=weight.device))
        if weight.shape != here[name].shape or not torch.equal(weight.to(here[name]), here[name]):
            return False
    return True
