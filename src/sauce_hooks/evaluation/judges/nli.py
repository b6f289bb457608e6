"""A judge that is a model of natural language inference: does the description entail that the image shows the concept?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.errors import JudgeError
from sauce_hooks.evaluation.judges.lexicon import domain_of
from sauce_hooks.evaluation.judges.opinion import UnsureJudge, Verdict

_HYPOTHESES = {
    "object": "The image shows {a} {concept}.",
    "sport": "The image shows {concept}.",
    "color": "Something in the image is {concept}.",
    "emotion": "Someone in the image is {concept}.",
    "material": "Something in the image is made of {concept}.",
}
"""By the concept's domain, as far as the lexicon knows it; the first is for all others."""
_STRIDE = 32
"""Tokens that two pieces of a description too long for the model share."""


def hypothesis(concept: str) -> str:
    """What a description is asked to entail: "The image shows a tiger."."""
    article = "an" if concept[:1].lower() in "aeiou" else "a"
    return _HYPOTHESES[domain_of(concept) or "object"].format(a=article, concept=concept)


class NLI(UnsureJudge):
    """Any sequence-classification model of Hugging Face that has an entailment label.

    P(entailment) of the description and "The image shows a tiger." decides; in the middle it is unsure. A description that
    is too long for the model is judged in overlapping pieces, and mentions what any of them mentions.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str | None = None,
        hypothesis: Callable[[str], str] = hypothesis,
        unsure: tuple[float, float] = (0.3, 0.7),
        batch_size: int = 32,
    ) -> None:
        """Judge with a model.

        Args:
            model: a `...ForSequenceClassification` whose config names its labels.
            tokenizer: its tokenizer, a fast one.
            name: what to call it in results; the config's name by default.
            hypothesis: what the description must entail, for a concept.
            unsure: probabilities of entailment strictly between which the judge can't tell.
            batch_size: pairs a forward.

        Raises:
            JudgeError: no label, or more than one, is called entailment.
            ValueError: bounds that are no probabilities in order.
        """
        if not 0 <= unsure[0] <= unsure[1] <= 1:
            raise ValueError(f"unsure must be two probabilities in order, got {unsure}")
        config: Any = model.config
        self._model, self._tokenizer = model.eval(), tokenizer
        self._entailment = _entailment(config.id2label)
        self._hypothesis, self._unsure, self._batch_size = hypothesis, unsure, batch_size
        called = name or Path(str(config.name_or_path)).name or type(model).__name__
        self._name = f"nli-1 {called}, unsure {unsure[0]:g} to {unsure[1]:g}, {hypothesis('X')!r}"

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> NLI:
        """The judge from a local folder, as `save_pretrained` writes it; nothing is downloaded and no code in it is run.

        Raises:
            JudgeError: no such folder, no model in it, or a model without an entailment label.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(folder).is_dir():
            raise JudgeError(
                f"no folder {str(folder)!r} with an NLI model: save one there with save_pretrained, model and tokenizer"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise JudgeError(f"{str(folder)!r} holds no NLI model that can be read: {error}") from error
        settings.setdefault("name", Path(folder).resolve().name)
        return cls(model, tokenizer, **settings)

    @property
    def name(self) -> str:
        """The model's name, the bounds, and what must be entailed of a concept X."""
        return self._name

    def verdicts(self, texts: Sequence[str], concept: str) -> list[Verdict]:
        """For each text whether it entails that the image shows the concept; None if the model can't tell."""
        low, high = self._unsure
        return [True if p >= high else False if p <= low else None for p in self.entailment(texts, concept).tolist()]

    @torch.no_grad()
    def entailment(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """P(entailment) of each text, the largest of its pieces."""
        found_t = torch.zeros(len(texts))
        device = next(self._model.parameters()).device
        pieces = self._pieces(texts, concept) if len(texts) else []
        for i in range(0, len(pieces), self._batch_size):
            part = pieces[i : i + self._batch_size]
            inputs = self._tokenizer.pad([piece for _, piece in part], return_tensors="pt").to(device)
            entails_b = self._model(**inputs).logits.float().softmax(-1)[:, self._entailment].cpu()
            text_b = torch.tensor([text for text, _ in part])
            found_t.scatter_reduce_(0, text_b, entails_b, "amax")
        return found_t

    def _pieces(self, texts: Sequence[str], concept: str) -> list[tuple[int, dict[str, list[int]]]]:
        """(text, model inputs) of every piece of every text."""
        claim = self._hypothesis(concept)
        config: Any = self._model.config
        most = min(self._tokenizer.model_max_length, _positions(config))
        needed = len(self._tokenizer("", claim).input_ids)
        if needed + 8 > most:
            raise JudgeError(
                f"the hypothesis {claim!r} takes {needed} of the {most} tokens that {self.name} reads: shorten it"
            )
        encoded = self._tokenizer(
            list(texts),
            [claim] * len(texts),
            truncation="only_first",
            max_length=most,
            stride=min(_STRIDE, (most - needed) // 2),
            return_overflowing_tokens=True,
        )
        names = [name for name in self._tokenizer.model_input_names if name in encoded]
        owners = encoded["overflow_to_sample_mapping"]
        return [(owner, {name: encoded[name][i] for name in names}) for i, owner in enumerate(owners)]


def _positions(config: Any) -> int:
    """Tokens that a model has positions for; RoBERTa's kind starts to count behind the padding's index."""
    text: Any = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return 512
    return most - (text.pad_token_id + 1 if text.model_type in _OFFSET_POSITIONS else 0)


_OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "xlm-roberta-xl", "longformer"}
)


def _entailment(labels: dict[int, str]) -> int:
    """Which logit is the entailment, by its label's name: its place differs from model to model."""
    named = {int(i): str(label).lower() for i, label in labels.items()}
    found = [i for i, label in named.items() if label.startswith("entail")]
    if len(found) != 1:
        raise JudgeError(
            f"which label is the entailment can't be told by name ({', '.join(map(str, labels.values()))}): set "
            "model.config.id2label as the model was trained, for example {0: 'contradiction', 1: 'neutral', 2: 'entailment'}"
        )
    return found[0]
