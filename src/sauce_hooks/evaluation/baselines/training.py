"""Unlearning by training, for one concept at a time: transformers' Trainer minimises one of the `OBJECTIVES`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sauce_hooks.activations.images import to_device
from sauce_hooks.errors import DivergedError, ImagesError
from sauce_hooks.evaluation.baselines.data import ForgetRetain
from sauce_hooks.evaluation.baselines.losses import OBJECTIVES, Objective, Said
from sauce_hooks.evaluation.baselines.weights import (
    Kind,
    Parts,
    Student,
    make_student,
    read_weights,
    write_weights,
)
from sauce_hooks.evaluation.fitting import fit
from sauce_hooks.evaluation.loss_added import Answered, AnsweredBatch, prepare_answers
from sauce_hooks.evaluation.store import fingerprint_of
from sauce_hooks.hookpoint import untouched, unwrap

_NOT_ASKED = -100
_FORMAT = 1
"""Raised when the same settings would give other weights."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what training does, but for the data."""

    lr: float
    """Of AdamW, falling linearly to 0."""
    kind: Kind = "lora"
    parts: Parts = "language"
    """The towers stay as they are by default: LLaVA's own fine-tuning freezes its tower, and other models share it."""
    steps: int = 13
    """With the batch size: each of the paper's 200 images is seen once."""
    batch_size: int = 16
    """Answers of the forget set a step, and as many of the retain set."""
    weight: float = 1.0
    """λ, of the term on the retain set."""
    beta: float = 0.1
    """β, of NPO."""
    rank: int = 8
    """Of LoRA."""
    max_grad_norm: float = 1.0
    seed: int = 0
    """Of the adapter's first weights and of the order of the batches."""


def train(
    model: nn.Module,
    method: str,
    forget: Sequence[AnsweredBatch],
    retain: Sequence[AnsweredBatch],
    settings: Settings,
    *,
    adapter: str = "unlearned",
) -> Student:
    """Train a student to forget; the model itself is not touched, and says what π_0 is.

    Args:
        model: the original model.
        method: a name in `OBJECTIVES`.
        forget: batches of the forget set, for PO with refusals for answers.
        retain: batches of the retain set; may be empty for GA.
        settings: all else.
        adapter: PEFT's name of the adapter.

    Raises:
        DivergedError: a trained weight is not finite.
        ImagesError: a set that is needed is empty.
        ImportError: LoRA without PEFT.
        ValueError: an unknown method, or an encoder-decoder.
    """
    objective = _objective(method)
    if getattr(unwrap(model).config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(unwrap(model)).__name__} is an encoder-decoder: its answers do not follow the question's tokens. "
            "Unlearning by training is there for decoder-only language models"
        )
    used = {"forget": forget, "retain": retain} if objective.retains else {"forget": forget}
    if empty := [name for name, batches in used.items() if not batches]:
        raise ImagesError(f"the {empty[0]} set is empty: {method} needs at least one answer in it")
    steps = [{name: _inputs(batches[i % len(batches)]) for name, batches in used.items()} for i in range(settings.steps)]
    with torch.random.fork_rng(), untouched(model):
        torch.manual_seed(settings.seed)
        student = _student(model, settings, adapter)
        fit(
            _Unlearning(student.model, model, objective, settings),
            steps,
            steps=settings.steps,
            lr=settings.lr,
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
        )
    student.model.eval()
    if not all(bool(torch.isfinite(p).all()) for p in student.trained.values()):
        raise DivergedError(f"{method} diverged at a learning rate of {settings.lr:g}: the weights are not finite any more")
    return student


def _student(model: nn.Module, settings: Settings, adapter: str) -> Student:
    return make_student(model, kind=settings.kind, parts=settings.parts, rank=settings.rank, adapter=adapter)


def _objective(method: str) -> Objective:
    if method not in OBJECTIVES:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[method]


