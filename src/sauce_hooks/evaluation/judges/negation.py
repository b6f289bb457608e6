"""Whether a word found in a sentence is affirmed there, denied or only supposed.

After NegEx (Chapman et al. 2001): a cue ("no", "without", "is not") denies what follows it up to a word that ends its scope,
within a few words. Added: what a definite article presupposes is not denied ("not driving the car": there is a car).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sauce_hooks.evaluation.judges.data import read_json
from sauce_hooks.evaluation.judges.text import Sentence, split_words

Standing = Literal["affirmed", "denied", "supposed"]

FORWARD = 8
"""Words that a cue's scope reaches forward at most."""
BACKWARD = 7
"""And backward, for the cues that follow what they deny ("a tiger is not visible")."""
_NOUN_PHRASE = 3
"""Words of a noun phrase between its article and its noun that are looked through for the article."""


@dataclass(frozen=True)
class Cues:
    """The words of a language that deny, suppose, or end a scope."""

    function_words: frozenset[str]
    asserts: tuple[tuple[str, ...], ...]
    """Cues that only look like one ("not only")."""
    denies_phrase: tuple[tuple[str, ...], ...]
    """Cues that deny the noun phrase after them, up to the next verb ("without a")."""
    denies_clause: tuple[tuple[str, ...], ...]
    """Cues that deny the clause after them ("not")."""
    denies_before: tuple[tuple[str, ...], ...]
    """Cues that deny the clause before them ("is not visible")."""
    doubts: tuple[tuple[str, ...], ...]
    """Cues that put what follows forward as a possibility ("might")."""
    stops: frozenset[str]
    embeds: frozenset[str]
    """Words that put one thing into the phrase of another ("of", "whose")."""
    verbs: frozenset[str]
    joins: frozenset[str]
    """"and": ends a scope if a new clause or a new thing follows."""
    list_ends: frozenset[str]
    """"or": as long as one follows, commas are those of a list and end nothing."""
    openers: frozenset[str]
    definite: frozenset[str]
    perceives: frozenset[str]
    """Verbs whose denial denies even what has a definite article ("does not show the tiger")."""


_PHRASES = ("asserts", "denies_phrase", "denies_clause", "denies_before", "doubts")


@cache
def cues() -> Mapping[str, Cues]:
    """The cues of every language that has some."""

    def read(fields: Mapping[str, Sequence[str]]) -> Cues:
        read_: dict[str, Any] = {
            name: tuple(sorted((tuple(split_words(text)) for text in texts), key=len, reverse=True))
            if name in _PHRASES
            else frozenset(texts)
            for name, texts in fields.items()
        }
        return Cues(**read_)

    return {language: read(fields) for language, fields in read_json("cues.json").items()}


def _found(phrases: Sequence[tuple[str, ...]], sentence: Sentence) -> Iterator[tuple[int, int]]:
    for i in range(len(sentence)):
        for phrase in phrases:
            if tuple(word.form for word in sentence[i : i + len(phrase)]) == phrase:
                yield i, i + len(phrase)
                break


def standing(sentence: Sentence, start: int, end: int, language: str) -> Standing:
    """How the words `start` to `end` of a sentence stand in it; affirmed where the language has no cues."""
    known = cues().get(language)
    if known is None:
        return "affirmed"
    harmless = list(_found(known.asserts, sentence))

    def real(phrases: Sequence[tuple[str, ...]]) -> list[tuple[int, int]]:
        return [(i, j) for i, j in _found(phrases, sentence) if not any(a <= i < b for a, b in harmless)]

    for phrases, up_to_verb in ((known.denies_phrase, True), (known.denies_clause, False)):
        for _, after in real(phrases):
            if _reaches(sentence, after, start, known, up_to_verb) and not _presupposed(sentence, after, start, known):
                return "denied"
    for before, _ in real(known.denies_before):
        if end <= before <= end + BACKWARD and _is_subject(sentence, start, end, before, known):
            return "denied"
    for _, after in real(known.doubts):
        if _reaches(sentence, after, start, known, False) and not _presupposed(sentence, after, start, known):
            return "supposed"
    return "supposed" if sentence[-1].form in ("?", "？") else "affirmed"


def _is_subject(sentence: Sentence, start: int, end: int, before: int, known: Cues) -> bool:
    """Whether the cue at `before` speaks of the thing itself: not of another's part, place or neighbour.

    In "the tail of the tiger is not visible" and "a man in a red shirt whose face is not visible" it does not.
    """
    between = {word.form for word in sentence[end:before]}
    if between & (known.stops | known.embeds | {","}):
        return False
    for word in reversed(sentence[:start]):
        if word.form == "," or word.form in known.stops:
            return True
        if word.form in known.embeds:
            return False
    return True


def _reaches(sentence: Sentence, after: int, start: int, known: Cues, up_to_verb: bool) -> bool:
    """Whether the scope that opens at `after` holds the word `start`."""
    if not after <= start <= after + FORWARD:
        return False
    for i in range(after, start):
        word, following = sentence[i].form, sentence[i + 1].form
        if word in known.stops or (up_to_verb and word in known.verbs):
            return False
        if word == "," and not _in_list(sentence, i, known):
            return False
        if word in known.joins and (following in known.openers or following in known.verbs):
            return False
    return True


def _in_list(sentence: Sentence, comma: int, known: Cues) -> bool:
    """Whether a list that ends in "or" goes on behind a comma."""
    for word in sentence[comma + 1 :]:
        if word.form in known.list_ends:
            return True
        if word.form in known.stops or word.form in known.joins or word.form in known.verbs:
            return False
    return False


def _presupposed(sentence: Sentence, after: int, start: int, known: Cues) -> bool:
    """Whether an article says that the thing is there, whatever is denied of it."""
    for i in range(start - 1, max(after, start - 1 - _NOUN_PHRASE) - 1, -1):
        if sentence[i].form in known.verbs:
            return False
        if sentence[i].form in known.definite:
            said = {word.lemma for word in sentence[after:i]} | {word.form for word in sentence[after:i]}
            return i > after and not said & known.perceives
    return False
