"""Asking the model, and reading what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sauce_hooks.evaluation.probes import Question, Wording

Status = Literal["yes", "no", "refusal", "invalid", "text"]
_REFUSAL = re.compile(r"\b(?:i'?m sorry|i am sorry|sorry|i can(?:no|')t|unable to|as an ai)\b", re.IGNORECASE)


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


def read_yes_no(text: str, wording: Wording) -> Status:
    """The status of an answer to a yes/no question: its first word decides."""
    if _REFUSAL.search(text):
        return "refusal"
    word = re.match(r"\W*(\w+)", text.lower())
    if word and word[1] in wording.yes:
        return "yes"
    return "no" if word and word[1] in wording.no else "invalid"


def read_description(text: str) -> Status:
    """The status of a description."""
    if _REFUSAL.search(text):
        return "refusal"
    return "text" if re.search(r"\w", text) else "invalid"


@dataclass(frozen=True)
class Batch:
    """Questions of one kind, processed once and asked as often as one likes."""

    questions: tuple[Question, ...]
    inputs: dict[str, Tensor]


def prepare(questions: Sequence[Question], wording: Wording, processor: Any, batch_size: int) -> list[Batch]:
    """Questions as batches of model inputs, yes/no questions and descriptions apart."""
    batches: list[Batch] = []
    for kind in ("yes_no", "describe"):
        chosen = [question for question in questions if question.kind == kind]
        for i in range(0, len(chosen), batch_size):
            part = tuple(chosen[i : i + batch_size])
            inputs = processor(
                images=[question.probe.image for question in part],
                text=[wording.prompt(question) for question in part],
                return_tensors="pt",
                padding=True,
                padding_side="left",
            )
            batches.append(Batch(part, dict(inputs)))
    return batches


def first_tokens(words: Sequence[str], tokenizer: Any) -> list[int]:
    """The tokens an answer of one of these words can begin with, in any of its usual spellings."""
    spellings = [form for word in words for w in (word, word.capitalize()) for form in (w, f" {w}")]
    ids = (tokenizer(text, add_special_tokens=False).input_ids for text in spellings)
    return sorted({tokens[0] for tokens in ids if tokens and tokens[0] != tokenizer.unk_token_id})


@torch.no_grad()
def ask(model: nn.Module, batches: Sequence[Batch], wording: Wording, processor: Any) -> Iterator[Answer]:
    """Every question's answer, greedily decoded, in the order of the batches."""
    parameter = next(model.parameters())
    tokenizer = processor.tokenizer
    yes, no = (first_tokens(words, tokenizer) for words in (wording.yes, wording.no))
    generator: Any = model
    for batch in batches:
        inputs = {
            name: t.to(parameter.device, parameter.dtype if t.is_floating_point() else None)
            for name, t in batch.inputs.items()
        }
        describing = batch.questions[0].kind == "describe"
        output = generator.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=wording.max_new_tokens if describing else 2,
            return_dict_in_generate=True,
            output_logits=not describing,
        )
        texts = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if describing:
            margins = [float("nan")] * len(texts)
        else:
            first = output.logits[0].float()
            margins = (first[:, yes].amax(1) - first[:, no].amax(1)).tolist()
        for question, text, margin in zip(batch.questions, texts, margins, strict=True):
            status = read_description(text) if describing else read_yes_no(text, wording)
            yield Answer(question, text, status, margin)
