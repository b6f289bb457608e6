"""A description as sentences of words, each with its lemma; its script and its language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'", "`": "'", "´": "'", "­": None, "​": None, "\ufeff": None})
_JOINED = re.compile(r"(?<=\w)[-_‐‑](?=\w)")
_WORD = re.compile(r"n't\b|[^\W_]+?(?=n't\b)|[^\W_]+|[^\w\s']")
_ENDS = frozenset(".!?;:…。！？；।")
SPACELESS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})
"""Scripts that put no spaces between words: here a word is looked for anywhere in the text."""
LATIN = "LATIN"
_NO_SCRIPT = frozenset({"FEMININE", "MASCULINE", "MODIFIER", "MICRO", "OHM"})
"""First words of the names of letters that belong to no script."""


class Word(NamedTuple):
    """A word or a sign of a text."""

    form: str
    """As it stands there, in lower case."""
    lemma: str

    def is_(self, word: str) -> bool:
        """Whether this is a form of `word`: itself, by its lemma, or a regular plural (of a word that nobody knows)."""
        return word in (self.form, self.lemma) or self.form in (f"{word}s", f"{word}es")


Sentence = tuple[Word, ...]


def normalised(text: str) -> str:
    """One spelling for what looks the same: Unicode's compatibility form, lower case, straight apostrophes."""
    return unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).lower()


def split_words(text: str) -> list[str]:
    """Words and signs. "isn't" is two words, "wall-clock" and "tiger's" are too."""
    return _WORD.findall(_JOINED.sub(" ", normalised(text)))


def knows_language(language: str) -> bool:
    """Whether simplemma has a dictionary for a language."""
    from simplemma.strategies.dictionaries.dictionary_factory import SUPPORTED_LANGUAGES

    return language in SUPPORTED_LANGUAGES


def lemma(word: str, language: str) -> str:
    """The dictionary form of a word; the word itself where the language has no dictionary."""
    if not knows_language(language):
        return word
    from simplemma import lemmatize

    return lemmatize(word, lang=language).lower()


@lru_cache(maxsize=4096)
def sentences(text: str, language: str) -> tuple[Sentence, ...]:
    """The sentences of a text, each with the sign that ends it."""
    found: list[Sentence] = []
    current: list[Word] = []
    for form in split_words(text):
        current.append(Word(form, lemma(form, language)))
        if form in _ENDS:
            found.append(tuple(current))
            current = []
    return (*found, tuple(current)) if current else tuple(found)


@lru_cache(maxsize=4096)
def _scripts(text: str) -> Mapping[str, int]:
    letters = (c for c in unicodedata.normalize("NFKC", text) if c.isalpha())
    names = (unicodedata.name(c, "UNKNOWN").split(" ")[0].split("-")[0] for c in letters)
    return dict(Counter(name for name in names if name not in _NO_SCRIPT).most_common())


def script(text: str) -> str | None:
    """The script of most of a text's letters, as Unicode names it (LATIN, CYRILLIC, CJK, ...); None without letters."""
    names = _scripts(text)
    return next(iter(names), None)


def scripts(text: str) -> frozenset[str]:
    """Every script that a text has letters of."""
    return frozenset(_scripts(text))


def language_of(text: str, function_words: Mapping[str, frozenset[str]], languages: Sequence[str]) -> str | None:
    """Which of some languages of one script a text is in; None if it is in none of them.

    A language scores the share of the words that it knows, and the share that are its function words, which decide between
    languages that share a word ("rose"). Less than half known is another language.
    """
    from simplemma import langdetect

    words = [word for word in split_words(text) if word[0].isalpha()]
    checked = [language for language in languages if knows_language(language)]
    if not words or not checked:
        return languages[0] if languages else None
    known = dict(langdetect(" ".join(words), lang=tuple(checked)))
    score = {
        language: known.get(language, 0.0)
        + sum(word in function_words.get(language, frozenset()) for word in words) / len(words)
        for language in checked
    }
    best = max(checked, key=lambda language: score[language])
    return best if score[best] >= 0.5 else None
