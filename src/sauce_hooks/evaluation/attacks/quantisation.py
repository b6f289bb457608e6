"""Weights rounded to 8 or 4 bits: what a small change of the weights had hidden can come back (arXiv 2410.16454)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sauce_hooks.errors import AttackError
from sauce_hooks.evaluation.attacks.record import Leak
from sauce_hooks.evaluation.attacks.subject import Subject, compare
from sauce_hooks.hookpoint import find_towers, unwrap

Bits = Literal[4, 8]
GROUP = 32
"""Weights that share a scale at 4 bits, as in the common formats; a row's at 8 bits."""


@dataclass(frozen=True)
class Quantisation:
    """The model as it is when it forgets, with the weights of its linear layers rounded.

    An eraser is no weight, and edits what the rounded tower gives; its own numbers stay as they are.
    """

    bits: Sequence[Bits] = (8, 4)
    towers: Sequence[bool] = (True, False)
    """Whether the vision tower is quantised too."""
    name: str = "quantisation"

    def __call__(self, subject: Subject) -> list[Leak]:
        """What is affirmed and named at each width."""
        found: list[Leak] = []
        for bits in self.bits:
            for tower in self.towers:
                with subject.forget(), quantised(subject.model, bits, tower=tower):
                    under = subject.look()
                setting = f"{bits} bit, tower too" if tower else f"{bits} bit, not the tower"
                found.append(Leak(self.name, setting, subject.method, subject.concept, compare(subject.before, under)))
        return found


@contextmanager
def quantised(model: nn.Module, bits: int, *, tower: bool = True) -> Generator[None]:
    """Round a model's linear layers for the length of a `with`; afterwards it has its own parameters, the very same, again.

    Symmetric weight-only quantisation by torchao's `quantize_`: 8 bits with a scale a row, 4 bits with a scale for
    `GROUP` weights. What is rounded are the weights as they are now: enter it inside of whatever has changed them.
    A LoRA adapter of PEFT that is in effect is merged first, as its user would. Embeddings, the output head, norms and
    biases keep their precision, as usual. Entering an eraser inside works as well: its modules stay where they are.

    Args:
        model: any model with linear layers.
        bits: 8 or 4.
        tower: the vision tower, too.

    Raises:
        AttackError: no linear layer that could be quantised, or another number of bits.
        ImportError: torchao is missing.
    """
    import torch

    if bits not in (4, 8):
        raise AttackError(f"{bits} bits: weights are rounded to 8 or 4")
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports] - an optional extra
            IntxWeightOnlyConfig,
            quantize_,
        )
        from torchao.quantization.granularity import PerAxis, PerGroup  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise ImportError("quantising takes torchao: pip install 'sauce-hooks[attacks]'") from problem

    root = unwrap(model)
    layers = _linear(root, tower)
    if not layers:
        raise AttackError(f"{type(root).__name__} has no linear layer with plain weights: is it quantised already?")
    former = [(layer, layer.weight, layer.weight.requires_grad) for layer in layers]
    with _merged_adapters(root):
        try:
            box = nn.ModuleList(layers)  # quantize_ goes through a module; the layers stay where they are
            by_group = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP))
            by_row = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0))

            def grouped(layer: nn.Module, name: str) -> bool:
                return isinstance(layer, nn.Linear) and bits == 4 and layer.in_features % GROUP == 0

            def whole(layer: nn.Module, name: str) -> bool:
                return isinstance(layer, nn.Linear) and not grouped(layer, name)

            quantize_(box, by_row, filter_fn=whole)
            quantize_(box, by_group, filter_fn=grouped)
            yield
        finally:
            for layer, weight, trained in former:
                layer.weight = weight
                layer.weight.requires_grad_(trained)
                layer.__dict__.pop("extra_repr", None)  # how torchao has it say what it is


def _linear(root: Any, tower: bool) -> list[nn.Linear]:
    """The linear layers that are quantised; of an adapter's wrapper what it wraps."""
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    kept = set() if tower else {id(module) for found in find_towers(root) for module in found.module.modules()}
    layers: list[nn.Linear] = []
    for name, module in root.named_modules():
        if not isinstance(module, nn.Linear) or module is head or id(module) in kept or "lora_" in name:
            continue
        if type(module.weight) is nn.Parameter and module.weight.is_floating_point():
            layers.append(module)
    return layers


@contextmanager
def _merged_adapters(root: nn.Module) -> Generator[None]:
    """PEFT's adapters that are in effect made part of the weights; afterwards bit by bit as before."""
    adapted = [m for m in root.modules() if callable(getattr(m, "merge", None)) and hasattr(m, "base_layer")]
    adapted = [m for m in adapted if not getattr(m, "merged", False) and not getattr(m, "disable_adapters", False)]
    layers: list[Any] = list(adapted)
    former = [(layer, layer.get_base_layer().weight, layer.get_base_layer().weight.detach().clone()) for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, parameter, values in former:
            layer.unmerge()
            parameter.data.copy_(values)  # adding and taking away again rounds
