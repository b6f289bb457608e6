"""Running a model without leaving a trace of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

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
    """Evaluation mode for the length of a `with`; afterwards the model is as if it had not run.

    Attributes that were added or changed go back to what they were, and the hooks that transformers installs for itself at
    a first forward come out again. Hooks of anybody else stay, and so do the methods that erasers wrap: another
    thread may be putting an eraser in meanwhile.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    tables = [getattr(module, name) for module, _ in attributes for name in _HOOK_TABLES]
    hooks = [(table, set(table)) for table in tables]
    try:
        model.eval()
        yield
    finally:
        for module, former in attributes:
            now = module.__dict__
            for key in [key for key, value in now.items() if key not in former and not _of_an_eraser(value)]:
                del now[key]
            for key, value in former.items():
                if now.get(key) is not value and not _of_an_eraser(value) and not _of_an_eraser(now.get(key)):
                    now[key] = value
        for table, former in hooks:
            for key in [key for key in list(table) if key not in former]:
                if getattr(table[key], "__module__", "").startswith("transformers."):
                    del table[key]


def _of_an_eraser(value: Any) -> bool:
    """Whether it is a method that an eraser has wrapped, here or in another thread: that comes and goes with the eraser."""
    return bool(getattr(type(value), "is_of_an_eraser", False))
