"""What stands on the page of a demonstration, as plain data. Nothing here knows how it will look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from sauce_hooks.evaluation import Results


@dataclass(frozen=True)
class YesNo:
    """One yes/no question about an image, answered by the original model and by the model that forgets."""

    concept: str
    truth: bool
    """Whether the image holds the concept."""
    before: str
    after: str


@dataclass(frozen=True)
class Card:
    """One image with the model's answers before and after."""

    image: Image.Image
    concepts: tuple[str, ...]
    """Every true concept."""
    before: str
    """The description the original model gives."""
    after: str
    checks: tuple[YesNo, ...]


@dataclass(frozen=True)
class Activating:
    """An image on which a feature fires strongly."""

    image: Image.Image
    concepts: tuple[str, ...]
    strength: float
    """The feature's activation on the patch where it is strongest."""
    patch: tuple[float, float, float, float]
    """That patch: left, top, right, bottom, as shares of the image's sides."""


@dataclass(frozen=True)
class FeatureCard:
    """One selected feature and the images that make it fire most, strongest first."""

    index: int
    score: float | None
    """Its score for the concept; None if it was not scored."""
    frequency: float | None
    """Share of the training tokens on which it fires; None if unknown."""
    images: tuple[Activating, ...]


@dataclass(frozen=True)
class ConceptFeatures:
    """What an erased concept is made of."""

    name: str
    n_features: int
    """How many features are edited; `features` shows the first of them."""
    gamma: float
    learnt_from: str
    """Where its scores come from, in words."""
    features: tuple[FeatureCard, ...]


@dataclass(frozen=True, eq=False)
class ChangeMap:
    """How strongly the erasure of each concept changes each patch of an image."""

    image: Image.Image
    concepts: tuple[str, ...]
    changes: Mapping[str, Float[np.ndarray, "rows columns"]]
    """By erased concept, ‖x′ − x‖ of every patch."""


@dataclass(frozen=True, eq=False)
class DemoPage:
    """Everything on the page, in its order."""

    erased: tuple[str, ...]
    n_features: int
    """How many features are edited, each counted once."""
    describe: str
    """The question the descriptions answer."""
    yes_no: str
    """The yes/no question, with {} for the concept."""
    cards: tuple[Card, ...]
    results: Results
    measured_on: str
    """Of what images the results are, in words."""
    concepts: tuple[ConceptFeatures, ...]
    searched: int
    """How many images the top images were found among."""
    maps: tuple[ChangeMap, ...]
    exact_elsewhere: bool
    """Whether a patch on which no selected feature fires stays as it was, bit for bit."""
    settings: Mapping[str, str]
    commands: Mapping[str, str]
    """What each shell command does, by command."""
    code: str
    """The erasure as a Python program."""
    version: str
    seconds: float
    """How long it all took, in seconds."""
