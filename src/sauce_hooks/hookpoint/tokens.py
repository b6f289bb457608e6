"""Which tokens of an image are read, and which are edited. Two settings, always explicit, never guessed.

The paper trains on "the last image token". In CLIP the class token is first and the last token is a patch; LLaVA drops
the class token before the language model, so an SAE that only ever edits it does nothing. See docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sauce_hooks.errors import HookPointError, TokenPolicyError
from sauce_hooks.hookpoint.families import PLACEHOLDERS, VIDEO_PLACEHOLDERS, TokenLayout
from sauce_hooks.hookpoint.resolve import HookPoint

ReadTokens = Literal["all", "patches", "class", "last"]
"""Tokens of an image that can be read."""
EditTokens = Literal["all", "patches"]
"""Tokens of an image that can be edited."""


@dataclass(frozen=True)
class TokenPolicy:
    """The tokens an SAE was trained on, and the tokens an erasure edits.

    Raises:
        TokenPolicyError: no such tokens, or fewer than one of an image.
    """

    read: ReadTokens = "patches"
    """Tokens the SAE is trained on and the concepts' statistics are taken from."""
    edit: EditTokens = "patches"
    """Tokens an eraser edits."""
    per_image: int | None = None
    """Train on so many random ones of an image's `read` tokens, other ones for each image; None: on all of them."""

    def __post_init__(self) -> None:
        if self.per_image is not None and self.per_image < 1:
            raise TokenPolicyError(
                f"per_image is {self.per_image}: train on at least one token of an image, or None for all"
            )
        if self.read not in get_args(ReadTokens) or self.edit not in get_args(EditTokens):
            raise TokenPolicyError(
                f"unknown token policy {self}: read is one of {get_args(ReadTokens)}, edit one of {get_args(EditTokens)}"
            )


def default_policy(hook_point: HookPoint) -> TokenPolicy:
    """Every patch; and the class token where the language side reads that too, for the concept is in it as well.

    At a language layer the patches are read and every token is edited: the words behind an image have looked at it in the
    layers before.
    """
    return TokenPolicy(edit="all" if hook_point.layout.class_read or hook_point.place == "language" else "patches")


def as_tokens(output: Any, hook_point: HookPoint) -> Float[Tensor, "units tokens d"]:
    """What a block gave, as tokens: one unit an image (or a tile of one), all images in one unit where they are packed.

    A view wherever the layout allows; `HookPointError` if the block gave something else.
    """
    acts: Any = output[0] if isinstance(output, tuple) else output
    layout, d = hook_point.layout, hook_point.d_in
    dims = {"batch": (3,), "packed": (2, 3), "grid": (4,), "maps": (4,)}[layout.shape]
    axis = 1 if layout.shape == "maps" else -1
    if not isinstance(acts, Tensor) or acts.ndim not in dims or acts.shape[axis] != d:
        found = tuple(acts.shape) if isinstance(acts, Tensor) else type(acts).__name__
        raise HookPointError(
            f"{hook_point.path} gave {found}, and not {d} wide activations laid out as {layout.shape!r}. Is this the model "
            "the hook point was found in?"
        )
    if layout.shape == "packed":
        return acts if acts.ndim == 3 else acts[None]
    if layout.shape == "grid":
        return acts.flatten(1, 2)
    if layout.shape == "maps":
        return rearrange(acts, "units d rows columns -> units (rows columns) d")
    return acts


