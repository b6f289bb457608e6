"""Attacks: what they count, that gradients go through the edit, and that the model is as it was when they are over."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import ConceptEraser, VisionSAE
from sauce_hooks.bank import Rate
from sauce_hooks.errors import AttackError, UnknownConceptError
from sauce_hooks.evaluation import ORIGINAL, Probe, ProbeSet, Wording
from sauce_hooks.evaluation.attacks import (
    AdversarialImages,
    Attacked,
    Instructions,
    Leak,
    LinearProbe,
    Paraphrases,
    Relearning,
    SecondLanguage,
    Seen,
    Subject,
    compare,
    pgd,
    plain_instructions,
    plain_paraphrases,
    quantised,
    run_attacks,
)
from sauce_hooks.evaluation.attacks.pixels import PixelSpace
from sauce_hooks.evaluation.attacks.probing import logistic, received
from sauce_hooks.evaluation.attacks.relearning import relearned, true_answers
from sauce_hooks.evaluation.attacks.subject import look, worst
from sauce_hooks.evaluation.loss_added import prepare_answers
from sauce_hooks.scenes import wording
from sauce_hooks.scenes.attack import INSTRUCTIONS, PARAPHRASES, instructed
from sauce_hooks.scenes.language import DESCRIBE, YES_NO, split_words, vocabulary
from tiny import logits, model_inputs, pictures, snapshot, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def probe_set(n: int = 3, seed: int = 0) -> ProbeSet:
    images = iter(pictures(4 * n, seed))

    def some(*concepts: str) -> list[Probe]:
        return [Probe(next(images), frozenset(concepts)) for _ in range(n)]

    return ProbeSet(
        domains={"object": ("tiger", "cat"), "color": ("red", "blue")},
        positives={"tiger": some("tiger", "red")},
        retained={"tiger": some("tiger"), "cat": some("cat")},
        negatives={"tiger": some("cat")},
        wording=wording(),
    )


def subject(
    model: Any, processor: Any, sae: VisionSAE, *, method: str = "SAUCE", n: int = 3, n_training: int = 12
) -> Subject:
    probes = probe_set(n)
    before = look(model, probes, "tiger", processor)

    def forget() -> Any:
        return nullcontext() if method == ORIGINAL else ConceptEraser(model, sae, ["tiger"])

    return Subject(model, processor, probes, probe_set(n_training, seed=1), "tiger", method, forget, before)


# What is counted. ------------------------------------------------------------------------------------------------------

bools = st.lists(st.booleans(), min_size=4, max_size=4).map(tuple)
seen = st.builds(
    Seen, affirmed=bools, named=bools, margins=st.just((0.0, 1.0, 2.0, 3.0)), falsely_affirmed=bools, falsely_named=bools,
    false_margins=st.just((0.0, 1.0, 2.0, 3.0)),
)  # fmt: skip


@given(seen, seen)
def test_what_leaks_is_counted_in_both_kinds_of_images(before: Seen, under: Seen):
    rates = compare(before, under)
    assert rates["UA_d"].value == pytest.approx(1 - sum(under.affirmed) / 4)
    assert rates["UA_g before"].value == pytest.approx(1 - sum(before.named) / 4)
    assert rates["false_d"].value == pytest.approx(sum(under.falsely_affirmed) / 4)
    back = sum(now and not then for then, now in zip(before.affirmed, under.affirmed, strict=True))
    assert rates["recovered_d"].n == 4 - sum(before.affirmed)
    assert rates["recovered_d"].n == 0 or rates["recovered_d"].value == pytest.approx(back / rates["recovered_d"].n)
    made_up = sum(now and not then for then, now in zip(before.falsely_affirmed, under.falsely_affirmed, strict=True))
    assert rates["forged_d"].n == 0 or rates["forged_d"].value * rates["forged_d"].n == pytest.approx(made_up)


@given(st.lists(seen, min_size=1, max_size=4))
def test_the_worst_of_several_leaks_at_least_as_much_as_each_and_forges_as_much(several: list[Seen]):
    together = worst(several)
    for one in several:
        assert all(a >= b for a, b in zip(together.affirmed, one.affirmed, strict=True))
        assert all(a >= b for a, b in zip(together.falsely_affirmed, one.falsely_affirmed, strict=True))
    assert sum(together.named) <= sum(sum(one.named) for one in several)
    assert worst([several[0]]) == several[0]


def leak(attack: str, setting: str, concept: str, **values: float) -> Leak:
    rates = {name.replace("_before", " before"): Rate(value, 10, value, value) for name, value in values.items()}
    return Leak(attack, setting, "SAUCE", concept, rates)


def test_goals_are_printed_as_reached_or_not():
    few = [
        leak("adversarial images", "PGD", "red", recovered_d=0.2),
        leak("adversarial images", "PGD", "tiger", recovered_d=0.4),
        leak("second language", "French", "red", UA_d_before=1.0, UA_d=0.99, UA_g_before=1.0, UA_g=1.0),
        leak("paraphrases", "worst of 10", "red", UA_d=0.95, UA_g=0.85),
        leak("paraphrases", "is there {}? | yes", "red", UA_d=0.0, UA_g=0.0),
    ]
    page = Attacked(few).to_markdown()
    reached = {row["goal"].partition(" (")[0]: row["reached"] for row in Attacked(few).goals()}
    assert reached == {
        "adaptive PGD recovers at most 25%": "not reached",
        "a second language loses at most 2 points of UA": "reached",
        "the worst of ten paraphrases leaks at most 10%": "not reached",
    }
    assert "recovered_d 30.0" in page and "1 − UA_g 15.0" in page and r"is there {}? \| yes" in page
    frame = Attacked(few).to_frame()
    assert set(frame["figure"]) == {"recovered_d", "UA_d before", "UA_d", "UA_g before", "UA_g"} and len(frame) == 10
    assert list(Attacked([]).to_frame().columns) == list(frame.columns)


# Adversarial images. ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_pgd_finds_the_best_image_of_a_linear_margin_within_its_bounds(seed: int):
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(2, 3, 4, 4, generator=generator) * 255).round() / 255
    slope = torch.randn(3, 4, 4, generator=generator)

    def margin(x: torch.Tensor) -> torch.Tensor:
        return (x * slope).flatten(1).sum(1)

    found = pgd(margin, images, epsilon=8 / 255, step=2 / 255, steps=5)
    best = (images + 8 / 255 * slope.sign()).clamp(0, 1)
    assert torch.allclose(found, best, atol=1e-5)
    assert torch.allclose(found * 255, (found * 255).round(), atol=1e-3)


def test_pgd_never_gives_less_than_the_image_itself():
    images = torch.full((1, 1, 2, 2), 0.5)

    def margin(x: torch.Tensor) -> torch.Tensor:  # steep, so that every step overshoots
        return -(1e4 * (x - 0.5)).square().flatten(1).sum(1)

    assert torch.equal(pgd(margin, images, steps=3, restarts=2), images)


def test_pgd_says_so_if_no_gradient_arrives():
    with pytest.raises(AttackError, match="gradient"):
        pgd(lambda x: x.detach().flatten(1).sum(1).requires_grad_(), torch.rand(1, 1, 2, 2), steps=1)


@pytest.mark.parametrize("kind", ["scale", "gated"])
def test_the_gradient_goes_through_the_edit(model: Any, sae: VisionSAE, kind: str):
    """It is that of the edited forward (central differences), and not that of the forward without the edit."""
    model, vision_sae = model.double(), sae
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in model_inputs(1).items()}
    vision_sae.sae.to(dtype=torch.float64)
    concept = replace(sae.concepts["tiger"], gamma=-3.0)
    if kind == "gated":
        concept = replace(concept, edit="gated", means=(1.0, 1.0, 1.0), gates=(0.1, 0.1, 0.1))
    eraser = ConceptEraser(model, vision_sae, [concept])

    seen: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(output))

    def margin(pixels: torch.Tensor) -> torch.Tensor:  # behind it a norm is computed in float32, too coarse for differences
        model(**{**inputs, "pixel_values": pixels})
        return seen[-1][..., 0].sum()

    def slope() -> torch.Tensor:
        x = inputs["pixel_values"].clone().requires_grad_()
        return torch.autograd.grad(margin(x), x)[0]

    generator = torch.Generator().manual_seed(0)
    along = torch.randn(inputs["pixel_values"].shape, generator=generator, dtype=torch.float64)
    without = float((slope() * along).sum())
    with eraser, torch.no_grad():
        h = 1e-6
        expected = float(margin(inputs["pixel_values"] + h * along) - margin(inputs["pixel_values"] - h * along)) / (2 * h)
    with eraser:
        measured = float((slope() * along).sum())
    assert measured == pytest.approx(expected, rel=1e-4)
    assert measured != pytest.approx(without, rel=1e-2)


def test_pixels_are_attacked_between_0_and_1_and_normalised_as_the_processor_does(processor: Any):
    inputs = processor(images=pictures(2), text=["user: <image> assistant:"] * 2, return_tensors="pt", padding=True)
    space = PixelSpace.of(processor, inputs)
    images = space.images(inputs["pixel_values"])
    assert images.min() >= 0 and images.max() <= 1
    assert torch.allclose(images * 255, (images * 255).round(), atol=1e-2)  # the pictures' own bytes
    assert torch.allclose(space.pixel_values(images), inputs["pixel_values"], atol=1e-5)
    with pytest.raises(AttackError, match="packed"):
        PixelSpace.of(processor, {"pixel_values": torch.zeros(5, 1176)})


def test_adversarial_images_raise_the_margin_through_the_eraser(model: Any, processor: Any, sae: VisionSAE):
    one, before = subject(model, processor, sae, n=2), snapshot(model)
    with one.forget():
        plain = one.look()
    (found,) = AdversarialImages(steps=5, step=4 / 255, epsilon=16 / 255)(replace(one, before=plain))
    assert found.setting == "PGD 16/255, 5 steps of 4/255" and found.rates["UA_d"].n == 2
    assert snapshot(model) == before


# Relearning, and the linear probe. -------------------------------------------------------------------------------------


def test_relearning_trains_behind_the_tower_and_leaves_nothing(model: Any, processor: Any, sae: VisionSAE):
    pytest.importorskip("peft")
    one = subject(model, processor, sae)
    assert one.training is not None
    answered = true_answers(one.training, "tiger", one.training.positives["tiger"][:4], lambda probe: "a tiger.")
    batch = prepare_answers(answered, processor, 100)[0]
    before, kept, bare = snapshot(model), weights(model), logits(model)
    frozen = [p.requires_grad for p in model.parameters()]

    def loss() -> float:
        with torch.no_grad():
            found = model(**batch.inputs).logits[:, :-1].transpose(1, 2)
        return float(torch.nn.functional.cross_entropy(found, batch.labels_bl[:, 1:], ignore_index=-100))

    with ConceptEraser(model, sae, ["tiger"]) as eraser:
        untrained, erased = loss(), logits(model)
        with relearned(model, batch, steps=5, lr=1e-2):
            assert eraser.attached
            assert loss() < 0.9 * untrained
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            assert trained and not any("vision_tower" in name or "lora_" not in name for name in trained)
            assert any("multi_modal_projector" in name for name in trained)
        assert torch.equal(logits(model), erased)
    assert torch.equal(logits(model), bare) and snapshot(model) == before
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_relearned_from_is_true_and_asks_for_what_is_not_there_too(processor: Any):
    probes = probe_set(4)
    answered = true_answers(probes, "tiger", probes.positives["tiger"], lambda probe: "a red tiger.")
    said = {(item.prompt, item.answer) for item in answered}
    assert (wording().yes_no("tiger"), "yes") in said and (wording().yes_no("cat"), "no") in said
    assert (wording().yes_no("red"), "no") not in said  # it is there
    assert len(answered) == 12


def test_the_probe_reads_what_the_language_side_gets_with_the_eraser_on(model: Any, processor: Any, sae: VisionSAE):
    one, before = subject(model, processor, sae), snapshot(model)
    bare = received(one, one.positives)
    with ConceptEraser(model, sae, ["tiger"]):
        erased = received(one, one.positives)
    assert bare.shape == (3, 64) and not torch.allclose(bare, erased)
    assert torch.equal(received(one, one.positives), bare)
    assert snapshot(model) == before
    (found,) = LinearProbe()(one)
    assert found.rates["probe accuracy"].n == 6 and 0 <= found.rates["probe AUROC"].value <= 1


@given(st.integers(0, 100))
def test_the_probe_finds_a_direction_and_none_in_noise(seed: int):
    generator = torch.Generator().manual_seed(seed)
    y_n = torch.arange(200) % 4 == 0  # of unequal classes
    x_nd = torch.randn(200, 8, generator=generator)
    noise = logistic(x_nd, y_n, 1e-2)(torch.randn(400, 8, generator=generator))
    assert 0.2 < float((noise > 0).float().mean()) < 0.8  # balanced: it does not always say the larger class
    x_nd[y_n, 3] += 6.0
    assert float(((logistic(x_nd, y_n, 1e-2)(x_nd) > 0) == y_n).float().mean()) > 0.97


# Words. ----------------------------------------------------------------------------------------------------------------


def test_the_bundled_phrasings_are_ten_in_words_that_the_model_knows():
    known, (questions, describes) = set(vocabulary()), zip(*PARAPHRASES, strict=True)
    assert len(set(questions)) == len(set(describes)) == 10
    assert set(YES_NO["en"]) < set(questions) and set(DESCRIBE["en"]) < set(describes)  # the held-out ones among them
    for text in (*questions, *describes, *INSTRUCTIONS.values()):
        assert set(split_words(text.replace("{}", "tiger"))) <= known, text
    assert len(instructed("red")) == len(INSTRUCTIONS) and "red" in instructed("red")["claim"].describe()


def test_wordings_that_the_original_cannot_read_are_left_out(
    model: Any, processor: Any, sae: VisionSAE, monkeypatch: pytest.MonkeyPatch
):
    """This model has random weights: it says the same of all images."""
    wordings = {"first": wording(), "second": wording(1)}
    monkeypatch.setattr(Seen, "tells", property(lambda seen: 0.0))
    for attack in (Paraphrases(wordings), Instructions(lambda concept: wordings)):
        found = attack(subject(model, processor, sae, method=ORIGINAL))
        assert [leak.setting for leak in found] == ["first (not read, left out)", "second (not read, left out)"]
        assert attack(subject(model, processor, sae)) == []
    monkeypatch.setattr(Seen, "tells", property(lambda seen: 1.0))
    found = Paraphrases(wordings)(subject(model, processor, sae))
    assert [leak.setting for leak in found] == ["first", "second", "worst of 2"]
    with pytest.raises(AttackError, match="no wording"):
        SecondLanguage({})(subject(model, processor, sae))


class Chat:
    """A processor with a chat template."""

    image_token, chat_template = "<image>", "..."

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        parts = [f"{m['role']}: {' '.join(c.get('text', '<image>') for c in m['content'])}" for m in messages]
        return " ".join(parts) + (" assistant:" if add_generation_prompt else "")


def test_plain_english_for_real_models():
    ten = plain_paraphrases(Chat())
    assert len({w.yes_no("red") for w in ten.values()}) == len({w.describe() for w in ten.values()}) == 10
    assert all("red" in w.yes_no("red") and "<image>" in w.describe() for w in ten.values())
    said = plain_instructions(Chat(), "red")
    assert "assistant: Yes, there is red in this image. user:" in said["affirmed"].yes_no("red")
    assert said["affirmed"].yes_no("red").count("<image>") == 1
    assert "Ignore" in said["ignore"].describe()
    plain = Chat()
    plain.chat_template = ""
    assert "affirmed" not in plain_instructions(plain, "red")  # no way to say it


# Quantisation. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_and_then_the_very_same_again(model: Any, bits: Any):
    pytest.importorskip("torchao")
    before, bare = snapshot(model), logits(model)
    with quantised(model, bits):
        rounded = logits(model)
    assert float((rounded - bare).abs().max()) > 0 and snapshot(model) == before and torch.equal(logits(model), bare)
    with quantised(model, bits, tower=False):
        tower = model.model.vision_tower
        assert all(type(p) is torch.nn.Parameter for p in tower.parameters())
        assert not torch.equal(logits(model), bare)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_eraser_is_in_effect_on_a_quantised_model_whichever_comes_first(model: Any, bits: Any):
    """Law 9; and the tower is known again, for its SAE is not refused."""
    pytest.importorskip("torchao")
    from tiny import make_vision_sae

    sae = make_vision_sae(model)
    sae.tower = sae.hook_point.record(model)
    with quantised(model, bits):
        rounded = logits(model)
        with ConceptEraser(model, sae, ["tiger"]):
            erased = logits(model)
    with ConceptEraser(model, sae, ["tiger"]), quantised(model, bits):
        assert torch.equal(logits(model), erased)
    assert not torch.allclose(erased, rounded)


def test_an_adapter_is_merged_before_it_is_rounded(model: Any):
    """As its user would; rounded by itself, a small update would survive that is lost together with the weights."""
    pytest.importorskip("torchao")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["fc1"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    merged = copy.deepcopy(adapted).merge_and_unload()
    with quantised(merged, 4):
        expected = logits(merged)
    before, kept = logits(adapted), weights(adapted)
    with quantised(adapted, 4):
        assert torch.equal(logits(adapted), expected)
    assert torch.equal(logits(adapted), before) and not torch.allclose(before, expected)
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapted.state_dict().items())


def test_other_widths_are_refused(model: Any):
    with pytest.raises(AttackError, match="8 or 4"), quantised(model, 3):  # pyright: ignore
        pass


# All of them. ----------------------------------------------------------------------------------------------------------


def test_every_method_is_attacked_and_no_finding_is_lost(model: Any, processor: Any, sae: VisionSAE):
    told: list[Leak] = []

    def stub(one: Subject) -> list[Leak]:
        if one.method == "breaks":
            raise RuntimeError("stop")
        return [Leak("stub", "", one.method, one.concept, compare(one.before, one.look()))]

    options: dict[str, Any] = {"processor": processor, "progress": False, "attacks": [stub]}
    methods = {"SAUCE": lambda concept: ConceptEraser(model, sae, [concept])}
    found = run_attacks(model, probe_set(), ["tiger"], methods=methods, **options)
    assert [leak.method for leak in found.leaks] == [ORIGINAL, "SAUCE"] == found.methods
    with pytest.raises(RuntimeError, match="stop"):
        broken = {**methods, "breaks": lambda concept: nullcontext()}
        run_attacks(model, probe_set(), ["tiger"], methods=broken, found=told.append, **options)
    assert [leak.method for leak in told] == [ORIGINAL, "SAUCE"]


def test_what_cannot_be_attacked_is_said(model: Any, processor: Any, sae: VisionSAE):
    options: dict[str, Any] = {"processor": processor, "progress": False, "methods": {}}
    with pytest.raises(AttackError, match="second_language"):
        run_attacks(model, probe_set(), ["tiger"], attacks=["second language"], **options)
    with pytest.raises(AttackError, match="known: paraphrases"):
        run_attacks(model, probe_set(), ["tiger"], attacks=["hypnosis"], **options)
    with pytest.raises(UnknownConceptError, match="unicorn"):
        run_attacks(model, probe_set(), ["unicorn"], **options)
    with pytest.raises(AttackError, match="lacks 'tiger'"):
        run_attacks(model, replace(probe_set(), negatives={}), ["tiger"], **options)
    for attack in (Relearning(), LinearProbe()):
        with pytest.raises(AttackError, match="training="):
            attack(replace(subject(model, processor, sae), training=None))
    with pytest.raises(AttackError, match="at least 5 training images"):
        LinearProbe()(subject(model, processor, sae, n_training=2))
    assert isinstance(wording(), Wording)
