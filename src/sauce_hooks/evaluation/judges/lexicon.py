"""A judge with a list of words: lemmas, synonyms, kinds, other meanings and negation, in the languages it has words of."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sauce_hooks.errors import JudgeFileError, UnjudgedAnswersWarning
from sauce_hooks.evaluation.judges.data import read_json, read_user_json
from sauce_hooks.evaluation.judges.entries import Entry, Finder, Words, concept_key, read_entries
from sauce_hooks.evaluation.judges.negation import Standing, cues, standing
from sauce_hooks.evaluation.judges.opinion import UnsureJudge, Verdict
from sauce_hooks.evaluation.judges.text import LATIN, SPACELESS, language_of, normalised, script, scripts, sentences


class Finding(NamedTuple):
    """A word of a text that stands for the concept."""

    words: str
    standing: Standing


class Reading(NamedTuple):
    """What the lexicon makes of a text."""

    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    unread: str = ""
    """Why it can't read the text, if it can't."""


class Lexicon(UnsureJudge):
    """Finds a concept's words, and reads whether they are affirmed.

    A concept that is affirmed anywhere is mentioned. One that is only put forward as a possibility ("might be"), or a text
    that the lexicon can't read, is unsure, with an `UnjudgedAnswersWarning` for the latter. A concept without an entry is
    looked for by its own name.
    """

    def __init__(self, entries: Mapping[str, Any] | str | Path | None = None) -> None:
        """The shipped words, and yours.

        Args:
            entries: more words, by concept and language: `{"lynx": {"en": {"words": ["lynx", "bobcat"], "never": [...]}}}`,
                or a JSON file with `{"concepts": {...}}`. They are added to those of a concept that has some.

        Raises:
            JudgeFileError: a file or mapping that is not of this form.
        """
        shipped = read_json("lexicon.json")
        self._entries = dict(_shipped())
        if entries is not None:
            where = "the entries" if isinstance(entries, Mapping) else str(entries)
            found: Any = entries if isinstance(entries, Mapping) else read_user_json(entries).get("concepts")
            if not isinstance(found, Mapping):
                raise JudgeFileError(f'{where}: wanted {{"concepts": {{...}}}}, got no concepts')
            for key, entry in read_entries(found, where).items():
                self._entries[key] = self._entries[key].extended(entry) if key in self._entries else entry
        data = [{key: asdict(entry) for key, entry in sorted(self._entries.items())}, read_json("cues.json")]
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        self._name = f"lexicon-{shipped['version']}-{digest[:8]}"
        languages = dict.fromkeys(code for entry in self._entries.values() for code in entry.languages)
        self._latin = tuple(c for c in languages if any(self._script_of(key, c) == LATIN for key in self._entries))
        self._finders: dict[tuple[str, ...], Finder] = {}

    @property
    def name(self) -> str:
        """Its version, and a digest of all its words."""
        return self._name

    def known(self, concept: str) -> bool:
        """Whether it has words for a concept, more than the name itself."""
        return concept_key(concept) in self._entries

    def verdicts(self, texts: Sequence[str], concept: str) -> list[Verdict]:
        """For each text whether it affirms the concept; None where it is only supposed, or the text can't be read."""
        readings = [self.read(text, concept) for text in texts]
        unread = Counter(reading.unread for reading in readings if reading.unread)
        for why, n in unread.items():
            example = next(text for text, reading in zip(texts, readings, strict=True) if reading.unread == why)
            warnings.warn(
                f"{n} of {len(texts)} descriptions, judged for {concept!r}: {why}, for example {example[:60]!r}. They are "
                f"left open, which counts as a mention. Give the lexicon words, Lexicon({{{concept!r}: {{...}}}}), or put a "
                "judge that reads them behind it, Layered([lexicon, ...])",
                UnjudgedAnswersWarning,
                stacklevel=2,
            )
        return [reading.verdict for reading in readings]

    def read(self, text: str, concept: str) -> Reading:
        """The verdict on one text, with the words it rests on."""
        key = concept_key(concept)
        main = script(text)
        if main is None:
            return Reading(False)
        entry = self._entries.get(key) or Entry({"en" if script(concept) == LATIN else "?": Words((concept,))})
        if main == LATIN:
            language = _language(text, self._latin)
            if language is None:
                return Reading(None, unread=f"they are in no language that it has words of ({', '.join(self._latin)})")
        else:
            language = next((code for code in entry.languages if _script(entry.languages[code]) == main), None)
            if language is None:
                return Reading(
                    None, unread=f"they are written in {main.capitalize()} script, and it has no such words for it"
                )
        words = entry.languages.get(language)
        if words is None and self.known(concept):
            return Reading(None, unread=f"they are in the language {language!r}, and it has no such words for it")
        # A name without an entry may be in any language.
        found = self._findings(text, words or Words((concept,)), language, main)
        standings = {finding.standing for finding in found}
        if "affirmed" in standings:
            return Reading(True, found)
        if "supposed" in standings:
            return Reading(None, found)
        if not self.known(concept) and language != "en" and not found:
            return Reading(None, unread=f"they are in the language {language!r}, and it knows no more than the name")
        others = scripts(text) - {main} - {_script(part) for part in entry.languages.values()}
        if others:
            some = ", ".join(sorted(name.capitalize() for name in others))
            return Reading(None, found, f"they have words in {some} script, which it can't read")
        return Reading(False, found)

    def _findings(self, text: str, words: Words, language: str, main: str) -> tuple[Finding, ...]:
        if main in SPACELESS:
            plain = normalised(text)
            for phrase in words.never:
                plain = plain.replace(normalised(phrase), " ")
            return tuple(Finding(word, "affirmed") for word in words.words if normalised(word) in plain)
        finder, never = self._finder(words.words), self._finder(words.never)
        found: list[Finding] = []
        for sentence in sentences(text, language):
            spans, blocked = list(finder.spans(sentence)), list(never.spans(sentence))
            blocked = [(a, b) for a, b in blocked if not any(i <= a and b <= j and (i, j) != (a, b) for i, j in spans)]
            for i, j in spans:
                if not any(a <= i and j <= b for a, b in blocked):
                    said = " ".join(word.form for word in sentence[i:j])
                    found.append(Finding(said, standing(sentence, i, j, language)))
        return tuple(dict.fromkeys(found))

    def _finder(self, phrases: tuple[str, ...]) -> Finder:
        if phrases not in self._finders:
            self._finders[phrases] = Finder(phrases)
        return self._finders[phrases]

    def _script_of(self, key: str, language: str) -> str | None:
        words = self._entries[key].languages.get(language)
        return words and _script(words)


@lru_cache(maxsize=4096)
def _language(text: str, languages: tuple[str, ...]) -> str | None:
    return language_of(text, {code: known.function_words for code, known in cues().items()}, languages)


def _script(words: Words) -> str | None:
    return script(words.words[0])


@cache
def _shipped() -> Mapping[str, Entry]:
    return read_entries(read_json("lexicon.json")["concepts"], "lexicon.json")


def domain_of(concept: str) -> str | None:
    """The domain of a concept that the shipped lexicon knows."""
    entry = _shipped().get(concept_key(concept))
    return entry and entry.domain
