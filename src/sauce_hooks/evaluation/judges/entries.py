"""The words that stand for a concept: as they are written in the data file, checked, and made ready to be found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sauce_hooks.errors import JudgeFileError
from sauce_hooks.evaluation.judges.text import LATIN, Sentence, knows_language, script, split_words

_MOST_WORDS = 2_000
_LONGEST = 100
_GAP = 4
"""Words that "..." stands for at most."""
_LANGUAGE = re.compile(r"[a-z]{2,3}")

Phrase = tuple[str | None, ...]
"""Words in a row; None for a gap."""


@dataclass(frozen=True)
class Words:
    """What stands for a concept in one language."""

    words: tuple[str, ...]
    """Its names, synonyms, kinds and forms that no dictionary derives (wooden); "..." stands for up to four words."""
    never: tuple[str, ...] = ()
    """Longer phrases in which such a word means something else ("tiger lily")."""


@dataclass(frozen=True)
class Entry:
    """What stands for a concept, by language."""

    languages: Mapping[str, Words]
    domain: str | None = None

    def extended(self, more: Entry) -> Entry:
        """This with the words of another entry of the same concept."""
        both = dict(self.languages)
        for language, added in more.languages.items():
            old = both.get(language, Words(()))
            both[language] = Words(
                tuple(dict.fromkeys((*old.words, *added.words))), tuple(dict.fromkeys((*old.never, *added.never)))
            )
        return Entry(both, more.domain or self.domain)


def concept_key(concept: str) -> str:
    """One spelling for a concept's name, however it is written ("Wall_Clock", "wall clock")."""
    return " ".join(split_words(concept))


def read_entries(found: Mapping[Any, Any], where: str) -> dict[str, Entry]:
    """Entries by concept from what a JSON file, or a user's mapping, holds.

    Raises:
        JudgeFileError: anything but concepts with lists of words by language.
    """
    entries: dict[str, Entry] = {}
    for name, fields in found.items():
        key = concept_key(name) if isinstance(name, str) else ""
        if not key:
            raise JudgeFileError(f"{where}: {name!r} is no name of a concept")
        if not isinstance(fields, Mapping) or not set(fields) - {"domain"}:
            raise JudgeFileError(
                f'{where}, {name!r}: wanted words by language, {{"en": {{"words": ["tiger"]}}}}; got {fields!r:.80}'
            )
        domain = fields.get("domain")
        if domain is not None and not isinstance(domain, str):
            raise JudgeFileError(f"{where}, {name!r}: the domain is {domain!r:.80}, not a word")
        languages = {code: _words(code, part, f"{where}, {name!r}") for code, part in fields.items() if code != "domain"}
        entry = Entry(languages, domain)
        entries[key] = entries[key].extended(entry) if key in entries else entry
    return entries


def _words(code: Any, part: Any, where: str) -> Words:
    if not isinstance(code, str) or not _LANGUAGE.fullmatch(code):
        raise JudgeFileError(f'{where}: {code!r:.80} is no language code such as "en" or "fr"')
    if not isinstance(part, Mapping) or "words" not in part or set(part) - {"words", "never"}:
        raise JudgeFileError(f'{where}, {code}: wanted {{"words": [...], "never": [...]}}, got {part!r:.80}')
    words, never = (_list(part.get(field, []), f"{where}, {code}, {field}") for field in ("words", "never"))
    if not words:
        raise JudgeFileError(f"{where}, {code}: no words")
    if script(words[0]) == LATIN and not knows_language(code):
        raise JudgeFileError(f"{where}: there is no dictionary for the language {code!r}, so a text in it is not recognised")
    return Words(words, never)


def _list(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, (list, tuple)) or len(found) > _MOST_WORDS:
        raise JudgeFileError(f"{where}: wanted a list of at most {_MOST_WORDS:,} words, got {found!r:.80}")
    for word in found:
        if not isinstance(word, str) or len(word) > _LONGEST or not any(c.isalpha() for c in word):
            raise JudgeFileError(f"{where}: {word!r:.80} is no word or phrase of at most {_LONGEST} signs")
    return tuple(found)


class Finder:
    """Finds phrases in sentences."""

    def __init__(self, phrases: Sequence[str]) -> None:
        self._by_first: dict[str, list[Phrase]] = {}
        for text in phrases:
            phrase = _phrase(text)
            if phrase and phrase[0] is not None:
                self._by_first.setdefault(phrase[0], []).append(phrase)

    def spans(self, sentence: Sentence) -> Iterator[tuple[int, int]]:
        """Where phrases stand, as first word and the one behind the last."""
        for i, word in enumerate(sentence):
            firsts = dict.fromkeys((word.form, word.lemma, word.form.removesuffix("s"), word.form.removesuffix("es")))
            for first in firsts:
                for phrase in self._by_first.get(first, ()):
                    end = _match(phrase, sentence, i)
                    if end is not None:
                        yield i, end


def _phrase(text: str) -> Phrase:
    parts = [split_words(part) for part in text.split("...")]
    return (*parts[0], *(word for part in parts[1:] for word in (None, *part)))


def _match(phrase: Phrase, sentence: Sentence, i: int) -> int | None:
    """Where a phrase that begins at word `i` ends; None if it does not stand there."""
    for n, wanted in enumerate(phrase):
        if wanted is None:
            for j in range(i, min(i + _GAP, len(sentence)) + 1):
                end = _match(phrase[n + 1 :], sentence, j)
                if end is not None:
                    return end
                if j < len(sentence) and not sentence[j].form[0].isalnum():
                    return None
            return None
        if i >= len(sentence) or not sentence[i].is_(wanted):
            return None
        i += 1
    return i
