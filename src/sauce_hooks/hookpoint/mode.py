"""Running a model without leaving a trace of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode for the length of a `with`; every module gets its own former mode back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Evaluation mode for the length of a `with`; afterwards every attribute and hook of every module is as it was.

    Hooks put in meanwhile, by whomever, are gone. Weights are not guarded: nothing here changes any.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    hooks = [(table, dict(table)) for module, _ in attributes for name in _HOOK_TABLES for table in (getattr(module, name),)]
    try:
        model.eval()
        yield
    finally:
        for module, former in attributes:
            module.__dict__.clear()
            module.__dict__.update(former)
        for table, former in hooks:
            table.clear()
            table.update(former)
