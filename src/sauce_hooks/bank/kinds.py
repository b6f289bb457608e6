"""How each kind of value stands in a bank's JSON: a way to write it, and a way to read it that takes nothing else.

Tensors stand in a file of their own. In the JSON stands their number, so that no name decides where anything lies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

LARGEST = 2**63
"""Whole numbers are below this."""


@dataclass(frozen=True)
class Kind:
    """A kind of value. Both functions raise ValueError or TypeError for what is none."""

    write: Callable[[Any, list[Tensor]], Any]
    """The value and the tensors so far, to which it may add → what JSON can hold."""
    read: Callable[[Any, Sequence[Tensor]], Any]
    """What the JSON held and all tensors → the value."""


def _plain(check: Callable[[Any], Any]) -> Kind:
    """Of values that are written as they are read."""
    return Kind(lambda value, _: check(value), lambda value, _: check(value))


def _number(value: Any) -> float:
    if type(value) is float and math.isfinite(value):  # most are
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.99} is no number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number


def _whole(value: Any) -> int:
    if type(value) is int and 0 <= value < LARGEST:  # most are
        return value
    if isinstance(value, bool | float):
        raise TypeError(f"{value!r} is no whole number")
    number = operator.index(value)
    if not 0 <= number < LARGEST:
        raise ValueError(f"a number of {number.bit_length()} bits, below 0 or too large")
    return number


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{value!r:.99} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.99} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value!r:.99} holds half of a surrogate pair: it is no Unicode text") from None
    return str(value)


def _anything(value: Any) -> Any:
    """What JSON can hold: tuples become lists, and numbers that are not finite become null."""
    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case str():
            return _text(value)
        case Mapping():
            return {_text(key): _anything(entry) for key, entry in cast(Mapping[Any, Any], value).items()}
        case list() | tuple():
            return [_anything(entry) for entry in cast(Sequence[Any], value)]
        case _:
            raise TypeError(f"JSON has no {type(value).__name__}")


NUMBER, WHOLE, FLAG, TEXT, ANYTHING = map(_plain, (_number, _whole, _flag, _text, _anything))


def optional(kind: Kind, none: Any = None) -> Kind:
    """Null where there is no value. `none`: what null is read as."""

    def absent(value: Any) -> bool:
        return value is None or (isinstance(value, float) and isinstance(none, float) and math.isnan(value))

    return Kind(
        lambda value, tensors: None if absent(value) else kind.write(value, tensors),
        lambda value, tensors: none if value is None else kind.read(value, tensors),
    )


def several(kind: Kind) -> Kind:
    """A tuple."""

    def read(value: Any, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"{value!r:.99} is no list")
        return tuple([kind.read(entry, tensors) for entry in cast(list[Any], value)])

    return Kind(lambda value, tensors: [kind.write(entry, tensors) for entry in value], read)


def named(kind: Kind) -> Kind:
    """A mapping from text."""

    def read(value: Any, tensors: Sequence[Tensor]) -> dict[str, Any]:
        return {_text(name): kind.read(entry, tensors) for name, entry in _object(value).items()}

    return Kind(lambda value, tensors: {_text(name): kind.write(entry, tensors) for name, entry in value.items()}, read)


def record(of: type[Any], **kinds: Kind) -> Kind:
    """A dataclass. Fields that have their default are left out; a field that is not known is refused.

    So a bank that does not use what a later version can do is read by an earlier one, and one that does is not misread.
    """
    known = {f.name: f for f in fields(of)}
    if known.keys() != kinds.keys():
        raise TypeError(f"{of.__name__} has other fields than its format: {sorted(known.keys() ^ kinds.keys())}")
    defaults = {
        name: f.default if f.default is not MISSING else cast(Callable[[], Any], f.default_factory)()
        for name, f in known.items()
        if f.default is not MISSING or f.default_factory is not MISSING
    }

    def write(value: Any, tensors: list[Tensor]) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for name, kind in kinds.items():
            entry = getattr(value, name)
            if name not in defaults or entry != defaults[name]:
                with_place(
                    name, lambda kind=kind, name=name, entry=entry: written.update({name: kind.write(entry, tensors)})
                )
        return written

    def read(value: Any, tensors: Sequence[Tensor]) -> Any:
        found = _object(value)
        for name in found:
            if name not in kinds:
                raise ValueError(f"{name!r:.99} is no field that this version knows")
        for name in kinds:
            if name not in found and name not in defaults:
                raise ValueError(f"there is no {name}")
        return of(**{name: with_place(name, lambda name=name: kinds[name].read(found[name], tensors)) for name in found})

    return Kind(write, read)


def with_place(place: str, do: Callable[[], Any]) -> Any:
    """What goes wrong says where."""
    try:
        return do()
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{place}: {problem}") from problem


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.99} is no object")
    return cast(dict[str, Any], value)


def tensor(n_dims: int) -> Kind:
    """A tensor of finite floating-point numbers, written as its number among the tensors."""

    def checked(value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.ndim != n_dims:
            what = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{what} is no floating-point tensor of {n_dims} dimensions")
        if not bool(torch.isfinite(value).all()):
            raise ValueError("a tensor holds numbers that are not finite")
        return value

    def write(value: Any, tensors: list[Tensor]) -> int:
        tensors.append(checked(value).detach().cpu())
        return len(tensors) - 1

    def read(value: Any, tensors: Sequence[Tensor]) -> Tensor:
        number = _whole(value)
        if number >= len(tensors):
            raise ValueError(f"tensor {number} of {len(tensors)}")
        return checked(tensors[number])

    return Kind(write, read)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
