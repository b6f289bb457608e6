"""A hook of mkdocs: formulas become MathML while the site is built, so that reading it fetches nothing from elsewhere."""

from __future__ import annotations

import html
import re
import unicodedata

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""As pymdownx.arithmatex leaves them: in a line between \\( and \\), on their own between \\[ and \\]."""
_LETTER = re.compile(r'<mi mathvariant="(bold|script)">([A-Za-z])</mi>')
"""Browsers (MathML Core) know no other variants than "normal": bold and script letters are letters of their own."""


def _letter(found: re.Match[str]) -> str:
    variant, letter = found.groups()
    name = f"{variant.upper()} {'CAPITAL' if letter.isupper() else 'SMALL'} {letter.upper()}"
    try:
        return f"<mi>{unicodedata.lookup(f'MATHEMATICAL {name}')}</mi>"
    except KeyError:  # those that Unicode had before the others: SCRIPT CAPITAL F
        return f"<mi>{unicodedata.lookup(name)}</mi>"


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, formula = found.groups()
    mathml = convert(html.unescape(formula), display="block" if bracket == "[" else "inline")
    return f'<{tag} class="arithmatex">{_LETTER.sub(_letter, mathml)}</{tag}>'


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML with every formula typeset."""
    return _FORMULA.sub(_mathml, content)
