"""From a template of this folder to one HTML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from sauce_hooks.bank import Rate, write_text_atomically
from sauce_hooks.report.figures import Figure

_LONGEST, _LISTED = 400, 8
"""Characters of a text and entries of a list that are shown: a stranger's file may hold any number."""


def render(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **content: Any) -> str:
    """A template filled in; all text is escaped, and "?" stands for what UTF-8 can't hold: a name can be of any bytes.

    It may include other templates of the folder.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_read),
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**content).encode("utf-8", "replace").decode()


def write_html(html: str, path: str | Path) -> Path:
    """Write a page, whole or not at all; returns where it lies."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, html)
    return path


def number(value: float) -> str:
    """Three digits, with a real minus sign."""
    return f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """A share as a percentage, with as many digits as its size deserves."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}%" if share >= 0.01 or share == 0 else f"{100 * share:.2g}%"


def figure_text(found: Rate | Figure | None) -> str:
    """In percent with its interval."""
    figure = Figure.of(found) if isinstance(found, Rate) else found
    return "–" if figure is None else f"{figure.value:.1f} [{figure.low:.1f}, {figure.high:.1f}]"


def short(text: str) -> str:
    """A text that is not of any length."""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


def spoken(value: Any) -> str:
    """Any value of a record, for people."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {spoken(v)}" for k, v in list(value.items())[:_LISTED])
    if isinstance(value, list | tuple):
        return ", ".join(spoken(v) for v in value[:_LISTED]) + (", …" if len(value) > _LISTED else "")
    return str(value)


def _read(name: str) -> str:
    return (files("sauce_hooks.report") / name).read_text(encoding="utf-8")
