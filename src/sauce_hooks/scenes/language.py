"""What is asked about a scene and what a true answer sounds like, in English and in French.

Every phrasing but the last of each kind is used in training; the last (`HELD_OUT`) is never seen before evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from sauce_hooks.scenes.world import CONCEPTS, Scene, Thing, domain_of

Language = Literal["en", "fr"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")

FRENCH: Mapping[str, str] = MappingProxyType(
    {
        "tiger": "tigre", "cat": "chat", "car": "voiture", "boat": "bateau", "starfish": "étoile", "clock": "horloge",
        "envelope": "enveloppe", "mug": "tasse", "fish": "poisson", "tree": "arbre",
        "soccer": "foot", "basketball": "basket", "tennis": "raquettes", "baseball": "batte", "golf": "trou",
        "hockey": "crosse",
        "red": "rouge", "orange": "orangé", "yellow": "jaune", "green": "vert", "blue": "bleu", "purple": "violet",
        "pink": "rose", "brown": "marron",
        "happy": "heureux", "sad": "triste", "angry": "fâché", "surprised": "surpris", "bored": "ennuyé",
        "wood": "bois", "metal": "métal", "glass": "verre", "stone": "pierre", "fabric": "tissu",
    }
)  # fmt: skip
"""The French name of each concept. Each is one word that is no English word of this world, so that an answer's language
is never in doubt."""

NAMES: Mapping[Language, Mapping[str, str]] = MappingProxyType(
    {"en": MappingProxyType({concept: concept for concept in CONCEPTS}), "fr": FRENCH}
)

YES_NO: Mapping[Language, tuple[str, ...]] = MappingProxyType(
    {
        "en": (
            "does this image contain {}? please answer with yes or no.",
            "is there {} in this picture? answer yes or no.",
            "can you see {} here? yes or no?",
            "please tell: does the picture show {}? answer with yes or no.",
        ),
        "fr": (
            "cette image contient-elle {} ? réponds par oui ou non.",
            "vois-tu {} ici ? oui ou non ?",
            "cette image montre-t-elle {} ? réponds par oui ou non.",
        ),
    }
)
DESCRIBE: Mapping[Language, tuple[str, ...]] = MappingProxyType(
    {
        "en": (
            "please describe in detail all the objects present in this image.",
            "describe this picture.",
            "what can you see here?",
            "please tell in detail what this picture contains.",
        ),
        "fr": (
            "décris en détail cette image.",
            "que vois-tu ici ?",
            "que contient cette image ?",
        ),
    }
)
HELD_OUT = -1
"""The phrasing of each kind and language that training never uses."""

YES: Mapping[Language, str] = MappingProxyType({"en": "yes", "fr": "oui"})
NO: Mapping[Language, str] = MappingProxyType({"en": "no", "fr": "non"})


def _prompt(question: str) -> str:
    return f"user: <image> {question} assistant:"


def yes_no_prompt(concept: str, phrasing: int = 0, language: Language = "en") -> str:
    """The discriminative question, exactly as the processor gets it ("does this image contain tiger? ...").

    `phrasing` indexes `YES_NO[language]`; `HELD_OUT` (−1) is the one never trained on.
    """
    domain_of(concept)
    return _prompt(YES_NO[language][phrasing].format(NAMES[language][concept]))


def describe_prompt(phrasing: int = 0, language: Language = "en") -> str:
    """The generative question, exactly as the processor gets it ("please describe in detail ...")."""
    return _prompt(DESCRIBE[language][phrasing])


def _phrase(thing: Thing, language: Language) -> str:
    names = NAMES[language]
    shape = None if thing.shape is None else names[thing.shape]
    color = None if thing.color is None else names[thing.color]
    material = None if thing.material is None else names[thing.material]
    if language == "fr":
        noun = {"object": shape or "chose", "face": "visage", "game": "jeu"}[thing.kind]
        more = {"object": color, "face": shape, "game": shape and f"de {shape}"}[thing.kind]
        return " ".join(word for word in ("un", noun, more, material and f"en {material}") if word)
    noun = {"object": shape or "thing", "face": "face", "game": "game"}[thing.kind]
    more = None if thing.kind == "object" else shape
    words = [word for word in (color, material, more, noun) if word]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def caption(scene: Scene, language: Language = "en") -> str:
    """A true and complete description, things from left to right: "a red wood tiger, an angry face and a tennis game"."""
    phrases = [_phrase(thing, language) for thing in sorted(scene.things, key=lambda thing: thing.center[0])]
    if len(phrases) == 1:
        return f"{phrases[0]}."
    joint = "and" if language == "en" else "et"
    return f"{', '.join(phrases[:-1])} {joint} {phrases[-1]}."


def vocabulary() -> list[str]:
    """Every word and sign of the world's language, in a fixed order."""
    texts = [_prompt(q.format("")) for table in (YES_NO, DESCRIBE) for qs in table.values() for q in qs]
    words = [
        "user",
        "assistant",
        ":",
        "a",
        "an",
        ",",
        ".",
        "and",
        "thing",
        "face",
        "game",
        "un",
        "et",
        "de",
        "en",
        "chose",
        "visage",
        "jeu",
    ]
    for text in texts:
        words += split_words(text.replace("<image>", ""))
    words += [*YES.values(), *NO.values(), *CONCEPTS, *FRENCH.values()]
    return list(dict.fromkeys(words))


def split_words(text: str) -> list[str]:
    """Words and single signs, as the tokenizer's pre-tokenizer splits them."""
    import re

    return re.findall(r"\w+|[^\w\s]", text.lower())
