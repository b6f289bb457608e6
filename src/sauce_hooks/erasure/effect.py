"""Proof that what a block writes is read: run again with it disturbed, and see whether anybody gets something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sauce_hooks.erasure.rows import Batch

_RELATIVE = 1e-3
"""A disturbance as large as the activations moves what is read by far more; rounding and atomic adds by far less."""

_NOBODY_READS = frozenset(
    ("last_hidden_state", "hidden_states", "vision_model_output", "image_hidden_states", "encoder_last_hidden_state",
     "attentions", "encoder_hidden_states", "past_key_values")
)  # fmt: skip
"""Outputs of a model that only hand the tower's own output on: that they change says nothing."""

Reader = tuple[str, list[Tensor]]
"""Something beside the tower that was called, and the tensors it was called with."""


class Stop(BaseException):
    """The disturbance has arrived: the rest need not run. No `except Exception` of a model's may catch it."""


@dataclass(eq=False)
class Probe:
    """A second run, with one block disturbed."""

    path: str
    readers: Sequence[Reader]
    """Who was called in the real run."""
    batch: Batch
    """What was known of the batch in it."""
    disturbed: bool = False
    calls: Counter[str] = field(default_factory=Counter[str])

    def reached(self, name: str, args: Any, kwargs: Any) -> None:
        """The second run calls somebody beside the tower; `Stop` if it gets something else than in the real run."""
        nth = self.calls[name]  # what runs before the disturbed block is called in both runs
        self.calls[name] += 1
        before = [given for reader, given in self.readers if reader == name]
        if self.disturbed and nth < len(before) and differ(tensors((args, kwargs)), before[nth]):
            raise Stop


@dataclass(frozen=True)
class Again:
    """A run that can be repeated, and what came of it the first time."""

    function: Callable[..., Any]
    args: Any
    kwargs: Mapping[str, Any]
    output: Any
    readers: Sequence[Reader] = ()
    """What was called beside the towers, in order."""
    leave_out_rt: Bool[Tensor, "rows tokens"] | None = None
    """Positions of the output that do not count: those that are disturbed themselves, at a language layer."""
    of_the_tower: bool = False
    """Whether it is the tower alone that is run, so that its whole output counts."""

    def differs(self, root: nn.Module, probe: Probe) -> bool:
        """Whether anything else comes of it with the block disturbed; no, if it cannot be run again. Leaves no trace.

        The cache is left out: the first run has filled it.
        """
        kwargs = {name: None if name in ("past_key_values", "cache_params") else v for name, v in self.kwargs.items()}
        devices = sorted({p.device.index for p in root.parameters() if p.device.type == "cuda"} - {None})
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                output = self.function(*self.args, **kwargs)
        except Stop:
            return True
        except Exception:  # say, a cache that has grown since
            return False
        return probe.disturbed and differ(self._read(output), self._read(self.output))

    def _read(self, output: Any) -> list[Tensor]:
        read = all_tensors = tensors(output)
        if not self.of_the_tower and isinstance(output, Mapping):
            read = tensors({name: value for name, value in output.items() if name not in _NOBODY_READS}) or all_tensors
        left = self.leave_out_rt
        return read if left is None else [t[~left.to(t.device)] if t.shape[:2] == left.shape else t for t in read]


def disturbed(
    acts_utd: Float[Tensor, "units tokens d"], where_ut: Bool[Tensor, "units tokens"]
) -> Float[Tensor, "units tokens d"]:
    """The tokens that are edited, far off what they were, and not by a constant over d: a LayerNorm would remove that."""
    d = acts_utd.shape[-1]
    noise_d = torch.linspace(-1, 1, d, device=acts_utd.device).pow(3).to(acts_utd.dtype)
    return torch.where(where_ut[..., None], acts_utd + noise_d * (1 + acts_utd.abs().amax()), acts_utd)


def tensors(nested: Any, *, detached: bool = True) -> list[Tensor]:
    """Every floating-point tensor in arguments or outputs, in order."""
    if isinstance(nested, Tensor):
        return [nested.detach() if detached else nested] if nested.is_floating_point() else []
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    elif is_dataclass(nested) and not isinstance(nested, type):
        nested = [getattr(nested, f.name) for f in fields(nested)]
    return [t for item in nested for t in tensors(item, detached=detached)] if isinstance(nested, list | tuple) else []


def finite(nested: Any) -> bool:
    """Whether no tensor in it has NaN or infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors(nested))


def differ(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors differ by more than rounding."""
    if len(some) != len(others) or any(a.shape != b.shape for a, b in zip(some, others, strict=True)):
        return True
    return any(_far(a.float(), b.float()) for a, b in zip(some, others, strict=True) if a.numel())


def _far(a: Tensor, b: Tensor) -> bool:
    size = b.nan_to_num(0, 0, 0).abs().amax()
    return not bool(torch.isclose(a, b, rtol=0, atol=float(_RELATIVE * size), equal_nan=True).all())
