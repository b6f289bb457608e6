"""What is known of each model family, as data: where its vision blocks are and how their tokens lie.

A new family is a new row. Nothing else in the library knows a family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one image lie in a block's output `[batch, tokens, d_in]`."""

    class_token: Literal["first", "none"]
    """Where the class token is."""


@dataclass(frozen=True)
class Family:
    """One row of the table. Paths are relative to the model that `from_pretrained` returns."""

    tower: str
    """The vision tower: the module that takes `inputs`."""
    blocks: str
    """The list of blocks, relative to the tower."""
    inputs: tuple[str, ...] = ("pixel_values",)
    """What of a batch the tower takes."""
    layout: TokenLayout = TokenLayout("first")
    reads: str | None = None
    """The config attribute that names the hidden state the language side reads; None: the tower's last block."""


_CLIP, _SIGLIP = TokenLayout("first"), TokenLayout("none")

TOWER_LAYOUTS: Mapping[str, TokenLayout] = MappingProxyType({"clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP})
"""Towers that stand inside several families: their own `model_type` decides the layout."""

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llava": Family("model.vision_tower", "encoder.layers", reads="vision_feature_layer"),
        "clip_vision_model": Family("", "encoder.layers"),
    }
)
"""By `config.model_type`."""
