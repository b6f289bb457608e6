"""The loss added is the difference of two losses, each as one would measure it by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import families
from sauce_hooks import VisionSAE, find_hook_point, scenes
from sauce_hooks.errors import ImagesError
from sauce_hooks.evaluation import Answered, describe_sae, loss_added, own_answers, prepare_answers
from sauce_hooks.evaluation.loss_added import _row_losses
from sauce_hooks.hookpoint import TokenPolicy
from tiny import D_IN, make_sae, make_vision_sae, pictures, snapshot, weights

PICTURES = pictures(3)
PROMPTS = (scenes.describe_prompt(), scenes.yes_no_prompt("tiger"))
ANSWERED = [
    Answered(PICTURES[0], PROMPTS[0], "a red tiger and a blue cat."),
    Answered(PICTURES[0], PROMPTS[1], "yes"),
    Answered(PICTURES[1], PROMPTS[1], "no"),
    Answered(PICTURES[2], PROMPTS[0], "a face."),
]


def by_hand(model, processor, answered, change=None):
    """Mean loss of an answer's token, one question at a time, every patch at the hook point changed by `change`."""
    tokenizer = processor.tokenizer
    handle = None
    if change is not None:

        def hook(_module, _args, output):
            acts = output[0] if isinstance(output, tuple) else output
            edited = torch.cat([acts[:, :1], change(acts[:, 1:])], 1)  # CLIP's class token stays
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = find_hook_point(model).module(model).register_forward_hook(hook, prepend=True)
    losses = []
    for item in answered:
        inputs = dict(processor(images=[item.image], text=[item.prompt], return_tensors="pt"))
        answer = torch.tensor([*tokenizer(item.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
        asked = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs = {name: t for name, t in inputs.items() if name in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            logits = model(**inputs).logits[0, asked - 1 : -1]
        losses.append(F.cross_entropy(logits, answer, reduction="none"))
    if handle is not None:
        handle.remove()
    return torch.cat(losses)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_three_losses_are_those_measured_by_hand(model, processor, architecture, batch_size):
    sae = make_vision_sae(model, architecture, **({"k": 8} if architecture == "topk" else {}))
    before, values = snapshot(model), weights(model)
    found = loss_added(model, sae, prepare_answers(ANSWERED, processor, batch_size))
    assert snapshot(model) == before
    assert all(torch.equal(value, values[name]) for name, value in weights(model).items())

    seen = []
    by_hand(model, processor, ANSWERED, lambda acts: (seen.append(acts), acts)[1])
    mean = torch.cat(seen).mean((0, 1))
    tokens = by_hand(model, processor, ANSWERED)
    assert found.n_tokens == len(tokens)
    assert found.n_images == 3
    assert found.original == pytest.approx(tokens.mean().item(), rel=1e-4)
    with torch.no_grad():
        reconstructed = by_hand(model, processor, ANSWERED, lambda acts: sae.sae.decode(sae.sae.encode(acts)))
    ablated = by_hand(model, processor, ANSWERED, lambda acts: mean.expand_as(acts))
    assert found.reconstructed == pytest.approx(reconstructed.mean().item(), rel=1e-4)
    assert found.ablated == pytest.approx(ablated.mean().item(), rel=1e-4)
    assert len({round(loss, 3) for loss in (found.original, found.reconstructed, found.ablated)}) == 3
    assert found.added_low <= found.added <= found.added_high


def exact_sae(model):
    """An SAE whose reconstructions are the activations: each direction and its opposite."""
    sae = make_sae("standard", d_sae=2 * D_IN)
    both = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return VisionSAE.wrap(sae, find_hook_point(model))


def test_reconstructions_without_an_error_cost_nothing(model, processor):
    found = loss_added(model, exact_sae(model), prepare_answers(ANSWERED, processor))
    assert found.added == pytest.approx(0, abs=1e-5)
    assert found.recovered == pytest.approx(1, abs=1e-3)
    assert found.added_high - found.added_low < 1e-4


def test_only_the_tokens_that_an_eraser_edits_are_replaced(model, processor):
    sae = make_vision_sae(model)
    batches = prepare_answers(ANSWERED, processor)
    patches = loss_added(model, sae, batches)
    sae.tokens = TokenPolicy(read="class", edit="patches")  # what it reads plays no part
    assert loss_added(model, sae, batches) == patches


def test_the_interval_is_that_of_images_not_of_questions(model, processor):
    sae = make_vision_sae(model)
    alone = prepare_answers([ANSWERED[0], ANSWERED[1]], processor)
    found = loss_added(model, sae, alone)
    assert found.n_images == 1
    assert found.added_low == pytest.approx(found.added_high) == pytest.approx(found.added)
    apart = [ANSWERED[0], replace(ANSWERED[1], image=PICTURES[1])]
    found = loss_added(model, sae, prepare_answers(apart, processor))
    assert found.n_images == 2
    assert found.added_low < found.added_high


def test_questions_keep_their_tokens_and_answers_follow_them(processor):
    [batch] = prepare_answers(ANSWERED, processor)
    tokenizer = processor.tokenizer
    for row, labels, mask, item in zip(
        batch.inputs["input_ids"], batch.labels_bl, batch.inputs["attention_mask"], ANSWERED, strict=True
    ):
        prompt = processor(images=[item.image], text=[item.prompt], return_tensors="pt")["input_ids"][0]
        answer = [*tokenizer(item.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        whole = [*prompt.tolist(), *answer]
        assert row[: len(whole)].tolist() == whole
        assert mask.tolist() == [1] * len(whole) + [0] * (len(row) - len(whole))
        assert labels.tolist() == [-100] * len(prompt) + answer + [-100] * (len(row) - len(whole))


def test_the_models_own_answers_are_what_it_generates(model, processor):
    answered = own_answers(model, PICTURES, PROMPTS[0], processor, max_new_tokens=5)
    assert [(item.image, item.prompt) for item in answered] == [(picture, PROMPTS[0]) for picture in PICTURES]
    inputs = processor(images=PICTURES[:1], text=PROMPTS[:1], return_tensors="pt")
    said = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answered[0].answer == processor.tokenizer.decode(said, skip_special_tokens=True)


NAMES = {"paligemma": "PaliGemmaProcessor"}


def stand_in(name, inputs):
    """A processor that gives these inputs for any two questions; an answer is its tokens, as text."""

    def call(self, **_kwargs):
        types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if name == "paligemma" else {}
        return {key: value.clone() for key, value in inputs.items()} | types

    def tokens(text, **_kwargs):
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    tokens.eos_token_id = tokens.pad_token_id = None
    return type(NAMES.get(name, "Processor"), (), {"__call__": call, "tokenizer": staticmethod(tokens)})()


FAMILIES = [
    "llava",
    "llava_next",
    "paligemma",
    "gemma3",
    "mllama",
    "idefics",
    "idefics3",
    "git",
    "qwen2_vl",
    "blip-2",
]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_answers_loss_is_that_with_which_it_was_generated(name):
    """Of any family: no token sees the answer's later ones, masks reach over the answer, logits and tokens line up."""
    model, inputs = families.build(name)
    processor = stand_in(name, inputs)
    greedy = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    said = model.generate(**processor(), **greedy, output_logits=True, return_dict_in_generate=True)
    tokens, logits = said.sequences[:, -4:], torch.stack(said.logits, 1)
    lengths = (4, 2)
    answered = [
        Answered(PICTURES[i], "", " ".join(map(str, tokens[i, :length].tolist()))) for i, length in enumerate(lengths)
    ]
    [batch] = prepare_answers(answered, processor)
    [found] = list(_row_losses(model, [batch]))
    for i, length in enumerate(lengths):
        wanted = F.cross_entropy(logits[i, :length].float(), tokens[i, :length], reduction="sum")
        assert found[i] == pytest.approx(wanted.item(), rel=1e-3)


def test_an_encoder_decoder_is_an_error():
    model, _ = families.build("florence2")
    hook_point = find_hook_point(model)
    sae = VisionSAE.wrap(make_sae(d_in=hook_point.d_in), hook_point)
    with pytest.raises(ValueError, match="encoder-decoder"):
        loss_added(model, sae, [])


def test_no_answers_are_an_error(model, sae):
    with pytest.raises(ImagesError, match="no questions"):
        loss_added(model, sae, [])


def test_describing_keeps_everything_with_the_sae(model, processor, sae):
    describe_sae(model, sae, PICTURES, processor=processor, answered=ANSWERED, answers="true")
    assert sae.stats.n_rows == 3 * 16
    assert sae.gallery.n_images == 3
    assert sae.stats.loss_added == loss_added(model, sae, prepare_answers(ANSWERED, processor), answers="true")
    describe_sae(model, sae, PICTURES, processor=processor)
    assert sae.stats.loss_added is None
