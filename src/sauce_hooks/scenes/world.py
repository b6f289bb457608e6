"""The bundled world: what can be in an image, and how to sample scenes with exact ground truth.

A scene holds one to three *things*. A thing is an object (with or without one of eight colours and one of five
materials), a face (with or without an emotion) or a game (with or without a known sport). The concept-less variants
("a thing", "a face", "a game") matter: they are what the world looks like when a concept is absent, so a model that has
forgotten "tiger" has something true to say instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
from PIL import Image

from sauce_hooks.errors import UnknownConceptError

DOMAINS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "object": ("tiger", "cat", "car", "boat", "starfish", "clock", "envelope", "mug", "fish", "tree"),
        "sport": ("soccer", "basketball", "tennis", "baseball", "golf", "hockey"),
        "color": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"),
        "emotion": ("happy", "sad", "angry", "surprised", "bored"),
        "material": ("wood", "metal", "glass", "stone", "fabric"),
    }
)
"""The five domains of the paper's Table 1, with the concepts of the bundled world."""

CONCEPTS: tuple[str, ...] = tuple(concept for concepts in DOMAINS.values() for concept in concepts)
"""Every concept, in the order of `DOMAINS`."""

CONCRETE: frozenset[str] = frozenset({"object", "sport"})
"""The domains of the paper's *concrete* task; the others are its *abstract* task."""

SIBLINGS: Mapping[str, str] = MappingProxyType(
    {
        "tiger": "cat", "cat": "tiger", "car": "boat", "boat": "car", "starfish": "tree", "tree": "starfish",
        "clock": "mug", "mug": "clock", "envelope": "fish", "fish": "envelope",
        "soccer": "hockey", "hockey": "soccer", "basketball": "baseball", "baseball": "tennis", "tennis": "baseball",
        "golf": "hockey",
        "red": "orange", "orange": "red", "yellow": "orange", "green": "blue", "blue": "purple", "purple": "pink",
        "pink": "purple", "brown": "orange",
        "happy": "surprised", "surprised": "happy", "sad": "angry", "angry": "sad", "bored": "sad",
        "wood": "stone", "stone": "fabric", "metal": "glass", "glass": "metal", "fabric": "stone",
    }
)  # fmt: skip
"""The concept of the same domain that looks most like each concept, by construction of the renderer."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def domain_of(concept: str) -> str:
    """The domain of a concept; `UnknownConceptError` lists the known ones if it is none of this world."""
    for domain, concepts in DOMAINS.items():
        if concept in concepts:
            return domain
    raise UnknownConceptError(concept, CONCEPTS)


@dataclass(frozen=True)
class Thing:
    """One thing in a scene."""

    kind: Literal["object", "face", "game"]
    shape: str | None
    """The object, emotion or sport; None for the concept-less variant."""
    color: str | None
    material: str | None
    center: tuple[float, float]
    """(x, y) of the middle, as a share of the image's side."""
    size: float
    """Side of the bounding square, as a share of the image's side."""
    seed: int
    """Everything else about its looks."""

    @property
    def concepts(self) -> frozenset[str]:
        """The concepts that this thing makes true."""
        return frozenset(c for c in (self.shape, self.color, self.material) if c is not None)


@dataclass(frozen=True)
class Scene:
    """A scene, known completely; `image` is drawn when it is first asked for."""

    things: tuple[Thing, ...]
    seed: int

    @cached_property
    def image(self) -> Image.Image:
        """The picture, RGB, `IMAGE_SIZE` pixels a side."""
        from sauce_hooks.scenes.render import render

        return render(self).image

    @property
    def concepts(self) -> frozenset[str]:
        """Every concept that is true of this scene."""
        return frozenset().union(*(thing.concepts for thing in self.things))

    @property
    def caption(self) -> str:
        """The description the model is trained to give, things from left to right."""
        from sauce_hooks.scenes.language import caption

        return caption(self)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