def as_output(acts_utd: Float[Tensor, "units tokens d"], output: Any, hook_point: HookPoint) -> Any:
    """Tokens laid out again as the block gave them; the inverse of `as_tokens`."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    if hook_point.layout.shape == "maps":
        edited = rearrange(acts_utd, "units (rows columns) d -> units d rows columns", rows=first.shape[2])
    else:
        edited = acts_utd.reshape(first.shape)
    return (edited, *output[1:]) if isinstance(output, tuple) else edited


def positions(layout: TokenLayout, tokens: ReadTokens, n: int) -> range | list[int]:
    """The positions that a policy names among the `n` tokens of a unit; `TokenPolicyError` if there is no such token."""
    if tokens == "class" and layout.class_token == "none":
        raise TokenPolicyError('tokens="class": this tower has no class token. Use "patches" or "all".')
    if layout.tiles_in_row is None:
        return _within(layout, tokens, n)
    length, stride = layout.tiles_in_row
    return [tile + i for tile in range(0, n, stride) for i in _within(layout, tokens, length)]


def _within(layout: TokenLayout, tokens: ReadTokens, n: int) -> range:
    first = layout.class_token == "first"
    last = layout.class_token == "last"
    return {
        "all": range(n),
        "patches": range(first + layout.registers, n - last),
        "class": range(1) if first else range(n - 1, n),
        "last": range(n - 1, n),
    }[tokens]


def select(
    acts_utd: Float[Tensor, "units tokens d"], layout: TokenLayout, tokens: ReadTokens
) -> Float[Tensor, "units chosen d"]:
    """The chosen tokens of every unit."""
    chosen = positions(layout, tokens, acts_utd.shape[1])
    return acts_utd[:, chosen.start : chosen.stop] if isinstance(chosen, range) else acts_utd[:, chosen]


def select_from(
    output: Any, hook_point: HookPoint, tokens: ReadTokens, config: Any, arguments: Mapping[str, Any]
) -> Float[Tensor, "units chosen d"]:
    """The chosen tokens of what a block gave, one unit an image; at a language layer those of all rows in one unit.

    Args:
        output: what the block gave.
        hook_point: the block.
        tokens: the policy; at a language layer "patches" (the image's positions), "last" (the last of them in each row) or
            "all" (every token that is no padding).
        config: the model's config, which says what stands for an image in the text.
        arguments: what the model was called with, by name.

    Raises:
        TokenPolicyError: no such token.
        HookPointError: where the images are in the text cannot be told, or they are nowhere.
    """
    acts_utd = as_tokens(output, hook_point)
    if hook_point.place != "language":
        return select(acts_utd, hook_point.layout, tokens)
    if tokens == "class":
        raise TokenPolicyError(f'tokens="class": {hook_point.path} has no class token. Use "patches", "last" or "all".')
    given: Any = arguments.get("attention_mask") if tokens == "all" else image_positions(config, arguments)
    where_ut = torch.ones_like(acts_utd[..., 0], dtype=torch.bool) if tokens == "all" and given is None else given
    if not isinstance(where_ut, Tensor) or where_ut.shape != acts_utd.shape[:2] or not where_ut.any():
        raise HookPointError(
            f"where the images are in the text that reaches {hook_point.path} cannot be told: give batches of model inputs "
            "with input_ids that hold the image's tokens, as processor(images=..., text=...) makes them"
        )
    where_ut = where_ut.to(acts_utd.device, torch.bool)
    if tokens == "last":
        where_ut = where_ut & (where_ut.cumsum(1) == where_ut.sum(1, keepdim=True))
    return acts_utd[where_ut][None]


def image_positions(config: Any, arguments: Mapping[str, Any]) -> Bool[Tensor, "rows tokens"] | None:
    """Where images and videos are in the text of a call; None without `input_ids`, or where no token stands for them."""
    ids: Any = arguments.get("input_ids")
    stand_ins = {*placeholder_ids(config, PLACEHOLDERS), *placeholder_ids(config, VIDEO_PLACEHOLDERS)}
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not stand_ins:
        return None
    return torch.isin(ids, torch.tensor(sorted(stand_ins), device=ids.device, dtype=ids.dtype))


def placeholder_ids(config: Any, names: Sequence[str]) -> Iterator[int]:
    """The placeholders that a config names, itself or in one of its parts."""
    parts = [part for part in vars(config).values() if hasattr(part, "model_type")] if config is not None else []
    for part in (config, *parts):
        found = next((getattr(part, name, None) for name in names if isinstance(getattr(part, name, None), int)), None)
        if found is not None:
            yield found


def draw(acts_btd: Float[Tensor, "batch tokens d"], n: int, generator: torch.Generator) -> Float[Tensor, "batch drawn d"]:
    """`n` random tokens of each image, in their order, none twice; all of them where there are no more than `n`.

    Args:
        acts_btd: the tokens of some images.
        n: how many of each.
        generator: a generator of the CPU; it alone decides, whatever device the activations are on.
    """
    if acts_btd.shape[1] <= n:
        return acts_btd
    chosen = torch.rand(acts_btd.shape[:2], generator=generator).topk(n, dim=1).indices.sort(dim=1).values
    return acts_btd.gather(1, chosen.to(acts_btd.device)[:, :, None].expand(-1, -1, acts_btd.shape[2]))


def tokens_per_image(model: nn.Module, hook_point: HookPoint, tokens: ReadTokens) -> int | None:
    """How many tokens of one image a policy names in this model; None where that depends on the image."""
    config: Any = hook_point.tower_module(model).config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    layout = hook_point.layout
    if hook_point.place != "tower" or not layout.fixed or layout.shape == "maps" or size is None or patch is None:
        return None
    (height, width), (rows, columns) = ((s, s) if isinstance(s, int) else tuple(s) for s in (size, patch))
    total = (height // rows) * (width // columns) + (layout.class_token != "none") + layout.registers
    return len(positions(layout, tokens, total))
