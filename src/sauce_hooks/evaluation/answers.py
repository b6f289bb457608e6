"""Asking the model, and reading what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sauce_hooks.activations.images import one_a_prompt, to_device
from sauce_hooks.evaluation.probes import Question, Wording

Status = Literal["yes", "no", "refusal", "invalid", "text"]
_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|sorry|i can(?:no|')t|unable to|as an ai)\b"
    r"|抱歉|对不起|无法(?:回答|提供|描述|判断)",
    re.IGNORECASE,
)
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
"""A sign of a script that puts no space between words."""
_BEGINNING = 40
"""Characters of a description in which a refusal must show."""
KEPT_BYTES = 2**30
"""Model inputs that a list of batches keeps, so that the next method needs not have them made again."""


@dataclass(frozen=True)
class Answer:
    """What the model said to a question."""

    question: Question
    text: str
    status: Status
    """Of a yes/no question: yes, no, refusal or invalid. Of a description: text, refusal, or invalid (empty)."""
    margin: float
    """logit(yes) − logit(no) of the first answer token; NaN for descriptions."""

    @property
    def correct(self) -> bool:
        """Whether a yes/no answer is the true one; refusals and invalid answers never are."""
        return self.status == ("yes" if self.question.truth else "no")

    @property
    def affirmed(self) -> bool:
        """Whether the answer is yes."""
        return self.status == "yes"


def read_yes_no(text: str, wording: Wording) -> Status:
    """The status of an answer to a yes/no question: its first word decides.

    Chinese and Japanese put no space between words. There the longest of the words that the answer begins with decides.
    """
    found = re.match(r"\W*(\w+)", text.lower())
    word = found[1] if found else ""
    plain = word in (*wording.yes, *wording.no)  # "No, I can't see any" is a no
    if _REFUSAL.search(text) and (not plain or _UNSPACED.match(word)):
        return "refusal"
    begun = [
        (len(option), status)
        for status, options in (("yes", wording.yes), ("no", wording.no))
        for option in options
        if word == option or (_UNSPACED.match(option) and word.startswith(option))
    ]
    return max(begun)[1] if begun else "invalid"  # pyright: ignore[reportReturnType]


def read_description(text: str) -> Status:
    """The status of a description. A refusal begins as one; "a sign that says sorry" is none."""
    if _REFUSAL.search(text[:_BEGINNING]):
        return "refusal"
    return "text" if re.search(r"\w", text) else "invalid"


@dataclass(frozen=True)
class Batch:
    """Questions of one kind, asked together, as often as one likes."""

    questions: tuple[Question, ...]
    make: Callable[[], dict[str, Tensor]]
    """Opens the images and processes the questions."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes. Made when it is asked for: thousands of images do not fit into memory."""
        return self.make()


class _Kept:
    """Model inputs that are made once, as long as there is room for them; after that, every time."""

    def __init__(self, room: int) -> None:
        self._room = room

    def __call__(self, make: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        kept: dict[str, Tensor] | None = None

        def inputs() -> dict[str, Tensor]:
            nonlocal kept
            if kept is not None:
                return kept
            made = make()
            size = sum(tensor.nbytes for tensor in made.values())
            if size <= self._room:
                self._room -= size
                kept = made
            return made

        return inputs


def prepare(
    questions: Sequence[Question], wording: Wording, processor: Any, batch_size: int, *, keep_bytes: int = KEPT_BYTES
) -> list[Batch]:
    """Questions as batches of model inputs, yes/no questions and descriptions apart.

    Images are opened and processed when a batch is asked, and the inputs kept for the next time up to `keep_bytes` in all.
    """
    kept = _Kept(keep_bytes)

    def processed(part: Sequence[Question]) -> dict[str, Tensor]:
        images: dict[int, Any] = {}  # an image that several questions are about is opened once
        for question in part:
            if id(question.probe) not in images:
                images[id(question.probe)] = question.probe.image
        inputs = processor(
            images=one_a_prompt([images[id(question.probe)] for question in part], processor),
            text=[wording.prompt(question) for question in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        return dict(inputs)

    batches: list[Batch] = []
    for kind in ("yes_no", "describe"):
        chosen = [question for question in questions if question.kind == kind]
        for i in range(0, len(chosen), batch_size):
            part = tuple(chosen[i : i + batch_size])
            batches.append(Batch(part, kept(partial(processed, part))))
    return batches


def first_tokens(words: Sequence[str], tokenizer: Any) -> list[int]:
    """The tokens an answer of one of these words can begin with, in any of its usual spellings."""
    spellings = [form for word in words for w in (word, word.capitalize()) for form in (w, f" {w}")]
    ids = (tokenizer(text, add_special_tokens=False).input_ids for text in spellings)
    return sorted({tokens[0] for tokens in ids if tokens and tokens[0] != tokenizer.unk_token_id})


def yes_no_tokens(wording: Wording, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a yes and a no begin with, without those that both do: such a byte says nothing."""
    yes, no = (first_tokens(words, tokenizer) for words in (wording.yes, wording.no))
    both = set(yes) & set(no)
    return [token for token in yes if token not in both], [token for token in no if token not in both]


@torch.no_grad()
def ask(model: nn.Module, batches: Sequence[Batch], wording: Wording, processor: Any) -> Iterator[Answer]:
    """Every question's answer, greedily decoded, in the order of the batches."""
    parameter = next(model.parameters())
    tokenizer = processor.tokenizer
    yes, no = yes_no_tokens(wording, tokenizer)
    generator: Any = model
    for batch in batches:
        inputs = to_device(batch.inputs, parameter)
        describing = batch.questions[0].kind == "describe"
        output = generator.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=wording.max_new_tokens if describing else wording.answer_tokens,
            return_dict_in_generate=True,
            output_logits=not describing,
        )
        texts = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if describing or not yes or not no:
            margins = [float("nan")] * len(texts)
        else:
            first = output.logits[0].float()
            margins = (first[:, yes].amax(1) - first[:, no].amax(1)).tolist()
        for question, text, margin in zip(batch.questions, texts, margins, strict=True):
            status = read_description(text) if describing else read_yes_no(text, wording)
            yield Answer(question, text, status, margin)