_QUADRANTS = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))
_SIZES = {1: (0.46, 0.66), 2: (0.44, 0.54), 3: (0.42, 0.48)}
_TRAINING_SIZES = {1: (0.44, 0.66), 2: (0.40, 0.52), 3: (0.36, 0.46)}
"""Training scenes hold smaller things than those a model is tested on: a harder school makes a surer pupil."""


def _places(
    rng: np.random.Generator, count: int, sizes: Mapping[int, tuple[float, float]]
) -> Iterator[tuple[tuple[float, float], float]]:
    for quadrant in rng.permutation(4)[:count]:
        size = float(rng.uniform(*sizes[count]))
        cx, cy = (0.5, 0.5) if count == 1 else _QUADRANTS[quadrant]
        reach = 0.22 if count == 1 else 0.05
        x, y = (float(np.clip(c + rng.uniform(-reach, reach), size / 2, 1 - size / 2)) for c in (cx, cy))
        yield (x, y), size


def _thing(rng: np.random.Generator, center: tuple[float, float], size: float) -> Thing:
    kind = ("object", "face", "game")[int(rng.choice(3, p=(0.56, 0.21, 0.23)))]
    color = material = None
    if kind == "object":
        shape = _pick(rng, DOMAINS["object"]) if rng.random() < 0.88 else None
        looks = int(rng.choice(4, p=(0.42, 0.20, 0.28, 0.10)))  # colour, material, both, plain
        color = _pick(rng, DOMAINS["color"]) if looks in (0, 2) else None
        material = _pick(rng, DOMAINS["material"]) if looks in (1, 2) else None
    else:
        shape = _pick(rng, DOMAINS["emotion" if kind == "face" else "sport"]) if rng.random() < 0.88 else None
    return Thing(kind, shape, color, material, center, size, int(rng.integers(2**31)))  # pyright: ignore[reportArgumentType]


def _scene(split: Split, seed: int, index: int) -> Scene:
    # Each scene has its own stream: scene i of a split does not depend on how many are asked for, and the split is
    # part of the entropy, so that no seed makes training and test scenes meet.
    rng = np.random.default_rng((SPLITS.index(split), seed, index))
    count = int(rng.choice((1, 2, 3), p=(0.25, 0.4, 0.35)))
    sizes = _TRAINING_SIZES if split == "train" else _SIZES
    things = tuple(_thing(rng, center, size) for center, size in _places(rng, count, sizes))
    return Scene(things, int(rng.integers(2**31)))


def stream(
    *, seed: int, contains: str | None = None, lacks: str | Sequence[str] | None = None, split: Split = "test"
) -> Iterator[Scene]:
    """Scenes without end, in the order of their index; the arguments are those of `sample`."""
    lacking = (lacks,) if isinstance(lacks, str) else tuple(lacks or ())
    for concept in (*lacking, *(() if contains is None else (contains,))):
        domain_of(concept)
    if contains in lacking:
        raise ValueError(f"scenes cannot both contain and lack {contains!r}")
    index = 0
    while True:
        scene = _scene(split, seed, index)
        index += 1
        if (contains is None or contains in scene.concepts) and scene.concepts.isdisjoint(lacking):
            yield scene


def sample(
    n: int,
    *,
    seed: int,
    contains: str | None = None,
    lacks: str | Sequence[str] | None = None,
    split: Split = "test",
) -> list[Scene]:
    """The first `n` scenes of a split that hold (or lack) a concept.

    Args:
        n: how many scenes.
        seed: which endless stream of scenes; equal seeds give equal scenes.
        contains: a concept every scene must hold.
        lacks: a concept, or several, no scene may hold.
        split: "train", "val" or "test": three worlds of scenes that share none, whatever the seed.

    Raises:
        UnknownConceptError: a concept that is not in `DOMAINS`.
    """
    scenes = stream(seed=seed, contains=contains, lacks=lacks, split=split)
    return [next(scenes) for _ in range(n)]