class _Unlearning(nn.Module):
    """The student, and as its loss the objective; what the Trainer trains."""

    def __init__(self, student: nn.Module, original: nn.Module, objective: Objective, settings: Settings) -> None:
        super().__init__()
        self.student = student
        self._original = (original,)  # in a tuple: no submodule, so that the Trainer leaves it alone
        self._objective, self._settings = objective, settings

    def train(self, mode: bool = True) -> _Unlearning:
        """Always as in evaluation: dropout would part the student from the original before the first step."""
        del mode
        return super().train(False)

    def forward(self, forget: dict[str, Any], retain: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """The loss of one step."""
        objective, settings = self._objective, self._settings
        forgotten = self._said(forget, objective.original_on == "forget")
        retained = None if retain is None else self._said(retain, objective.original_on == "retain")
        return {"loss": objective.loss(forgotten, retained, settings.weight, settings.beta)}

    def _said(self, batch: dict[str, Any], with_original: bool) -> Said:
        said = said_by(self.student, batch["inputs"], batch["labels_bl"])
        if not with_original:
            return said
        with torch.no_grad():
            return replace(said, original_av=said_by(self._original[0], batch["inputs"], batch["labels_bl"]).logits_av)


def said_by(model: nn.Module, inputs: dict[str, Tensor], labels_bl: Tensor) -> Said:
    """A model's logits at the answers' tokens."""
    logits_blv: Tensor = model(**to_device(inputs, next(model.parameters()))).logits
    logits_blv = logits_blv[:, -labels_bl.shape[1] :]  # GIT puts the image's own before the text's
    after_bl = labels_bl.to(logits_blv.device)[:, 1:]
    asked_bl = after_bl != _NOT_ASKED
    return Said(logits_blv[:, :-1][asked_bl], after_bl[asked_bl], asked_bl.nonzero()[:, 0])


_Step = dict[str, dict[str, Any]]


def _inputs(batch: AnsweredBatch) -> dict[str, Any]:
    return {"inputs": batch.inputs, "labels_bl": batch.labels_bl}


@dataclass(eq=False)
class Retrained:
    """A weight-updating method as `evaluate` takes it: `with retrained("red"): ...` has the model retrained to forget it.

    It is trained at the first use of a concept; what was learnt is kept in `cache`, and a sweep that was cut short goes on.
    """

    model: nn.Module
    processor: Any
    method: str
    """A name in `OBJECTIVES`."""
    data: Callable[[str], ForgetRetain]
    """Of a concept, what it is trained on."""
    settings: Settings
    cache: Path | None = None
    """A folder for what was learnt; a file is used again if model, data and settings are the same."""
    _learnt: dict[str, Student] = field(default_factory=dict[str, Student], repr=False)

    def __post_init__(self) -> None:
        _objective(self.method)

    @contextmanager
    def __call__(self, concept: str) -> Generator[None]:
        """The model with the concept unlearnt, for the length of a `with`."""
        with self.learn(concept).inside(self.model):
            yield

    def learn(self, concept: str) -> Student:
        """The weights that have unlearnt a concept: from this object, from the cache, or by training.

        Raises:
            DivergedError: a trained weight is not finite.
        """
        if concept not in self._learnt:
            self._learnt = {concept: self._from_cache_or_trained(concept)}  # one at a time: they can be large
        return self._learnt[concept]

    def _from_cache_or_trained(self, concept: str) -> Student:
        data, settings = self.data(concept), self.settings
        forget = data.refused if _objective(self.method).answers == "refusals" else data.forget
        made_with = {
            "format": _FORMAT,
            "method": self.method,
            "concept": concept,
            "settings": asdict(settings),
            "data": digest(forget, data.retain),
            "model": fingerprint_of(self.model),
        }
        adapter = _plain(f"{self.method}-{concept}")
        path = None if self.cache is None else self.cache / f"{adapter[:60]}-{_short(made_with)}.safetensors"
        if path is not None and (tensors := read_weights(path, made_with)) is not None:
            student = _student(self.model, settings, adapter)
            student.load(tensors)
            student.model.eval()
            return student
        retain = data.retain if _objective(self.method).retains else ()
        forgets, retains = (prepare_answers(part, self.processor, settings.batch_size) for part in (forget, retain))
        student = train(self.model, self.method, forgets, retains, settings, adapter=adapter)
        if path is not None:
            write_weights(path, student.tensors(), made_with)
        return student


def _plain(name: str) -> str:
    """A name for an adapter or a file: a concept's own may hold dots and slashes."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _short(made_with: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]


def digest(*parts: Sequence[Answered]) -> str:
    """A digest of questions, answers and images, in their order."""
    hashed = hashlib.sha256()
    for part in parts:
        for item in part:
            pixels = item.image.convert("RGB")
            hashed.update(repr((pixels.size, item.prompt, item.answer)).encode())
            hashed.update(pixels.tobytes())
        hashed.update(b"\0")
    return hashed.hexdigest()
