"""lmms-eval's questions as a model wants them: prompts, generation settings, answers, losses. Knows nothing of lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from sauce_hooks.activations.images import open_image, to_device
from sauce_hooks.errors import LmmsEvalError
from sauce_hooks.evaluation import chat_prompt

_PASSED = ("top_p", "top_k", "num_beams", "repetition_penalty")
"""What of a task's generation settings `generate` takes as it is. Others (image_aspect_ratio) are some model's own."""


@dataclass(frozen=True)
class Asked:
    """One question with its images."""

    prompt: str
    images: tuple[Image.Image, ...]


def asked(processor: Any, question: str, visuals: Sequence[Any] | None) -> Asked:
    """A task's question and images as the model is asked.

    Raises:
        LmmsEvalError: video or sound, or a question with places for another number of images.
    """
    images = list(visuals or ())
    for image in images:
        if not isinstance(image, Image.Image):
            raise LmmsEvalError(f"this task shows {type(image).__name__}, not images: video and sound are not supported")
    return Asked(prompt(processor, question, len(images)), tuple(open_image(image) for image in images))


def prompt(processor: Any, question: str, n_images: int) -> str:
    """The text for the processor: by its chat template, or in LLaVA's plain form where it has none.

    Images come first, unless the question itself says where they belong.

    Raises:
        LmmsEvalError: the question has places for another number of images.
    """
    placeholder = getattr(processor, "image_token", "")
    written = question.count(placeholder) if placeholder else 0
    if written not in (0, n_images):
        raise LmmsEvalError(f"the question has {written} {placeholder} and {n_images} images: {question!r}")
    if n_images == 1 and not (written and getattr(processor, "chat_template", None)):
        return chat_prompt(processor, question)
    if getattr(processor, "chat_template", None):
        places = [] if written else [{"type": "image"}] * n_images
        content = [*places, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if written or not placeholder:
        return question
    return f"user: {f'{placeholder} ' * n_images}{question} assistant:"


def generation(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """A task's generation settings as `generate` takes them. A temperature of 0 is greedy, whatever else is said."""
    temperature = given.get("temperature")
    sampled = bool(temperature) if temperature is not None else bool(given.get("do_sample"))
    sampled = sampled and given.get("do_sample") is not False
    settings = {name: given[name] for name in _PASSED if given.get(name) is not None}
    if sampled and temperature:
        settings["temperature"] = float(temperature)
    if not sampled:  # they would only be warned about
        settings = {name: value for name, value in settings.items() if name not in ("top_p", "top_k")}
    length = given.get("max_new_tokens", given.get("max_gen_toks"))
    return {**settings, "do_sample": sampled, "max_new_tokens": int(length or max_new_tokens)}


def stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The strings at which an answer ends."""
    until = given.get("until") or ()
    return (until,) if isinstance(until, str) else tuple(until)


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the strings."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def processed(processor: Any, part: Sequence[Asked], parameter: torch.Tensor) -> dict[str, Any]:
    """Model inputs of some questions, padded on the left, on a parameter's device and in its dtype."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pictures = [list(one.images) for one in part] if part[0].images else None
    texts = [one.prompt for one in part]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left")
    return to_device(dict(inputs), parameter)


@torch.no_grad()
def answers(model: nn.Module, processor: Any, part: Sequence[Asked], settings: Mapping[str, Any]) -> list[str]:
    """What the model says to each; all of them with images or all without."""
    inputs = processed(processor, part, next(model.parameters()))
    generator: Any = model
    output = generator.generate(**inputs, **settings)
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def loss(model: nn.Module, processor: Any, one: Asked, continuation: str) -> tuple[float, bool]:
    """The mean cross-entropy of a continuation's tokens, in nats, and whether greedy decoding gives it.

    lmms-eval's multiple choice takes the smallest, so that it is the loss and not the log-likelihood that it wants.

    Raises:
        LmmsEvalError: a continuation without a token.
    """
    parameter = next(model.parameters())
    n_before = processed(processor, [one], parameter)["input_ids"].shape[1]
    # Processed as one text: some processors also make masks that are as long as it.
    inputs = processed(processor, [replace(one, prompt=one.prompt + continuation)], parameter)
    tokens_t = inputs["input_ids"][0, n_before:]
    if not tokens_t.numel():
        raise LmmsEvalError(f"the continuation {continuation!r} has no token of its own")
    logits_tv = model(**inputs).logits[0, n_before - 1 : -1].float()
    losses_t = nn.functional.cross_entropy(logits_tv, tokens_t, reduction="none")
    return losses_t.mean().item(), bool((logits_tv.argmax(-1) == tokens_t).all())
