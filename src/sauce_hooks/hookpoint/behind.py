"""Places behind a vision tower: the projector, and the decoder layers of the language model."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn

from sauce_hooks.hookpoint.families import BEHIND, TokenLayout
from sauce_hooks.hookpoint.wrappers import submodule

Place = Literal["tower", "projector", "language"]
"""Which part of a model a hook point lies in."""


class Found(NamedTuple):
    """What a `HookPoint` says of such a place."""

    path: str
    place: Place
    layer: int
    n_layers: int
    d_in: int
    layout: TokenLayout


def find_behind(root: nn.Module, family: str, tower: TokenLayout, name: str) -> Found | None:
    """The place that a dotted path names, also by its path in the model with or without a head; None if it is none of these.

    Args:
        root: the model, unwrapped.
        family: its `model_type`.
        tower: how the tokens of its first tower lie.
        name: the path.
    """
    row, text = BEHIND.get(family), _text_config(root)
    if row is None or text is None:
        return None
    if row.projector is not None and _same(name, row.projector) and (path := _path(root, row.projector)) is not None:
        shape = row.shape or ("packed" if tower.shape == "packed" else "batch")
        layout = TokenLayout(shape=shape, fixed=tower.fixed, class_read=False, even=tower.even)
        return Found(path, "projector", 0, 1, int(text.hidden_size), layout)
    stack, _, index = name.rpartition(".")
    layers = _path(root, row.layers)
    if layers is None or not _same(stack, row.layers) or not index.isdecimal():
        return None
    n = len(list(submodule(root, layers).children()))
    if int(index) >= n:
        return None
    # A row of text is no image, and holds any number of tokens of one.
    layout = TokenLayout(fixed=False, class_read=False)
    return Found(f"{layers}.{int(index)}", "language", int(index), n, int(text.hidden_size), layout)


def listing_behind(root: nn.Module, family: str) -> str:
    """What there is to name behind the tower, as a sentence."""
    row = BEHIND.get(family)
    layers = row and _path(root, row.layers)
    if row is None or layers is None:
        return f"Behind the tower of {family!r} no place is known that every image goes through as tokens."
    projector = row.projector and _path(root, row.projector)
    n = len(list(submodule(root, layers).children()))
    found = f"Behind it are the language layers {layers}.0 to {layers}.{n - 1}"
    return f"{found} and the projector {projector}." if projector else f"{found}; its projector cannot be edited."


def _same(name: str, path: str) -> bool:
    return name.removeprefix("model.") == path.removeprefix("model.")


def _path(root: nn.Module, path: str) -> str | None:
    """Where a family's module is in this model: in a base model the leading `model.` is missing."""
    for candidate in (path, path.removeprefix("model.")):
        try:
            submodule(root, candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _text_config(root: nn.Module) -> Any:
    config: Any = getattr(root, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    return text if isinstance(getattr(text, "hidden_size", None), int) else None
