"""Relearning: a few gradient steps on ten images with true answers, while the erasure is on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sauce_hooks.errors import AttackError
from sauce_hooks.evaluation.answers import ask, prepare
from sauce_hooks.evaluation.attacks.record import Leak
from sauce_hooks.evaluation.attacks.subject import Seen, Subject, compare
from sauce_hooks.evaluation.fitting import fit
from sauce_hooks.evaluation.loss_added import Answered, AnsweredBatch, prepare_answers
from sauce_hooks.evaluation.metrics import rate
from sauce_hooks.evaluation.probes import Probe, ProbeSet, Question
from sauce_hooks.hookpoint import evaluating, find_towers, unwrap

Describe = Callable[[Probe], str]
"""A true description of an image."""


@dataclass(frozen=True)
class Relearning:
    """A LoRA adapter (PEFT) on the language model and the projector, trained on a few images with true answers.

    The attacker asks for the concept (yes), for a concept that is not there (no), and for a description, so that always
    saying yes is not what is learned. Of the learning rates the one that tells most is what counts: that which has the
    largest share affirmed in images with the concept less that in images without. What a model that has never known the
    concept would learn from as many images is not known here, so that none of it can be called learning anew.
    """

    images: int = 10
    steps: int = 20
    lrs: Sequence[float] = (1e-3, 5e-3)
    rank: int = 8
    describe: Describe | None = None
    """True descriptions; without any, no description is trained on."""
    seed: int = 0
    retained: int = 2
    """Images of each other concept that are asked for afterwards."""
    name: str = "relearning"

    def __call__(self, subject: Subject) -> list[Leak]:
        """What is affirmed and named afterwards, with the learning rate that tells most."""
        batch = prepare_answers(self._answered(subject), subject.processor, batch_size=10_000)[0]
        found: list[tuple[Seen, float, Any]] = []
        with subject.forget():
            before = _retained(subject, self.retained)
            for lr in self.lrs:
                with relearned(subject.model, batch, steps=self.steps, lr=lr, rank=self.rank, seed=self.seed):
                    found.append((subject.look(), lr, _retained(subject, self.retained)))
        under, lr, retained = max(found, key=lambda one: (one[0].tells, sum(one[0].named)))
        rates = {**compare(subject.before, under), "retained before": rate(before), "retained": rate(retained)}
        rated = ", ".join(f"{lr:g}" for lr in self.lrs)
        setting = f"{self.images} images, {self.steps} steps, worst of the learning rates {rated}"
        return [Leak(self.name, setting, subject.method, subject.concept, rates)]

    def _answered(self, subject: Subject) -> list[Answered]:
        if subject.training is None:
            raise AttackError("relearning takes other images than those reported on: give training=ProbeSet(...)")
        probes = subject.training.positives[subject.concept][: self.images]
        if not probes:
            raise AttackError(f"no training image holds {subject.concept!r}: relearning has nothing to learn from")
        return true_answers(subject.training, subject.concept, probes, self.describe)


def true_answers(
    training: ProbeSet, concept: str, probes: Sequence[Probe], describe: Describe | None = None
) -> list[Answered]:
    """What an attacker trains on: of each image that the concept is there, that another is not, and a description."""
    wording, answered = training.wording, list[Answered]()
    for i, probe in enumerate(probes):
        domain = training.domains[training.domain_of(concept)]
        others = [c for names in (domain, *training.domains.values()) for c in names]
        absent = [c for c in dict.fromkeys(others) if c != concept and c not in probe.concepts]
        answered.append(Answered(probe.image, wording.yes_no(concept), wording.yes[0]))
        if absent:
            answered.append(Answered(probe.image, wording.yes_no(absent[i % len(absent)]), wording.no[0]))
        if describe is not None:
            answered.append(Answered(probe.image, wording.describe(), describe(probe)))
    return answered


@contextmanager
def relearned(
    model: nn.Module, batch: AnsweredBatch, *, steps: int, lr: float, rank: int = 8, seed: int = 0
) -> Generator[None]:
    """A model with an adapter trained on a batch for the length of a `with`; afterwards it is as it was.

    The adapter is on the linear layers that are neither of a vision tower nor the output head. Other adapters and hooks
    stay in effect, while it is trained and afterwards.
    """
    with _adapted(model, rank, seed):
        _train(model, batch, steps, lr, seed)
        yield


@contextmanager
def _adapted(model: nn.Module, rank: int, seed: int) -> Generator[None]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as problem:
        raise ImportError("relearning trains an adapter of PEFT: pip install 'sauce-hooks[baselines]'") from problem

    root: Any = unwrap(model)
    towers = {id(module) for tower in find_towers(root) for module in tower.module.modules()}
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    places = [
        (parent, name, child)
        for path, parent in root.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and id(child) not in towers and child is not head
        and "lora_" not in path and not name.startswith("lora_")
    ]  # fmt: skip
    if not places:
        raise AttackError(f"{type(root).__name__} has no linear layer besides its vision tower's: nothing to train")
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # In a box of their own: PEFT would switch off adapters that are in the model already.
            box = nn.ModuleDict({str(i): child for i, (_, _, child) in enumerate(places)})
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(box), bias="none")
            inject_adapter_in_model(config, box)
        for i, (parent, name, _) in enumerate(places):
            setattr(parent, name, box[str(i)])
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        for parameter, was in trained:
            parameter.requires_grad_(was)


class _Answers(nn.Module):
    """The model, and as its loss that of the answers; what the Trainer trains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _Answers:
        """Always as in evaluation: an erasure says nothing of dropout."""
        del mode
        return super().train(False)

    def forward(self, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of the answers' tokens."""
        logits_blv = self.model(**inputs).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits_blv.transpose(1, 2), labels[:, 1:].to(logits_blv.device), ignore_index=-100
        )
        return {"loss": loss}


def _train(model: nn.Module, batch: AnsweredBatch, steps: int, lr: float, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.inputs.items()}
    with evaluating(model), torch.random.fork_rng():
        fit(_Answers(model), [{"inputs": inputs, "labels": batch.labels_bl}], steps=steps, lr=lr, seed=seed)


def _retained(subject: Subject, most: int) -> list[bool]:
    """Whether other concepts are affirmed in images that hold them and not the erased one."""
    questions = [
        Question(probe, "yes_no", concept)
        for concept, probes in subject.probes.retained.items()
        for probe in [probe for probe in probes if subject.concept not in probe.concepts][:most]
        if concept != subject.concept
    ]
    wording, processor = subject.probes.wording, subject.processor
    batches = prepare(questions, wording, processor, subject.batch_size)
    return [answer.correct for answer in ask(subject.model, batches, wording, processor)]
