"""From content to one HTML file that needs nothing but itself."""

from __future__ import annotations

import operator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sauce_hooks.bank import write_text_atomically
from sauce_hooks.report.content import DemoPage
from sauce_hooks.report.figures import metric_rows
from sauce_hooks.report.pictures import CHANGE_RGB, mark_patch, overlay_change, png_data_uri, thumbnail
from sauce_hooks.report.words import compare_words

_TEMPLATE = "page.html.j2"


def _percent(share: float) -> str:
    """A share as a percentage, with as many digits as its size deserves."""
    percent = 100 * share
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"


_FILTERS: dict[str, Any] = {"picture": png_data_uri, "thumbnail": thumbnail, "percent": _percent}
_TESTS: dict[str, Any] = {"contains": operator.contains}
_GLOBALS: dict[str, Any] = {
    "compare_words": compare_words,
    "mark_patch": mark_patch,
    "metric_rows": metric_rows,
    "overlay_change": overlay_change,
    "change_color": "rgb({}, {}, {})".format(*CHANGE_RGB),
}
"""All that the template can call."""


def render_page(page: DemoPage) -> str:
    """The page as HTML: its style, pictures and plots are inside, so that one file is all there is."""
    template = (files("sauce_hooks.report") / _TEMPLATE).read_text(encoding="utf-8")
    strongest = max((float(change.max()) for m in page.maps for change in m.changes.values()), default=0.0)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(_FILTERS)
    environment.tests.update(_TESTS)
    environment.globals.update(_GLOBALS)
    return environment.from_string(template).render(page=page, strongest=strongest)


def write_page(page: DemoPage, path: str | Path) -> Path:
    """Write the page, whole or not at all; returns where it lies."""
    path = Path(path).resolve()
    html = render_page(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, html)
    return path
