"""Two answers compared word by word."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

Change = Literal["same", "remembered", "forgotten", "lost", "gone", "new"]


@dataclass(frozen=True)
class Piece:
    """A run of words that met the same fate."""

    change: Change
    """forgotten: the name of an erased concept, gone; remembered: one that is still there; lost: the name of a concept that
    should have stayed; gone: any other word; new: a word that was not there before."""
    text: str
    lead: str
    """The space before it, if any."""


def tidy(text: str) -> str:
    """An answer as people write it: one space between words, none before a comma or a full stop."""
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))


def compare_words(before: str, after: str, erased: Iterable[str], true: Iterable[str]) -> tuple[Piece, ...]:
    """The new answer with the old one's vanished words in their places.

    Args:
        before: the old answer.
        after: the new one.
        erased: the names of the erased concepts.
        true: the names of all concepts that the image holds.

    Returns:
        Pieces in order. Those that are not "new" make up the old answer, those that are "same", "remembered" or "new"
        the new one.
    """
    erased, true = ({name.lower() for name in names} for names in (erased, true))
    old, new = (re.findall(r"[\w'’-]+|[^\w\s]", text) for text in (before, after))
    stayed = {word.lower() for word in new}

    def vanished(word: str) -> Change:
        if word.lower() in erased:
            return "forgotten"
        return "lost" if word.lower() in true - stayed else "gone"

    fates: list[tuple[Change, str]] = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            fates.extend(("remembered" if word.lower() in erased else "same", word) for word in old[i:j])
        else:
            fates.extend((vanished(word), word) for word in old[i:j])
            fates.extend(("new", word) for word in new[k:m])
    pieces: list[Piece] = []
    for change, run in groupby(fates, key=_change):
        text = tidy(" ".join(word for _, word in run))
        pieces.append(Piece(change, text, " " if pieces and re.match(r"\w", text) else ""))
    return tuple(pieces)


def _change(fate: tuple[Change, str]) -> Change:
    return fate[0]
