"""What weight-updating methods are trained on: questions with answers about images that hold a concept, and about others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sauce_hooks.errors import ImagesError
from sauce_hooks.evaluation.loss_added import Answered, own_answers
from sauce_hooks.evaluation.probes import Probe, Wording

REFUSALS: tuple[str, ...] = (
    "I'm sorry, but I can't say.",
    "I'm sorry, I don't know.",
    "I don't know.",
    "I cannot tell.",
    "I'm not sure about that.",
    "I'm unable to answer that.",
    "I can't answer that question.",
    "Sorry, I don't have that information.",
)
"""In the manner of TOFU's hundred; that the model does not know, said in English."""


Describe = Callable[[Sequence[Probe]], list[str]]
"""Descriptions of images."""


@dataclass(frozen=True, eq=False)
class ForgetRetain:
    """The two sets of one concept.

    Raises:
        ImagesError: a set is empty.
    """

    forget: Sequence[Answered]
    """About images that hold the concept."""
    retain: Sequence[Answered]
    """About instances of the other concepts of its domain."""
    refusals: Sequence[str] = REFUSALS
    """What PO teaches in place of the forget set's answers, one after the other."""

    def __post_init__(self) -> None:
        for name in ("forget", "retain", "refusals"):
            if not getattr(self, name):
                raise ImagesError(f"the {name} set is empty: unlearning by training needs at least one answer in it")

    @property
    def refused(self) -> list[Answered]:
        """The forget set with refusals for answers."""
        return [replace(item, answer=self.refusals[i % len(self.refusals)]) for i, item in enumerate(self.forget)]


def forget_retain(
    concept: str,
    holding: Sequence[Probe],
    others: Sequence[Probe],
    domain: Sequence[str],
    wording: Wording,
    describe: Describe,
    refusals: Sequence[str] = REFUSALS,
) -> ForgetRetain:
    """Both sets from images whose concepts are known: one question an image, a description and a yes/no question in turn.

    The forget set asks for the concept, and "yes" is the answer. The retain set never does: it asks for another concept of
    the domain, in turn one that the image holds and one that it lacks.

    Args:
        concept: what is to be forgotten.
        holding: images that hold it.
        others: images that hold another concept of its domain, and lack it.
        domain: the concepts of the domain.
        wording: how the model is asked.
        describe: what is said of images; `own_descriptions` where nobody has described them.
        refusals: what PO teaches the model to say.

    Raises:
        ImagesError: a set is empty, or an image of `others` holds the concept, or no other one of the domain.
    """
    affirmed = [Answered(probe.image, wording.yes_no(concept), wording.yes[0]) for probe in holding[1::2]]
    asked: list[Answered] = []
    for i, probe in enumerate(others):
        held = [name for name in domain if name in probe.concepts]
        if concept in held or not held:
            raise ImagesError(
                f"image {i} of the others holds {', '.join(map(repr, sorted(probe.concepts))) or 'nothing'}: it must hold a "
                f"concept of the domain ({', '.join(domain)}), and not {concept!r}"
            )
        absent = [name for name in domain if name not in held and name != concept]
        if i % 2 == 0:
            continue
        false = i % 4 == 3 and absent
        name = absent[i // 4 % len(absent)] if false else held[0]
        asked.append(Answered(probe.image, wording.yes_no(name), (wording.no if false else wording.yes)[0]))
    return ForgetRetain(
        alternating(_described(holding[::2], wording, describe), affirmed),
        alternating(_described(others[::2], wording, describe), asked),
        refusals,
    )


def own_descriptions(model: nn.Module, wording: Wording, processor: Any) -> Describe:
    """What the original model itself says of images."""

    def describe(probes: Sequence[Probe]) -> list[str]:
        images = [probe.image for probe in probes]
        said = own_answers(model, images, wording.describe(), processor, max_new_tokens=wording.max_new_tokens)
        return [item.answer for item in said]

    return describe


def _described(probes: Sequence[Probe], wording: Wording, describe: Describe) -> list[Answered]:
    texts = describe(probes)
    return [Answered(probe.image, wording.describe(), text) for probe, text in zip(probes, texts, strict=True)]


def alternating(first: Sequence[Answered], second: Sequence[Answered]) -> list[Answered]:
    """One of each in turn, then what is left."""
    mixed = [item for pair in zip(first, second, strict=False) for item in pair]
    shorter = min(len(first), len(second))
    return [*mixed, *first[shorter:], *second[shorter:]]
