"""Reading a hook point with nnsight: the tower runs up to the hooked block and stops; the model is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations.images import Inputs, iter_inputs, to_device
from sauce_hooks.errors import HookPointError, ImagesError, NonFiniteActivationsError
from sauce_hooks.hookpoint import (
    PIXELS,
    VIDEOS,
    HookPoint,
    ReadTokens,
    find_towers,
    select_from,
    untouched,
    unwrap,
)


def read_tokens(
    model: Any,
    images: Any,
    hook_point: HookPoint,
    *,
    tokens: ReadTokens,
    processor: Any = None,
    batch_size: int = 64,
) -> Iterator[Float[Tensor, "batch chosen d_in"]]:
    """The chosen tokens of every image, a batch of images at a time, in order.

    Where images have any number of tokens (`layout.fixed` is False: tiles, packed patches), each is a batch of its own, and
    so is each batch of model inputs.

    Raises:
        ImagesError: nothing readable, or images without a processor.
        HookPointError: the images do not reach the block.
        NonFiniteActivationsError: NaN or infinity in an activation.
    """
    root = unwrap(model)
    hook_point.module(root)  # a hook point of another model fails here, before anything is run
    for inputs in iter_inputs(images, processor, batch_size if hook_point.layout.fixed else 1):
        yield read_batch(root, inputs, hook_point, tokens=tokens)


def read_batch(
    root: nn.Module, inputs: Inputs, hook_point: HookPoint, *, tokens: ReadTokens
) -> Float[Tensor, "batch chosen d_in"]:
    """The chosen tokens of one batch of model inputs; where images have any number of tokens, all in one row of the batch.

    Raises:
        NonFiniteActivationsError: a row holds NaN or infinity.
        HookPointError, TokenPolicyError: as `read_tokens` does.
    """
    output = _output(root, inputs, hook_point)
    chosen = select_from(output, hook_point, tokens, getattr(root, "config", None), inputs)
    if not hook_point.layout.fixed:
        chosen = rearrange(chosen, "units tokens d -> 1 (units tokens) d")
    if not torch.isfinite(chosen).all():
        bad = int((~torch.isfinite(chosen)).any(-1).sum())
        raise NonFiniteActivationsError(
            f"{bad} of {chosen.shape[0] * chosen.shape[1]} rows at {hook_point.path} hold NaN or infinity. "
            f"The model runs in {chosen.dtype}: look for damaged weights, or load it in bfloat16 or float32."
        )
    return chosen


@torch.no_grad()
def _output(root: nn.Module, inputs: Inputs, hook_point: HookPoint) -> Any:
    """What the block gives for one batch. nnsight leaves `forward` and `__nnsight__` in every module it has wrapped."""
    from nnsight import NNsight

    tower = hook_point.tower_module(root)
    parameter = next(p for p in tower.parameters() if p.is_floating_point())
    function, arguments = _way_in(root, tower, hook_point, inputs)
    with untouched(root):
        traced = NNsight(tower)
        block = traced.get(_relative(hook_point.path, hook_point.tower))
        trace: Any = traced.trace(fn=function, **to_device(arguments, parameter))
        try:
            with trace as tracer:
                output = block.output.save()
                tracer.stop()
        except Exception as problem:
            if "MissedProvider" not in type(problem).__name__:  # the model's own error says more than we could
                raise
            raise HookPointError(f"these inputs ({', '.join(inputs)}) never reach {hook_point.path}") from problem
        return output  # pyright: ignore[reportPossiblyUnboundVariable] - nnsight runs the block above elsewhere


def _relative(path: str, root: str) -> str:
    return path[len(root) + 1 :] if root else path


def _way_in(root: nn.Module, tower: nn.Module, hook_point: HookPoint, inputs: Inputs) -> tuple[Callable[..., Any], Inputs]:
    """How images get to the tower: with their text through the model itself, else through what encodes images alone."""
    pixels = next((inputs[name] for name in (*PIXELS, *VIDEOS) if name in inputs), None)
    if pixels is None:
        raise ImagesError(f"the batch has no pixel_values (it has {', '.join(inputs)}): these are no images' inputs")
    if "input_ids" in inputs:
        return root, inputs
    if hook_point.place == "language":
        raise ImagesError(
            f"{hook_point.path} reads text, and the batch has no input_ids: give batches of model inputs, as "
            "processor(images=..., text=..., return_tensors='pt') makes them from an image and a prompt"
        )
    encode = getattr(root, "get_image_features", None)
    if encode is not None and (hook_point.place == "projector" or hook_point.tower == find_towers(root)[0].path):
        inner = getattr(getattr(root, "base_model", root), "get_image_features", encode)  # what it hands its **kwargs to
        if not _lacks(inner, inputs):
            return encode, {**_accepted(encode, inputs), **_accepted(inner, inputs)}
    name = next(iter(inspect.signature(tower.forward).parameters))
    stacked = pixels.ndim > 4 and hook_point.layout.tiles_in_row is None
    many = pixels.flatten(0, -4) if stacked else pixels  # [images, tiles, ...] one after another
    return tower, {**_accepted(tower.forward, inputs), name: many}


def _lacks(function: Callable[..., Any], inputs: Inputs) -> bool:
    """Whether it must be given more than there is: the question, say."""
    parameters = inspect.signature(function).parameters.values()
    return any(
        p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in inputs for p in parameters
    )


def _accepted(function: Callable[..., Any], inputs: Inputs) -> Inputs:
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    named = {name: inputs[name] for name in names if name in inputs}
    return named or inputs


def read_activations(
    model: Any,
    inputs: Any,
    hook_point: HookPoint,
    *,
    tokens: ReadTokens = "patches",
    processor: Any = None,
    batch_size: int = 64,
) -> Iterator[Float[Tensor, "n d_in"]]:
    """Read the residual stream at a hook point, through nnsight, stopping after the hooked block.

    Args:
        model: the vision-language model; its modules are exactly as before after every batch.
        inputs: a folder, paths, PIL images, arrays, a Hugging Face dataset with a column "image", or batches of model
            inputs (these need no processor).
        hook_point: where, from `find_hook_point`.
        tokens: which tokens of each image: "patches", "all", "class" or "last".
        processor: the model's processor.
        batch_size: images a forward of the tower.

    Yields:
        Rows `[n, d_in]` on the model's device, in its dtype: the chosen tokens of a batch's images, one after another.
    """
    for acts_btd in read_tokens(model, inputs, hook_point, tokens=tokens, processor=processor, batch_size=batch_size):
        yield rearrange(acts_btd, "batch tokens d -> (batch tokens) d")
