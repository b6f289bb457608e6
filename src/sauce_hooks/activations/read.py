"""Reading a hook point with nnsight: the tower runs up to the hooked block and stops; the model is left as it was."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations.images import Inputs, iter_inputs, to_device
from sauce_hooks.errors import NonFiniteActivationsError
from sauce_hooks.hookpoint import HookPoint, ReadTokens, select, untouched


@contextmanager
def _traced(tower: nn.Module) -> Generator[Any]:
    """The tower under nnsight, which leaves `forward` and `__nnsight__` in every module and never takes them out again."""
    from nnsight import NNsight

    with untouched(tower):
        yield NNsight(tower)


def _relative(path: str, root: str) -> str:
    return path[len(root) + 1 :] if root else path


def read_tokens(
    model: nn.Module,
    images: Any,
    hook_point: HookPoint,
    *,
    tokens: ReadTokens,
    processor: Any = None,
    batch_size: int = 64,
) -> Iterator[Float[Tensor, "batch chosen d_in"]]:
    """The chosen tokens of every image, a batch of images at a time, in order.

    Raises:
        ImagesError: nothing readable, or images without a processor.
        NonFiniteActivationsError: NaN or infinity in an activation.
    """
    tower = hook_point.tower_module(model)
    hook_point.module(model)  # a hook point of another model fails here, before anything is run
    parameter = next(tower.parameters())
    for inputs in iter_inputs(images, processor, batch_size):
        chosen = _read_batch(tower, to_device(inputs, hook_point.tower_inputs, parameter), hook_point, tokens)
        if not torch.isfinite(chosen).all():
            bad = int((~torch.isfinite(chosen)).any(-1).sum())
            raise NonFiniteActivationsError(
                f"{bad} of {chosen.shape[0] * chosen.shape[1]} rows at {hook_point.path} hold NaN or infinity. "
                f"The model runs in {parameter.dtype}: look for damaged weights, or load it in bfloat16 or float32."
            )
        yield chosen


@torch.no_grad()
def _read_batch(tower: nn.Module, inputs: Inputs, hook_point: HookPoint, tokens: ReadTokens) -> Tensor:
    with _traced(tower) as traced:
        block = traced.get(_relative(hook_point.path, hook_point.tower))
        with traced.trace(**inputs) as tracer:
            output = block.output.save()
            tracer.stop()
    acts_btd: Tensor = output[0] if isinstance(output, tuple) else output
    return select(acts_btd, hook_point.layout, tokens)


def read_activations(
    model: nn.Module,
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
