"""Adversarial images: pixels changed, hardly visibly, until the concept is affirmed, with gradients through the edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.activations.images import to_device
from sauce_hooks.errors import AttackError
from sauce_hooks.evaluation.answers import prepare, yes_no_tokens
from sauce_hooks.evaluation.attacks.record import Leak
from sauce_hooks.evaluation.attacks.subject import Subject, compare
from sauce_hooks.evaluation.probes import Question
from sauce_hooks.hookpoint import evaluating

Margin = Callable[[Float[Tensor, "batch *pixels"]], Float[Tensor, " batch"]]
"""What an attacker raises, of images with values from 0 to 1."""


@dataclass(frozen=True)
class AdversarialImages:
    """Projected gradient descent on the pixels (Madry et al., arXiv 1706.06083), adaptive: through the edited forward.

    It raises logit(yes) − logit(no) of the question for the concept, in images that hold it and in images that lack it. Any
    model can be fooled: what comes back in images that hold the concept is memory only as far as it does not come
    as easily in images that have nothing to remember (`forged_d`, and the original model's `false_d`).
    The pixels are those of the model's own resolution, after the processor has resized; they stay within 0 and 1, and the
    result is rounded to 8 bits, so that it is an image.
    """

    epsilon: float = 8 / 255
    """The most that any value of a pixel may change, of 1 (L∞)."""
    step: float = 1 / 255
    steps: int = 40
    restarts: int = 1
    """Begins at the image itself, then at random places around it."""
    seed: int = 0
    name: str = "adversarial images"

    def __call__(self, subject: Subject) -> list[Leak]:
        """What is affirmed, and named, in the changed images."""
        wording, processor = subject.probes.wording, subject.processor
        probes = (*subject.positives, *subject.negatives)
        questions = [Question(probe, "yes_no", subject.concept) for probe in probes]
        shown: dict[int, Tensor] = {}
        with subject.forget(), evaluating(subject.model):
            for batch in prepare(questions, wording, processor, subject.batch_size):
                inputs = batch.inputs  # made anew each time they are asked for
                space = PixelSpace.of(processor, inputs)
                margin = _margin(subject, inputs, space)
                images = space.images(inputs["pixel_values"])
                found = pgd(
                    margin, images, epsilon=self.epsilon, step=self.step, steps=self.steps,
                    restarts=self.restarts, seed=self.seed,
                )  # fmt: skip
                for question, pixels in zip(batch.questions, space.pixel_values(found), strict=True):
                    shown[id(question.probe)] = pixels
            under = subject.look(pixels=shown)
        times = f", {self.restarts} restarts" if self.restarts > 1 else ""
        setting = f"PGD {255 * self.epsilon:g}/255, {self.steps} steps of {255 * self.step:g}/255{times}"
        return [Leak(self.name, setting, subject.method, subject.concept, compare(subject.before, under))]


def pgd(
    margin: Margin,
    images: Float[Tensor, "batch *pixels"],
    *,
    epsilon: float = 8 / 255,
    step: float = 1 / 255,
    steps: int = 40,
    restarts: int = 1,
    seed: int = 0,
) -> Float[Tensor, "batch *pixels"]:
    """For every image the one with the largest margin that was met: x ← clip(x + step · sign ∇ margin(x)).

    Projected gradient ascent from the image itself (Madry et al., arXiv 1706.06083).

    Clipped to within `epsilon` of the image and to [0, 1], and rounded to 8 bits at the end. A rounded image is judged as
    it is: of the image itself and what was found, the one with the larger margin is given.

    Args:
        margin: what to raise; differentiable, each value depending on its own image alone.
        images: with values from 0 to 1.
        epsilon: the most that a value may change, 1 being white: 8/255 by default.
        step: the change of a value in one step.
        steps: gradients taken, for every restart.
        restarts: how often to begin.
        seed: of the places where the later ones begin.

    Raises:
        AttackError: no gradient comes through to the pixels, or none that is a number.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    best = images
    with torch.no_grad():
        most = margin(images)

    def keep(x: Tensor, reached: Tensor) -> None:
        nonlocal best, most
        better = reached > most
        best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x.detach(), best)
        most = torch.where(better, reached.detach(), most)

    for restart in range(restarts):
        x = images
        if restart:
            noise = torch.rand(images.shape, generator=generator).to(images)
            x = torch.clamp(images + (2 * noise - 1) * epsilon, low, high)
        for _ in range(steps):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                reached = margin(x)
                slope: Any = torch.autograd.grad(reached.sum(), x, allow_unused=True)[0]
            if slope is None or not torch.isfinite(slope).all():
                raise AttackError(
                    "the margin's gradient with respect to the pixels is " + ("none" if slope is None else "not finite")
                    + ": this forward cannot be attacked by gradients (is it quantised, or run without them?)"
                )  # fmt: skip
            keep(x, reached)
            x = torch.clamp(x + step * slope.sign(), low, high)
        with torch.no_grad():
            keep(x, margin(x))
    rounded = torch.clamp((best * 255).round() / 255, low, high)
    with torch.no_grad():
        better = margin(rounded) > margin(images)
    return torch.where(better.view(-1, *[1] * (images.ndim - 1)), rounded, images)


