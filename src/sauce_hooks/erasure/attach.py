"""The one place that touches a model: hooks put in, counted, checked and taken out again.

The hook goes before all others (`prepend=True`): transformers 5 records `hidden_states` with permanent hooks of its own,
LLaVA reads what they recorded, and a hook behind them would change nothing at all.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sauce_hooks.erasure.merging import Edit, MergedEdit
from sauce_hooks.errors import IneffectiveEraserError
from sauce_hooks.hookpoint import HookPoint, token_slice, untouched

_lock = threading.RLock()
_places: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()
_proven: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass(eq=False)
class Attachment:
    """One edit on one model; what `attach` gives and `detach` takes."""

    hook_point: HookPoint
    edit: Edit
    place: _Place
    tower_runs: int = 0
    """Forwards of the tower since it was attached."""
    edits_run: int = 0
    """How many of them reached the hooked block."""


@dataclass(eq=False)
class _Place:
    """A hooked block: the edits active there, merged, behind one hook."""

    hook_point: HookPoint
    active: list[Attachment] = field(default_factory=list["Attachment"])
    merged: MergedEdit = field(default_factory=lambda: MergedEdit(()))
    handles: list[RemovableHandle] = field(default_factory=list[RemovableHandle])

    def on_tower(self, module: nn.Module, args: Any, output: Any) -> None:
        # Counted when it has run to its end: reading with nnsight stops the tower before other people's hooks.
        del module, args, output
        for attachment in self.active:
            attachment.tower_runs += 1

    def on_block(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        for attachment in self.active:
            attachment.edits_run += 1
        if self.merged.is_null:
            return None
        if isinstance(output, tuple):
            return (self.edited(output[0]), *output[1:])
        return self.edited(output)

    def edited(self, acts_btd: Tensor) -> Tensor:
        where = token_slice(self.hook_point.layout, self.merged.tokens)
        if acts_btd.ndim != 3 or acts_btd.shape[-1] != self.hook_point.d_in:
            raise IneffectiveEraserError(
                f"{self.hook_point.path} gave a tensor of shape {tuple(acts_btd.shape)}; an eraser for this family edits "
                f"[batch, tokens, {self.hook_point.d_in}]"
            )
        edited = acts_btd.clone()
        edited[:, where] = self.merged(acts_btd[:, where])
        return edited


def attach(model: nn.Module, hook_point: HookPoint, edit: Edit) -> Attachment:
    """Put an edit into effect; with others already there it is merged, in whatever order they come.

    Raises:
        IneffectiveEraserError: what the block writes does not reach the language side.
        EditError: it contradicts an edit already there. Nothing has changed then.
        HookPointError: the model has no such place.
    """
    block = hook_point.module(model)
    with _lock:
        check_effect(model, hook_point)
        place = _places.get(block) or _Place(hook_point)
        attachment = Attachment(hook_point, edit, place)
        merged = MergedEdit([*(other.edit for other in place.active), edit])
        if not place.active:
            place.handles = [
                hook_point.tower_module(model).register_forward_hook(place.on_tower, prepend=True),
                block.register_forward_hook(place.on_block, prepend=True),
            ]
            _places[block] = place
        place.active, place.merged = [*place.active, attachment], merged
    return attachment


def detach(attachment: Attachment) -> None:
    """Take an edit out of effect; the model is as it was once the last one is gone."""
    place = attachment.place
    with _lock:
        place.active = [other for other in place.active if other is not attachment]
        place.merged = MergedEdit([other.edit for other in place.active])
        if not place.active:
            for handle in place.handles:
                handle.remove()
            place.handles = []
            for block, other in list(_places.items()):
                if other is place:
                    del _places[block]


def check_ran(attachment: Attachment) -> None:
    """`IneffectiveEraserError` if the tower ran while the edit was attached and the edit did not run as often."""
    if attachment.edits_run < attachment.tower_runs:
        missed = "images went by unedited" if attachment.edits_run else "nothing was erased"
        raise IneffectiveEraserError(
            f"the vision tower ran {attachment.tower_runs} times, but the edit of {attachment.hook_point.path} "
            f"{attachment.edits_run} times: {missed}. Was the block replaced, or the model compiled, after the eraser was "
            "attached?"
        )


def check_effect(model: nn.Module, hook_point: HookPoint) -> None:
    """Prove, once per model and hook point, that the language side reads what the block writes.

    Costs one forward of the tower on a batch of two equal images: the block's output is disturbed for the second, and
    the image features that the language model gets must differ.
    """
    if hook_point.layer > hook_point.last_read:
        raise IneffectiveEraserError(
            f"{hook_point.path} is block {hook_point.layer + 1} of {hook_point.n_layers}, but the language side reads the "
            f"output of block {hook_point.last_read + 1}: an edit there changes nothing. "
            "Use find_hook_point(model), which picks a block that is read."
        )
    get_features = getattr(model, "get_image_features", None)
    if hook_point.path in _proven.setdefault(model, set()) or get_features is None:
        return  # a bare vision tower: whatever reads it is not ours to know

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        first = output[0] if isinstance(output, tuple) else output
        noise = torch.linspace(-1, 1, first.shape[-1], device=first.device).pow(3).to(first.dtype)
        disturbed = first.clone()
        disturbed[1:] += noise * (1 + first[1:].abs().amax())  # not constant over d: LayerNorm would remove that
        return (disturbed, *output[1:]) if isinstance(output, tuple) else disturbed

    tower = hook_point.tower_module(model)
    vision: Any = tower.config
    parameter = next(tower.parameters())
    pixels = torch.zeros(
        (2, vision.num_channels, vision.image_size, vision.image_size), device=parameter.device, dtype=parameter.dtype
    )
    # A first forward makes transformers install hooks of its own; they are its business once the user's own forward comes.
    with untouched(model), torch.no_grad():
        handle = hook_point.module(model).register_forward_hook(disturb, prepend=True)
        try:
            features = _tensors(get_features(pixel_values=pixels))
        finally:
            handle.remove()
    if torch.equal(features[0], features[1]):
        raise IneffectiveEraserError(
            f"an edit of {hook_point.path} does not reach the language side of {type(model).__name__}: the image features "
            "it gets stay the same. Is this the block it reads?"
        )
    _proven[model].add(hook_point.path)


def _tensors(features: Any) -> list[Tensor]:
    """What `get_image_features` gives to the language side, one tensor an image."""
    if isinstance(features, Mapping):
        features = features["pooler_output"]
    return list(features)
