"""The unlearning losses as their papers have them, and the rivals that train nothing."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import Concept, ConceptEraser, VisionSAE, scenes
from sauce_hooks.errors import EditError, ImagesError, UnknownConceptError
from sauce_hooks.evaluation import Answered, Probe, default_wording
from sauce_hooks.evaluation.answers import read_description, read_yes_no
from sauce_hooks.evaluation.baselines import (
    METHODS,
    OBJECTIVES,
    REFUSALS,
    ForgetRetain,
    Materials,
    PromptOnly,
    Said,
    forget_retain,
    make_methods,
    own_descriptions,
    projected,
    random_features,
    reconstruction_only,
)
from sauce_hooks.evaluation.baselines.losses import (
    answer_log_probs,
    cross_entropy,
    gradient_ascent,
    gradient_difference,
    kl_divergence,
    kl_minimization,
    negative_preference,
    negative_preference_retaining,
    preference_optimization,
)
from sauce_hooks.sae.vision_sae import FeatureStats
from sauce_hooks.scenes import rivals
from tiny import D_SAE, build_llava, logits, make_vision_sae, pictures, snapshot

# Losses. -------------------------------------------------------------------------------------------------------------

V = 7
seeds = st.integers(0, 10_000)
weights = st.floats(0, 10)


def said(seed: int, scale: float = 2.0, original: bool = True) -> Said:
    """Random logits of three answers, of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([0, 0, 1, 2, 2, 2])
    now, then = (scale * torch.randn(6, V, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(V, (6,), generator=generator)
    return Said(now.requires_grad_(True), tokens, rows, then if original else None)


def gradient(loss: torch.Tensor, of: Said) -> torch.Tensor:
    return torch.autograd.grad(loss, of.logits_av, retain_graph=True)[0]


@given(seeds)
def test_cross_entropy_and_log_probs_by_hand(seed):
    x = said(seed)
    p = x.logits_av.exp() / x.logits_av.exp().sum(-1, keepdim=True)
    each = [math.log(p[i, x.tokens_a[i]].item()) for i in range(6)]
    assert cross_entropy(x).item() == pytest.approx(-sum(each) / 6, rel=1e-5)
    wanted = [each[0] + each[1], each[2], each[3] + each[4] + each[5]]
    assert answer_log_probs(x.logits_av, x.tokens_a, x.rows_a).tolist() == pytest.approx(wanted, rel=1e-5)


@given(seeds, seeds)
def test_ga_is_descent_turned_round_and_needs_no_retain_set(one, other):
    forget = said(one)
    assert gradient_ascent(forget) == -cross_entropy(forget)
    assert torch.equal(gradient(gradient_ascent(forget), forget), -gradient(cross_entropy(forget), forget))
    loss = OBJECTIVES["GA"].loss
    assert loss(forget, None, 1.0, 0.1) == loss(forget, said(other), 5.0, 0.1) == gradient_ascent(forget)


@given(seeds)
def test_a_step_against_ga_makes_the_answers_less_likely_and_one_against_po_more(seed):
    x, retain = said(seed), said(seed + 1)
    for loss, sign in ((gradient_ascent(x), -1), (negative_preference(x), -1), (preference_optimization(x, retain), 1)):
        after = replace(x, logits_av=x.logits_av - 1e-3 * gradient(loss, x))
        change = cross_entropy(x) - cross_entropy(after)
        assert sign * change.item() > 0


@given(seeds, seeds)
def test_without_weight_gd_and_kl_are_ga_and_npo_rt_is_npo(one, other):
    forget, retain = said(one), said(other)
    assert gradient_difference(forget, retain, weight=0) == gradient_ascent(forget)
    assert kl_minimization(forget, retain, weight=0) == gradient_ascent(forget)
    assert negative_preference_retaining(forget, retain, weight=0) == negative_preference(forget)


@given(seeds, seeds, st.floats(0.1, 10))
def test_each_set_gets_its_own_gradient(one, other, weight):
    forget, retain = said(one), said(other)
    alone = {
        "GD": (gradient_ascent(forget), cross_entropy(retain)),
        "KL": (gradient_ascent(forget), kl_divergence(retain)),
        "PO": (cross_entropy(forget), cross_entropy(retain)),
        "NPO": (negative_preference(forget, beta=0.3), cross_entropy(retain)),
    }
    for name, (of_forget, of_retain) in alone.items():
        loss = OBJECTIVES[name].loss(forget, retain, weight, 0.3)
        assert torch.allclose(gradient(loss, forget), gradient(of_forget, forget), atol=1e-7)
        assert torch.allclose(gradient(loss, retain), weight * gradient(of_retain, retain), atol=1e-5)


@given(seeds, st.floats(-5, 5))
def test_kl_is_zero_just_where_the_distributions_agree(seed, shift):
    x = said(seed)
    same = replace(x, original_av=(x.logits_av + shift).detach())  # a constant changes no probability
    assert kl_divergence(same).item() == pytest.approx(0, abs=1e-6)
    assert gradient(kl_divergence(same), x).abs().max() < 1e-6
    p, q = x.original_av.softmax(-1), x.logits_av.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1).mean()
    assert kl_divergence(x).item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert kl_divergence(x).item() > 1e-3


@given(seeds, st.floats(0.05, 2))
def test_npo_weighs_each_answer_by_how_likely_it_still_is(seed, beta):
    x = said(seed)
    now, then = (answer_log_probs(l, x.tokens_a, x.rows_a) for l in (x.logits_av, x.original_av))  # noqa: E741
    weight = 2 * torch.sigmoid(beta * (now - then))  # 2 π^β / (π^β + π_0^β)
    ascent = (weight.detach() * now).mean()
    assert torch.allclose(gradient(negative_preference(x, beta=beta), x), gradient(ascent, x), atol=1e-5)


@given(seeds)
def test_npo_becomes_ascent_as_beta_falls(seed):
    x = said(seed)
    ascent = gradient(answer_log_probs(x.logits_av, x.tokens_a, x.rows_a).mean(), x)
    gaps = [(gradient(negative_preference(x, beta=beta), x) - ascent).abs().max().item() for beta in (1.0, 0.1, 1e-3)]
    assert gaps[2] <= gaps[0] and gaps[2] < 0.02


def test_npo_stops_where_everything_is_forgotten():
    x = said(0)
    gone = replace(x, original_av=x.logits_av.detach(), logits_av=x.logits_av.detach().clone())
    gone.logits_av[range(6), gone.tokens_a] -= 400
    gone.logits_av.requires_grad_(True)
    assert gradient(negative_preference(gone), gone).abs().max() < 1e-6
    assert gradient(gradient_ascent(gone), gone).abs().max() > 0.01  # GA does not


# Data. ---------------------------------------------------------------------------------------------------------------

DOMAIN = ("red", "blue", "green")
PICTURES = pictures(10)


def sets(n: int = 10) -> ForgetRetain:
    holding = [Probe(image, frozenset({"red", "cat"})) for image in PICTURES[:n]]
    others = [Probe(image, frozenset({DOMAIN[1 + i % 2], "cat"})) for i, image in enumerate(PICTURES[:n])]
    return forget_retain("red", holding, others, DOMAIN, scenes.wording(), lambda probes: ["a cat."] * len(probes))


def test_the_sets_ask_what_they_should():
    data = sets()
    words = scenes.wording()
    assert [(a.prompt, a.answer) for a in data.forget[:2]] == [(words.describe(), "a cat."), (words.yes_no("red"), "yes")]
    assert len(data.forget) == len(data.retain) == 10
    assert not any("red" in a.prompt for a in data.retain)
    asked = [(a.image, a.prompt, a.answer) for a in data.retain if a.answer != "a cat."]
    assert sorted(answer for *_, answer in asked) == ["no", "no", "yes", "yes", "yes"]
    for image, prompt, answer in asked:
        held = DOMAIN[1 + next(i for i, picture in enumerate(PICTURES) if picture is image) % 2]
        assert (held in prompt) == (answer == "yes")


def test_refusals_take_the_answers_places():
    data = replace(sets(), refusals=("a", "b"))
    assert [a.answer for a in data.refused[:3]] == ["a", "b", "a"]
    assert [(a.image, a.prompt) for a in data.refused] == [(a.image, a.prompt) for a in data.forget]


def test_what_makes_no_sets_is_refused():
    with pytest.raises(ImagesError, match="the forget set is empty"):
        ForgetRetain([], [Answered(PICTURES[0], "", "")])
    with pytest.raises(ImagesError, match="image 0 of the others holds 'red'"):
        forget_retain("red", [], [Probe(PICTURES[0], frozenset({"red"}))], DOMAIN, scenes.wording(), lambda p: [])
    with pytest.raises(ImagesError, match="must hold a concept of the domain"):
        forget_retain("red", [], [Probe(PICTURES[0], frozenset())], DOMAIN, scenes.wording(), lambda p: [])


def test_where_nobody_described_the_images_the_model_does(model, processor):
    words = replace(scenes.wording(), max_new_tokens=3)
    texts = own_descriptions(model, words, processor)([Probe(image, frozenset()) for image in PICTURES[:2]])
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_refusals_are_read_as_no_answer():
    words = default_wording(None)
    assert "yes" not in {read_yes_no(text, words) for text in REFUSALS}
    assert "no" not in {read_yes_no(text, words) for text in REFUSALS}
    assert all(read_yes_no(text, scenes.wording()) == "invalid" for text in rivals.REFUSALS)
    assert read_description(REFUSALS[0]) == "refusal"


# The bundled world's. ------------------------------------------------------------------------------------------------


def test_the_worlds_data_are_of_the_concept_and_of_its_domain_alone(processor):
    data = rivals.data("happy", 8)
    assert len(data.forget) == len(data.retain) == 8
    assert {a.answer for a in data.forget if "yes or no" in a.prompt} == {"yes"}
    assert all("happy" in a.answer for a in data.forget if "yes or no" not in a.prompt)
    assert not any("happy" in a.answer + a.prompt for a in data.retain)
    emotions = set(scenes.DOMAINS["emotion"])
    assert all(emotions & set(a.prompt.replace("?", "").split()) for a in data.retain if "yes or no" in a.prompt)
    texts = [*rivals.REFUSALS, rivals.INSTRUCTION.format("red"), *(a.answer for a in (*data.forget, *data.retain))]
    unknown = processor.tokenizer.unk_token_id
    assert not any(unknown in processor.tokenizer(text).input_ids for text in texts)


def test_the_features_images_are_the_forget_sets():
    from sauce_hooks.scenes.learning import contrast_sets

    features = contrast_sets("happy", 4)[0]
    assert {a.image.tobytes() for a in rivals.data("happy", 4).forget} == {scene.image.tobytes() for scene in features}


# Rows that train nothing. --------------------------------------------------------------------------------------------


def test_the_instruction_follows_each_question_and_changes_nothing_else(model, processor):
    rival = PromptOnly(processor, "please tell no {}.")
    words = scenes.wording()
    instructed = rival.wording(words, "red")
    assert instructed.yes_no("cat") == words.yes_no("cat").replace(" assistant:", " please tell no red. assistant:")
    assert instructed.describe() == words.describe().replace(" assistant:", " please tell no red. assistant:")
    assert (instructed.yes, instructed.no, instructed.mentions) == (words.yes, words.no, words.mentions)
    before, bare = snapshot(model), logits(model)
    with rival("red"):
        assert torch.equal(logits(model), bare)
    assert snapshot(model) == before
    odd = rival.wording(replace(words, describe=lambda: "what?"), "red")
    with pytest.raises(EditError, match="where its question ends"):
        odd.describe()


def test_the_instruction_finds_its_place_in_any_chat_format():
    class Chat:
        image_token = "<img>"
        chat_template = "there is one"

        def apply_chat_template(self, messages, add_generation_prompt):
            [_, text] = messages[0]["content"]
            return f"<|user|><img>{text['text']}<|end|>\n<|assistant|>"

    rival = PromptOnly(Chat())
    instructed = rival.wording(default_wording(Chat()), "a tiger")
    assert instructed.describe() == (
        "<|user|><img>Describe this image. Do not mention a tiger, and act as if you could not see it.<|end|>\n<|assistant|>"
    )


@cache
def tiny_model():
    return build_llava()


def with_stats(sae: VisionSAE, alive: list[int]) -> VisionSAE:
    frequency = torch.zeros(D_SAE)
    frequency[alive] = 0.5
    sae.stats = FeatureStats(frequency, frequency, 0.9, 3.0, 10)
    return sae


@given(st.sets(st.integers(0, D_SAE - 1), min_size=9), seeds)
def test_random_features_are_alive_as_many_and_none_of_its_own(alive, seed):
    model = tiny_model()
    sae = with_stats(make_vision_sae(model), sorted(alive))
    eraser = random_features(model, sae, seed=seed)("blue")
    assert isinstance(eraser, ConceptEraser)
    [drawn] = eraser.concepts
    assert set(drawn.features) <= alive - set(sae.concepts["blue"].features)
    assert len(drawn.features) == 2 and drawn.gamma == -2.0
    assert random_features(model, sae, seed=seed)("blue").features == eraser.features


def test_random_features_say_what_they_lack(model, sae):
    with pytest.raises(EditError, match="describe_sae"):
        random_features(model, sae)("red")
    with pytest.raises(EditError, match="1 other features are alive, and 'red' has 3"):
        random_features(model, with_stats(sae, [1, 2, 9]))("red")
    with pytest.raises(UnknownConceptError):
        random_features(model, sae)("rot")


def test_reconstruction_only_is_what_the_sae_gives_back_and_no_null_edit(model, sae):
    bare, before = logits(model), snapshot(model)
    with reconstruction_only(model, sae)("red"):
        rebuilt = logits(model)
    with ConceptEraser(model, sae, [Concept("other", (5, 6), gamma=1.0)], preserve_error=False):
        assert torch.equal(logits(model), rebuilt)
    assert not torch.allclose(rebuilt, bare)
    assert torch.equal(logits(model), bare) and snapshot(model) == before


@pytest.mark.parametrize("kind", ["difference_of_means", "leace"])
def test_projections_leave_the_bank_alone(model, sae, processor, kind):
    asked: list[str] = []

    def shown(concept):
        asked.append(concept)
        return pictures(6, seed=1), pictures(6, seed=2)

    method = projected(model, sae, shown, processor=processor, kind=kind)
    bare, names = logits(model), list(sae.concepts)
    for _ in range(2):
        with method("snow"):
            assert not torch.equal(logits(model), bare)
    assert asked == ["snow"]
    assert list(sae.concepts) == names
    assert torch.equal(logits(model), bare)


# The table of all. ---------------------------------------------------------------------------------------------------


def test_methods_are_made_from_what_is_there(model, sae, processor):
    assert set(OBJECTIVES) | {
        "prompt only",
        "random features",
        "reconstruction only",
        "difference of means",
        "LEACE",
    } == set(METHODS)
    assert list(make_methods(Materials(model, processor))) == ["prompt only"]
    assert set(make_methods(Materials(model, processor, sae))) == {"prompt only", "random features", "reconstruction only"}
    with pytest.raises(ValueError, match=r"NPO .* needs data and settings\['NPO'\]"):
        make_methods(Materials(model, processor), ["NPO"])
    with pytest.raises(ValueError, match="unknown method 'XO'; known: GA, GD"):
        make_methods(Materials(model, processor), ["XO"])
    rates = dict.fromkeys(OBJECTIVES, 1e-3)
    assert list(make_methods(rivals.materials(model, processor, sae, rates=rates))) == list(METHODS)
