"""What the paper's tables are made on: a model with its SAE, the concepts, the images, the rivals and the attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from sauce_hooks.evaluation import Judge, Method, ProbeSet, Wording
from sauce_hooks.evaluation.attacks import Attack
from sauce_hooks.sae import VisionSAE

Task = Literal["concrete", "abstract"]
OURS = "SAUCE"
"""The name of the library's own method in every table."""


@dataclass(frozen=True)
class Size:
    """How much is measured: the paper has 50 test images a concept."""

    n: int = 50
    """Test images that hold each erased concept."""
    retained: int = 10
    """Test images of each retained concept."""
    merged: tuple[int, ...] = (1, 5, 10, 20)
    """How many concepts are erased at once. Each divides the number of concepts of a task, or of both tasks."""
    attacked: int = 8
    """Concrete concepts that every method is attacked on."""
    attack_n: int = 20
    """Test images with each of them, and as many without."""
    perturbed: int = 4
    """Of those concepts, how many adversarial images are made for: forty forwards and backwards an image."""
    perturbed_n: int = 8
    """Test images with each of these, and as many without."""


@dataclass(frozen=True)
class Relative:
    """Another model that the SAE is carried over to."""

    name: str
    expected: Literal["transfers", "ruined"]
    """What the paper says of it: the same tower under another language model; or another tower."""
    load: Callable[[], tuple[nn.Module, Any]] = field(repr=False)
    """The model and its processor; loaded only when its turn has come."""
    wording: Callable[[Any], Wording] | None = field(default=None, repr=False)
    """With its processor, how it is asked; as the study's own model by default."""


@dataclass(frozen=True)
class Study:
    """Everything that the four experiments need. Made anew in every process, so it costs little until it is used."""

    name: str
    model: nn.Module
    processor: Any
    sae: VisionSAE
    """With a bank of every concept of `tasks`."""
    tasks: Mapping[Task, tuple[str, ...]]
    """The concepts that are erased, of each of the paper's two tasks."""
    probes: Callable[[int, int], ProbeSet] = field(repr=False)
    """Test images: of `n` that hold each concept and `retained` others of each."""
    methods: Callable[[], Mapping[str, Method]] = field(repr=False)
    """What is compared in Table 2, `OURS` first. The paper's rivals are called GA, GD, KL and PO."""
    relatives: Sequence[Relative] = ()
    attacks: Callable[[], Mapping[str, Attack]] | None = field(default=None, repr=False)
    """By name, as in `evaluation.attacks.ATTACKS`: second language, quantisation, paraphrases, adversarial images."""
    training: Callable[[Sequence[str]], ProbeSet] | None = field(default=None, repr=False)
    """Of some concepts, the training images that an attacker has."""
    attack_probes: Callable[[Sequence[str], int], ProbeSet] | None = field(default=None, repr=False)
    """Of some concepts, `n` test images with each and `n` without; `probes` by default."""
    allow_bypass: bool = False
    """Erase although the language side reads blocks before the SAE's, too, as in Llama-3.2-Vision: it is then a partial
    erasure."""
    judge: Judge | None = None
    """Of descriptions; whole words by default."""
    size: Size = Size()
    batch_size: int = 64

    @property
    def concepts(self) -> tuple[str, ...]:
        """Of both tasks."""
        return tuple(concept for names in self.tasks.values() for concept in names)