@dataclass(frozen=True, eq=False)
class PixelSpace:
    """Between what the processor gives, normalised, and images with values from 0 to 1."""

    mean: Float[Tensor, "channels 1 1"]
    std: Float[Tensor, "channels 1 1"]

    @classmethod
    def of(cls, processor: Any, inputs: Mapping[str, Tensor]) -> PixelSpace:
        """As the processor normalises; `AttackError` if its pixels are not images of channels, height and width."""
        images = getattr(processor, "image_processor", processor)
        pixels = inputs.get("pixel_values")
        mean, std = (_numbers(getattr(images, name, None)) for name in ("image_mean", "image_std"))
        if getattr(images, "do_normalize", True) is False:
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        if pixels is None or pixels.ndim < 4 or not mean or pixels.shape[-3] != len(mean):
            raise AttackError(
                f"the pixels of {type(processor).__name__} are not images of channels × height × width with a known mean "
                f"and deviation (pixel_values: {None if pixels is None else tuple(pixels.shape)}): adversarial images are "
                "not made for packed patches"
            )
        return cls(*(torch.tensor(values).view(-1, 1, 1) for values in (mean, std)))

    def images(self, pixel_values: Float[Tensor, "batch *pixels"]) -> Float[Tensor, "batch *pixels"]:
        """From 0 to 1."""
        return (pixel_values * self.std.to(pixel_values) + self.mean.to(pixel_values)).clamp(0, 1)

    def pixel_values(self, images: Float[Tensor, "batch *pixels"]) -> Float[Tensor, "batch *pixels"]:
        """As the model takes them."""
        return (images - self.mean.to(images)) / self.std.to(images)


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values] if isinstance(values, Sequence) else []


def _margin(subject: Subject, given: Mapping[str, Tensor], space: PixelSpace) -> Margin:
    """logit(yes) − logit(no) of the first token of the answer, of images in the place of those given."""
    parameter = next(subject.model.parameters())
    tokenizer, wording = subject.processor.tokenizer, subject.probes.wording
    yes, no = yes_no_tokens(wording, tokenizer)
    if not yes or not no:
        raise AttackError("yes and no begin with the same tokens: their margin has no gradient")
    inputs = to_device(given, parameter)
    model: Any = subject.model

    def margin(images: Tensor) -> Tensor:
        pixels = space.pixel_values(images).to(parameter.device, parameter.dtype)
        logits_bv = model(**{**inputs, "pixel_values": pixels}).logits[:, -1].float()  # padded on the left
        return (logits_bv[:, yes].amax(1) - logits_bv[:, no].amax(1)).to(images.device)

    return margin
