"""Two answers compared word by word."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

Change = Literal["same", "remembered", "forgotten", "lost", "new"]


@dataclass(frozen=True)
class Piece:
    """A run of words that met the same fate."""

    change: Change
    """forgotten: the name of an erased concept, gone; remembered: one that is still there; lost: another word that is gone;
    new: one that was not there before."""
    text: str
    lead: str
    """The space before it, if any."""


def tidy(text: str) -> str:
    """An answer as people write it: one space between words, none before a comma or a full stop."""
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))


def compare_words(before: str, after: str, forgotten: Iterable[str]) -> tuple[Piece, ...]:
    """The new answer with the old one's vanished words in their places.

    The pieces that are not "new" make up the old answer; without "forgotten" and "lost" they are the new one.
    """
    names = {name.lower() for name in forgotten}
    old, new = (re.findall(r"[\w'’-]+|[^\w\s]", text) for text in (before, after))
    fates: list[tuple[Change, str]] = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            fates.extend(("remembered" if word.lower() in names else "same", word) for word in old[i:j])
        else:
            fates.extend(("forgotten" if word.lower() in names else "lost", word) for word in old[i:j])
            fates.extend(("new", word) for word in new[k:m])
    pieces: list[Piece] = []
    for change, run in groupby(fates, key=_change):
        text = tidy(" ".join(word for _, word in run))
        pieces.append(Piece(change, text, " " if pieces and re.match(r"\w", text) else ""))
    return tuple(pieces)


def _change(fate: tuple[Change, str]) -> Change:
    return fate[0]
