"""What the language model loses when an SAE's reconstructions take the place of activations, on given answers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sauce_hooks.activations import read_activations
from sauce_hooks.activations.images import one_a_prompt, to_device
from sauce_hooks.bank import Projection
from sauce_hooks.erasure import ConceptEraser, Edit, attach, check_ran, detach
from sauce_hooks.errors import ImagesError
from sauce_hooks.hookpoint import HookPoint, TokenPolicy, unwrap
from sauce_hooks.sae.vision_sae import LossAdded, VisionSAE

_NOT_ASKED = -100
"""The label of a token that is no part of an answer, as PyTorch and Transformers have it."""
_DRAWS = 2_000
_LIKE_THE_LAST = frozenset({"cross_attention_mask", "image_attention_mask"})
"""Inputs (of Mllama, of Idefics) that say which images a token sees: an answer's see what the question's last one does."""
_ANSWER_TYPE = {"PaliGemmaProcessor": 1}
"""`token_type_ids` of an answer where they are not 0: PaliGemma lets tokens of type 0 see those after them."""


@dataclass(frozen=True, eq=False)
class Answered:
    """A question about an image, and an answer to it."""

    image: Image.Image
    prompt: str
    """The question, as the processor takes it."""
    answer: str


@dataclass(frozen=True, eq=False)
class AnsweredBatch:
    """Questions and answers as a model takes them, the answers given token by token (teacher forcing)."""

    inputs: dict[str, Tensor]
    labels_bl: Int[Tensor, "batch length"]
    """The answers' tokens in their places, −100 elsewhere."""
    images: tuple[int, ...]
    """Which image each row is about: rows of one image are resampled together."""


def prepare_answers(answered: Sequence[Answered], processor: Any, batch_size: int = 32) -> list[AnsweredBatch]:
    """Batches for `loss_added`: after each question come its answer's tokens and the end-of-text token, then padding."""
    images = {id(item.image): i for i, item in enumerate(answered)}
    tokenizer = processor.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    batches: list[AnsweredBatch] = []
    for start in range(0, len(answered), batch_size):
        part = answered[start : start + batch_size]
        inputs = dict(
            processor(
                images=one_a_prompt([item.image for item in part], processor),
                text=[item.prompt for item in part],
                return_tensors="pt",
                padding=True,
                padding_side="left",
            )
        )
        ids_bl, asked_bl = inputs["input_ids"], inputs["attention_mask"].bool()
        answers = [tokenizer(item.answer, add_special_tokens=False).input_ids + end for item in part]
        tails = [torch.tensor(answer, dtype=torch.long) for answer in answers]
        for name, t in inputs.items():
            if name in _LIKE_THE_LAST:
                lasts = [row[-1:].expand(len(tail), *row.shape[1:]) for row, tail in zip(t, tails, strict=True)]
                inputs[name] = _followed(t, asked_bl, lasts, pad=0)
            elif isinstance(t, Tensor) and t.shape == ids_bl.shape:
                kind = _ANSWER_TYPE.get(type(processor).__name__, 0) if name == "token_type_ids" else 0  # 0 is text
                inputs[name] = _followed(t, asked_bl, [torch.full_like(tail, kind) for tail in tails], pad=0)
        inputs["input_ids"] = _followed(ids_bl, asked_bl, tails, pad=tokenizer.pad_token_id or 0)
        inputs["attention_mask"] = _followed(asked_bl.long(), asked_bl, [torch.ones_like(tail) for tail in tails], pad=0)
        labels_bl = _followed(torch.full_like(ids_bl, _NOT_ASKED), asked_bl, tails, pad=_NOT_ASKED)
        batches.append(AnsweredBatch(inputs, labels_bl, tuple(images[id(item.image)] for item in part)))
    return batches


def _followed(
    questions_bl: Shaped[Tensor, "batch question *rest"],
    asked_bl: Bool[Tensor, "batch question"],
    tails: Sequence[Tensor],
    *,
    pad: int,
) -> Shaped[Tensor, "batch length *rest"]:
    """Each row's question without its padding, then its tail, then padding on the right."""
    rows = [torch.cat([row[asked], tail]) for row, asked, tail in zip(questions_bl, asked_bl, tails, strict=True)]
    return pad_sequence(rows, batch_first=True, padding_value=pad)


@torch.no_grad()
def own_answers(
    model: nn.Module, images: Sequence[Image.Image], prompt: str, processor: Any, *, max_new_tokens: int = 48
) -> list[Answered]:
    """What the model itself says to a question, greedily decoded: answers for images that nobody has described.

    The loss added to these says how far reconstructions take the model from its own words, not from the truth.
    """
    parameter = next(model.parameters())
    generator: Any = model
    answered: list[Answered] = []
    for image in images:
        inputs = to_device(dict(processor(images=[image], text=[prompt], return_tensors="pt")), parameter)
        output = generator.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        said = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answered.append(Answered(image, prompt, said))
    return answered


