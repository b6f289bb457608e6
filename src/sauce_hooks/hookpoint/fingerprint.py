"""Which tower is it: a few of its weights, remembered, so that an SAE is not used on another one.

Only what decides the hooked activation counts: the tower from its start up to the hooked block. The weights are
compared by value and in their order, not by name and not bit by bit, so that the same checkpoint is known again inside
another model, in another precision, with adapters on it, and with its linear layers quantised.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

Size = int | tuple[int, ...] | None
"""Pixels: one number for a square; None where the tower takes any."""

_PER_TENSOR = 2
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights are kept in that mean what they say, finest first; 8 bits and fewer need a scale kept elsewhere."""
_SMALLEST = 2.0**-24
"""float16 holds nothing finer."""


@dataclass(frozen=True)
class TowerRecord:
    """What is remembered of the tower an SAE belongs to, as `record_tower` makes it."""

    values: tuple[float | None, ...]
    """Two weights of every embedding and norm up to the hooked block; None: not to be had (offloaded, packed)."""
    linear_values: tuple[float | None, ...]
    """The same of every linear layer. Quantisation packs these, or takes them out of the parameters altogether."""
    layer: int
    """Index of the hooked block."""
    n_layers: int
    """Blocks of the tower."""
    d_in: int
    """Width of the residual stream."""
    image_size: Size
    """Pixels of an image's side."""
    patch_size: Size
    """Pixels of a patch's side."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the weights are one string each, not a thousand lines."""
        return {
            "values": _text(self.values),
            "linear_values": _text(self.linear_values),
            "layer": self.layer,
            "n_layers": self.n_layers,
            "d_in": self.d_in,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TowerRecord:
        """Inverse of `to_dict`; also takes what JSON made of it.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            values=_numbers(data["values"]),
            linear_values=_numbers(data["linear_values"]),
            layer=_whole(data["layer"]),
            n_layers=_whole(data["n_layers"]),
            d_in=_whole(data["d_in"]),
            image_size=_read_size(data["image_size"]),
            patch_size=_read_size(data["patch_size"]),
        )


def record_tower(
    tower: nn.Module, block: nn.Module, *, layer: int, n_layers: int, d_in: int, size_of: nn.Module | None = None
) -> TowerRecord:
    """Remember a tower. Costs a few milliseconds and one transfer per device; changes nothing.

    Args:
        tower: the vision tower, or the whole model for a place behind it; its `config` may say `image_size` and
            `patch_size`.
        block: the hooked block, one of the tower's modules.
        layer: the block's index.
        n_layers: blocks of the tower.
        d_in: width of the residual stream.
        size_of: whose `config` says the sizes, if not the tower's own does: of a whole model, its tower's.

    Raises:
        ValueError: the block is not in the tower.
    """
    plain, linear = _weights(tower, block)
    values = _sample(plain + linear)
    config = getattr(tower if size_of is None else size_of, "config", None)
    return TowerRecord(
        values=values[: _PER_TENSOR * len(plain)],
        linear_values=values[_PER_TENSOR * len(plain) :],
        layer=layer,
        n_layers=n_layers,
        d_in=d_in,
        image_size=_config_size(config, "image_size"),
        patch_size=_config_size(config, "patch_size"),
    )


def difference(recorded: TowerRecord, here: TowerRecord) -> str | None:
    """In what two towers differ, as one sentence without its full stop; None if nothing is known in which they do.

    Later blocks, and their number, do not matter. Where no weight is known on both sides (`comparable`), what is left to
    compare is the geometry: ignorance is no difference.
    """
    if recorded.layer != here.layer:
        then, now = (f"block {record.layer} (of 0 to {record.n_layers - 1})" for record in (recorded, here))
        return f"this is {now} of its tower, not {then}"
    for name, then, now in (
        ("its residual stream is {} wide", recorded.d_in, here.d_in),
        ("its images are {} pixels a side", recorded.image_size, here.image_size),
        ("its patches are {} pixels a side", recorded.patch_size, here.patch_size),
    ):
        if then is not None and now is not None and then != now:
            return f"the tower is another: {name.format(_said(now))}, not {_said(then)}"
    if len(recorded.values) != len(here.values):
        then, now = (len(record.values) // _PER_TENSOR for record in (recorded, here))
        return f"the tower is another: up to this block it has {now} tensors besides its linear layers', not {then}"
    pairs = _pairs(recorded, here)
    differing = _n_differing(pairs)
    if differing:
        return f"the tower's weights are others: of {len(pairs)} that were compared, {differing} differ"
    return None


def comparable(recorded: TowerRecord, here: TowerRecord) -> bool:
    """Whether any weight is known on both sides. If none is, `difference` cannot tell two towers of one shape apart."""
    return bool(_pairs(recorded, here))


def _weights(tower: nn.Module, block: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Every weight up to and including the block, in order: those that quantisation leaves alone, and the linear layers'.

    Linear layers go by the name of their class too: not every quantised one is an `nn.Linear`.
    """
    plain: list[Tensor] = []
    linear: list[Tensor] = []
    modules = list(_until(tower, block))
    if block not in modules:
        raise ValueError(f"{type(block).__name__} is no module of {type(tower).__name__}")
    for module in modules:
        is_linear = isinstance(module, nn.Linear) or "linear" in type(module).__name__.lower()
        (linear if is_linear else plain).extend(p for name, p in module.named_parameters(recurse=False) if _own(name))
    return plain, linear


def _until(module: nn.Module, block: nn.Module) -> Generator[nn.Module, None, bool]:
    """The modules in order, up to and including the block's; of an adapter's wrapper only what it wraps."""
    yield module
    children = {name: child for name, child in module.named_children() if _own(name)}
    wrapped = [children[name] for name in ("base_layer", "original_module") if name in children]  # as PEFT names it
    for child in wrapped or children.values():
        if (yield from _until(child, block)):
            return True
    return module is block


def _own(name: str) -> bool:
    """Whether a parameter or module is the model's, not a LoRA's."""
    return not name.startswith("lora_")


def _sample(tensors: Sequence[Tensor]) -> tuple[float | None, ...]:
    """Two values of each tensor; None for those of tensors that are not here or not plain numbers."""
    values: list[float | None] = [None] * (_PER_TENSOR * len(tensors))
    places: dict[torch.device, list[int]] = {}
    views: dict[torch.device, list[Tensor]] = {}
    for index, tensor in enumerate(tensors):
        if not _readable(tensor):
            continue
        flat = tensor.detach().reshape(-1)
        for k in range(_PER_TENSOR):
            position = flat.numel() * (2 * k + 1) // (2 * _PER_TENSOR)
            places.setdefault(tensor.device, []).append(_PER_TENSOR * index + k)
            views.setdefault(tensor.device, []).append(flat[position : position + 1])
    for device, parts in views.items():
        read: list[float] = torch.cat(parts).float().tolist()
        for place, value in zip(places[device], read, strict=True):
            values[place] = value if math.isfinite(value) else None
    return tuple(values)


def _readable(tensor: Tensor) -> bool:
    """Packed weights are of whole numbers or of a class of their own, offloaded ones on the meta device or empty."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _DTYPES
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _pairs(recorded: TowerRecord, here: TowerRecord) -> list[tuple[float, float]]:
    """The values known on both sides; those of linear layers only if both sides list the same tensors."""
    pairs = list(zip(recorded.values, here.values, strict=False))
    if len(recorded.linear_values) == len(here.linear_values):
        pairs += zip(recorded.linear_values, here.linear_values, strict=True)
    return [(then, now) for then, now in pairs if then is not None and now is not None]


def _n_differing(pairs: Sequence[tuple[float, float]]) -> int:
    """How many pairs are further apart than rounding to the coarser dtype explains.

    That is one step of it: float32 → bfloat16 and float32 → float16 → bfloat16 may fall on neighbours.
    """
    then, now = torch.tensor(pairs, dtype=torch.float32, device="cpu").reshape(-1, 2).unbind(1)
    step = torch.maximum(_step(then), _step(now)).clamp(min=_SMALLEST)
    return int(((then - now).abs() > step).sum())


def _step(values_v: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """How far apart the neighbours of each value lie in the coarsest dtype that holds it.

    The value tells more than the dtype it was found in: a checkpoint loaded in bfloat16 and then made float32 is still
    rounded to bfloat16.
    """
    exponents = torch.frexp(values_v).exponent - 1
    step = torch.zeros_like(values_v)
    for dtype in _DTYPES:
        exact = values_v.to(dtype).float() == values_v
        step = torch.where(exact, torch.ldexp(torch.full_like(values_v, torch.finfo(dtype).eps), exponents), step)
    return step


def _config_size(config: Any, name: str) -> Size:
    """A size as a config says it; None if it says nothing that is one."""
    try:
        return _read_size(getattr(config, name, None))
    except (TypeError, ValueError):
        return None


def _read_size(size: Any) -> Size:
    """A number, a pair or None; a square is one number."""
    if size is None:
        return None
    sides = tuple(_whole(side) for side in size) if isinstance(size, list | tuple) else (_whole(size),)
    if not sides:
        raise ValueError("a size without sides")
    return sides[0] if len(set(sides)) == 1 else sides


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r} is no whole number")
    return number


def _said(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else " × ".join(map(str, size))


def _text(values: Sequence[float | None]) -> str:
    return " ".join("-" if value is None else f"{value:.9g}" for value in values)


def _numbers(text: Any) -> tuple[float | None, ...]:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no list of weights")
    with np.errstate(over="ignore"):
        values = tuple(None if word == "-" else float(np.float32(word)) for word in text.split())
    if len(values) % _PER_TENSOR or not all(value is None or math.isfinite(value) for value in values):
        raise ValueError("damaged list of weights")
    return values
