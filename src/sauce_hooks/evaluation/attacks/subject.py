"""What is attacked, and what it says about the concept before and under an attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sauce_hooks.bank import Rate
from sauce_hooks.evaluation.answers import Answer, Batch, ask, prepare
from sauce_hooks.evaluation.metrics import auroc, rate
from sauce_hooks.evaluation.probes import Probe, ProbeSet, Question, Wording


@dataclass(frozen=True)
class Seen:
    """What a model says about one concept, image by image."""

    affirmed: tuple[bool, ...]
    """In images that hold it; likewise the margins of the yes/no answers, and whether descriptions name it."""
    named: tuple[bool, ...]
    margins: tuple[float, ...]
    falsely_affirmed: tuple[bool, ...]
    """In images that lack it."""
    falsely_named: tuple[bool, ...]
    false_margins: tuple[float, ...]

    @property
    def tells(self) -> float:
        """How far yes/no answers tell images with the concept from images without: 1 fully, 0 not at all (Youden's J)."""
        return _share(self.affirmed) - _share(self.falsely_affirmed)


@dataclass(frozen=True)
class Subject:
    """One concept, and a model that is made to forget it."""

    model: nn.Module
    processor: Any
    probes: ProbeSet
    """What figures are reported on."""
    training: ProbeSet | None
    """Other images, which an attacker may learn from."""
    concept: str
    method: str
    forget: Callable[[], AbstractContextManager[Any]]
    """Makes the model forget the concept for the length of a `with`."""
    before: Seen
    """What the model says with the method on and without any attack."""
    batch_size: int = 64

    @property
    def positives(self) -> Sequence[Probe]:
        """Images that hold the concept."""
        return self.probes.positives[self.concept]

    @property
    def negatives(self) -> Sequence[Probe]:
        """Images that lack it."""
        return self.probes.negatives[self.concept]

    def look(self, wording: Wording | None = None, *, pixels: Mapping[int, Tensor] | None = None) -> Seen:
        """`look` at this concept, in the wording given or the probes' own; call it with the method on."""
        return look(
            self.model, self.probes, self.concept, self.processor, wording, batch_size=self.batch_size, pixels=pixels
        )

    def original(self) -> AbstractContextManager[Any]:
        """The model without the method."""
        return nullcontext()


def look(
    model: nn.Module,
    probes: ProbeSet,
    concept: str,
    processor: Any,
    wording: Wording | None = None,
    *,
    batch_size: int = 64,
    pixels: Mapping[int, Tensor] | None = None,
) -> Seen:
    """Ask for a concept, and for descriptions, in images that hold it and images that lack it.

    Args:
        model: the model, with whatever makes it forget, or attacks it, on.
        probes: the images.
        concept: the concept.
        processor: the model's processor.
        wording: how to ask; the probes' own by default.
        batch_size: questions asked at once.
        pixels: by `id` of a probe, other `pixel_values` (of that image alone) to show in place of its own.
    """
    words = wording or probes.wording
    images = (*probes.positives[concept], *probes.negatives[concept])
    questions = [Question(probe, "yes_no", concept) for probe in images]
    questions += [Question(probe, "describe", None) for probe in images]
    batches = prepare(questions, words, processor, batch_size)
    if pixels is not None:
        batches = [_shown(batch, pixels) for batch in batches]
    answers = list(ask(model, batches, words, processor))
    n, n_images = len(probes.positives[concept]), len(images)
    asked, described = answers[:n_images], answers[n_images:]

    def affirmed(some: Sequence[Answer]) -> tuple[bool, ...]:
        return tuple(answer.status == "yes" for answer in some)

    def named(some: Sequence[Answer]) -> tuple[bool, ...]:
        return tuple(words.mentions(answer.text, concept) for answer in some)

    margins = tuple(answer.margin for answer in asked)
    return Seen(
        affirmed(asked[:n]), named(described[:n]), margins[:n],
        affirmed(asked[n:]), named(described[n:]), margins[n:],
    )  # fmt: skip


def _shown(batch: Batch, pixels: Mapping[int, Tensor]) -> Batch:
    inputs = batch.inputs
    shown = inputs["pixel_values"].clone()
    for row, question in enumerate(batch.questions):
        shown[row] = pixels[id(question.probe)]
    return Batch(batch.questions, lambda: {**inputs, "pixel_values": shown})


def worst(seen: Sequence[Seen]) -> Seen:
    """What an attacker gets who takes, image by image, whatever affirms or names the concept in any of several attempts.

    The same is done to the images that lack it: more attempts forge more, too.
    """

    def either(rows: Sequence[tuple[bool, ...]]) -> tuple[bool, ...]:
        return tuple(any(image) for image in zip(*rows, strict=True))

    def largest(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(max(image) for image in zip(*rows, strict=True))

    return Seen(
        either([s.affirmed for s in seen]),
        either([s.named for s in seen]),
        largest([s.margins for s in seen]),
        either([s.falsely_affirmed for s in seen]),
        either([s.falsely_named for s in seen]),
        largest([s.false_margins for s in seen]),
    )


def compare(before: Seen, under: Seen) -> dict[str, Rate]:
    """The figures of `LEAKS` that follow from what is said without and under an attack, of the same images in one order."""

    def gained(then: Sequence[bool], now: Sequence[bool]) -> Rate:
        return rate(n for t, n in zip(then, now, strict=True) if not t)

    return {
        "UA_d before": rate(not said for said in before.affirmed),
        "UA_d": rate(not said for said in under.affirmed),
        "recovered_d": gained(before.affirmed, under.affirmed),
        "false_d before": rate(before.falsely_affirmed),
        "false_d": rate(under.falsely_affirmed),
        "forged_d": gained(before.falsely_affirmed, under.falsely_affirmed),
        "AUROC before": auroc(before.margins, before.false_margins),
        "AUROC": auroc(under.margins, under.false_margins),
        "UA_g before": rate(not said for said in before.named),
        "UA_g": rate(not said for said in under.named),
        "recovered_g": gained(before.named, under.named),
        "false_g before": rate(before.falsely_named),
        "false_g": rate(under.falsely_named),
    }


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