@torch.no_grad()
def loss_added(
    model: nn.Module, sae: VisionSAE, batches: Sequence[AnsweredBatch], *, answers: str = "given", seed: int = 0
) -> LossAdded:
    """The mean cross-entropy of an answer's token: as the model is, with reconstructions, with the mean activation.

    What takes the place of activations does so on the tokens that an eraser of this SAE edits (`sae.tokens.edit`), through
    the eraser's own machinery. The mean is that over these tokens of all the images asked about.

    Args:
        model: the whole vision-language model; left exactly as it was.
        sae: the SAE.
        batches: questions with their answers, from `prepare_answers`.
        answers: whose answers these are, in words; kept with the result.
        seed: of the bootstrap over images.

    Raises:
        ImagesError: no answers.
        ValueError: the language model is an encoder-decoder.
        SAEMismatchError: the SAE belongs to another tower.
    """
    if getattr(unwrap(model).config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(unwrap(model)).__name__} is an encoder-decoder: its answers do not follow the question's tokens. "
            "The loss added is measured on decoder-only language models"
        )
    if not batches:
        raise ImagesError("no questions with answers to measure the loss on: give at least one image")
    place = sae.locate(model)
    whole = TokenPolicy(read=sae.tokens.edit, edit=sae.tokens.edit)
    mean_d = _token_mean(model, [batch.inputs for batch in batches], place, whole)
    eye_dd = torch.eye(len(mean_d), device=mean_d.device)
    conditions: tuple[AbstractContextManager[Any], ...] = (
        nullcontext(),
        # γ = 1 without the error is x′ = decode(encode(x)) whichever feature is named.
        ConceptEraser(model, sae, [[0]], gamma=1.0, preserve_error=False),
        _erasing(model, place, Edit(whole.edit, projections=(Projection(eye_dd, eye_dd, mean_d),))),
    )
    losses: list[np.ndarray] = []
    for condition in conditions:
        with condition:
            losses.append(np.concatenate(list(_row_losses(model, batches))))
    tokens = np.concatenate([(batch.labels_bl != _NOT_ASKED).sum(1).numpy() for batch in batches])
    _, image_of = np.unique([image for batch in batches for image in batch.images], return_inverse=True)
    sums = np.stack([np.bincount(image_of, row.astype(np.float64)) for row in (*losses, tokens)])
    original, reconstructed, ablated = _means(sums.sum(1)).tolist()
    drawn = np.random.default_rng(seed).integers(0, sums.shape[1], (_DRAWS, sums.shape[1]))
    draws = _means(sums[:, drawn].sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        recovered = (draws[2] - draws[1]) / (draws[2] - draws[0])
    added_low, added_high = np.percentile(draws[1] - draws[0], (2.5, 97.5))
    recovered_low, recovered_high = np.nanpercentile(recovered, (2.5, 97.5))
    return LossAdded(
        original=original,
        reconstructed=reconstructed,
        ablated=ablated,
        added_low=float(added_low),
        added_high=float(added_high),
        recovered_low=float(recovered_low),
        recovered_high=float(recovered_high),
        n_images=sums.shape[1],
        n_tokens=int(tokens.sum()),
        answers=answers,
    )


def _means(sums: np.ndarray) -> np.ndarray:
    """Losses a token, from the sums of the three losses and of the tokens."""
    return sums[:3] / sums[3]


def _row_losses(model: nn.Module, batches: Sequence[AnsweredBatch]) -> Iterator[Float[np.ndarray, " batch"]]:
    """Σ −log p over the tokens of each row's answer."""
    like = next(model.parameters())
    for batch in batches:
        logits_blv: Tensor = model(**to_device(batch.inputs, like)).logits
        logits_blv = logits_blv[:, -batch.labels_bl.shape[1] :]  # GIT puts the image's own before the text's
        labels_bl = batch.labels_bl.to(logits_blv.device)[:, 1:]
        asked_bl = labels_bl != _NOT_ASKED
        loss_a = F.cross_entropy(logits_blv[:, :-1][asked_bl].float(), labels_bl[asked_bl], reduction="none")
        row_a = asked_bl.nonzero()[:, 0]
        yield loss_a.new_zeros(len(labels_bl)).index_add_(0, row_a, loss_a).double().cpu().numpy()


def _token_mean(
    model: nn.Module, images: Any, hook_point: HookPoint, tokens: TokenPolicy, processor: Any = None
) -> Float[Tensor, " d"]:
    """The mean activation over all tokens read of a set of images, in one streaming pass."""
    total, n = None, 0
    for rows in read_activations(model, images, hook_point, tokens=tokens.read, processor=processor):
        part = rows.double().sum(0)
        total, n = part if total is None else total + part, n + len(rows)
    assert total is not None  # reading no images raises
    return (total / n).float()


@contextmanager
def _erasing(model: nn.Module, hook_point: HookPoint, edit: Edit) -> Generator[None]:
    """An edit in effect for the length of a `with`, attached and checked as `ConceptEraser` is."""
    attachment = attach(model, hook_point, edit)
    try:
        yield
    except BaseException:
        detach(attachment)
        raise
    detach(attachment)
    check_ran(attachment)
