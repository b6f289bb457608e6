"""A hook of mkdocs: formulas become MathML while the site is built, so that reading it fetches nothing from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""As pymdownx.arithmatex leaves them: in a line between \\( and \\), on their own between \\[ and \\]."""


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, formula = found.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{tag} class="arithmatex">{convert(html.unescape(formula), display=display)}</{tag}>'


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML with every formula typeset."""
    return _FORMULA.sub(_mathml, content)
