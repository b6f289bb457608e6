"""Which tokens of an image are read, and which are edited. Two settings, always explicit, never guessed.

The paper trains on "the last image token". In CLIP the class token is first and the last token is a patch; LLaVA drops
the class token before the language model, so an SAE that only ever edits it does nothing. See docs/decisions.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.errors import TokenPolicyError
from sauce_hooks.hookpoint.families import TokenLayout
from sauce_hooks.hookpoint.resolve import HookPoint

ReadTokens = Literal["all", "patches", "class", "last"]
EditTokens = Literal["all", "patches"]


@dataclass(frozen=True)
class TokenPolicy:
    """The tokens an SAE was trained on, and the tokens an erasure edits."""

    read: ReadTokens = "patches"
    """Tokens the SAE is trained on and the concepts' statistics are taken from."""
    edit: EditTokens = "patches"
    """Tokens an eraser edits."""

    def __post_init__(self) -> None:
        if self.read not in get_args(ReadTokens) or self.edit not in get_args(EditTokens):
            raise TokenPolicyError(
                f"unknown token policy {self}: read is one of {get_args(ReadTokens)}, edit one of {get_args(EditTokens)}"
            )


def token_slice(layout: TokenLayout, tokens: ReadTokens) -> slice:
    """The positions a policy names, in a layout; `TokenPolicyError` if the tower has no such token."""
    has_class = layout.class_token == "first"
    if tokens == "class":
        if not has_class:
            raise TokenPolicyError('tokens="class": this tower has no class token. Use "patches" or "all".')
        return slice(0, 1)
    return {"all": slice(None), "patches": slice(int(has_class), None), "last": slice(-1, None)}[tokens]


def select(
    acts_btd: Float[Tensor, "batch tokens d"], layout: TokenLayout, tokens: ReadTokens
) -> Float[Tensor, "batch chosen d"]:
    """The chosen tokens of every image, as a view."""
    return acts_btd[:, token_slice(layout, tokens)]


def tokens_per_image(model: nn.Module, hook_point: HookPoint, tokens: ReadTokens) -> int:
    """How many tokens of one image a policy names, in this model."""
    config: Any = hook_point.tower_module(model).config
    patches = (config.image_size // config.patch_size) ** 2
    total = patches + (hook_point.layout.class_token == "first")
    return len(range(total)[token_slice(hook_point.layout, tokens)])
