"""Trained weights beside the original ones: put into a model for a while, and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sauce_hooks.bank.files import read_regular, write_atomically
from sauce_hooks.erasure.bake import shared_copy
from sauce_hooks.errors import EditError
from sauce_hooks.hookpoint import find_towers, unwrap

Kind = Literal["lora", "full"]
Parts = Literal["language", "all"]
"""Which parts are trained: everything but the vision towers (the language model and what projects into it), or all."""
_LARGEST = 2**37


@dataclass(frozen=True, eq=False)
class Student:
    """A second model that shares the original's weights, but for those that are trained."""

    model: Any
    kind: Kind
    modules: Mapping[str, nn.Module]
    """LoRA: PEFT's layers, by the path of the layer in the original that each stands for."""
    trained: Mapping[str, nn.Parameter]
    """What is trained, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights, for a file."""
        return {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take trained weights over from a file; `EditError` if they are of other layers or shapes."""
        found, wanted = ({name: tuple(t.shape) for name, t in of.items()} for of in (tensors, self.trained))
        if found != wanted:
            other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise EditError(f"these weights are not of this model: {len(other)} differ in name or shape, first {other[0]}")
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(tensors[name])

    @contextmanager
    def inside(self, model: nn.Module) -> Generator[None]:
        """The original with the trained weights in it. Leaving puts the very same modules and memory back."""
        root = unwrap(model)
        if self.kind == "full":
            places = [(root.get_parameter(name), p.data) for name, p in self.trained.items()]
            before = [p.data for p, _ in places]
            try:
                for p, data in places:
                    p.data = data
                yield
            finally:
                for (p, _), data in zip(places, before, strict=True):
                    p.data = data
            return
        holders = [(root.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.modules]
        layers = [holder.get_submodule(name) for holder, name in holders]
        try:
            for (holder, name), layer in zip(holders, self.modules.values(), strict=True):
                setattr(holder, name, layer)
            yield
        finally:
            for (holder, name), layer in zip(holders, layers, strict=True):
                setattr(holder, name, layer)


def make_student(model: nn.Module, *, kind: Kind, parts: Parts, rank: int, adapter: str) -> Student:
    """A student whose trained weights are, or amount to, the original's.

    Args:
        model: the original; not touched.
        kind: "lora" or "full".
        parts: what is trained.
        rank: of the adapter's matrices; its α is twice that.
        adapter: the adapter's name.

    Raises:
        ImportError: LoRA without PEFT.
        EditError: no weights to train in full: quantised ones, or in half precision.
    """
    root = unwrap(model)
    towers = tuple(f"{tower.path}." for tower in find_towers(root)) if parts == "language" else ()
    student = shared_copy(root)
    if kind == "full":
        trained = {name: p for name, p in student.named_parameters() if not name.startswith(towers or "\0")}
        packed = [name for name, p in trained.items() if not p.is_floating_point()]
        if packed:
            raise EditError(f"{packed[0]} is quantised ({len(packed)} such): training in full needs the weights themselves")
        half = [name for name, p in trained.items() if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            raise EditError(
                f"{half[0]} is in half precision, where small steps round away and nothing would be learnt: load the model "
                'in float32, or train an adapter (kind="lora")'
            )
        for p in student.parameters():
            p.requires_grad_(False)
        for p in trained.values():
            p.data = p.data.clone()
            p.requires_grad_(True)
        return Student(student, kind, {}, trained)
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as problem:
        raise ImportError("unlearning with LoRA takes PEFT: pip install 'sauce-hooks[baselines]'") from problem
    head = student.get_output_embeddings()
    linear = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(towers or "\0")
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, bias="none")
    student = inject_adapter_in_model(config, student, adapter_name=adapter)
    for p in student.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # small steps would round away in half precision
    modules: dict[str, Any] = {
        name: module for name, module in student.named_modules() if isinstance(module, BaseTunerLayer)
    }
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    return Student(student, kind, modules, trained)


def write_weights(path: Path, tensors: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> None:
    """A safetensors file that says what it was made with."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(dict(tensors), {"made_with": json.dumps(made_with, sort_keys=True)}))


def read_weights(path: Path, made_with: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The weights of a file that was made with just this; None if there is none, it is another's, or is damaged."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("made_with")
        if said != json.dumps(made_with, sort_keys=True):
            return None
        return load(read_regular(path, _LARGEST))
    except (OSError, ValueError, SafetensorError):
        return None
