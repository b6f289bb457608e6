"""Concepts from a word: scores, labels, planted directions, the right tower."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sauce_hooks import TokenPolicy, VisionSAE
from sauce_hooks.concepts.words import (
    COMMON_WORDS,
    FeatureEffects,
    embed_words,
    feature_effects,
    label_features,
    labels_of,
    learn_concept_from_word,
    match_scores,
)
from sauce_hooks.errors import ContrastError, HookPointError, SAEMismatchError
from sauce_hooks.hookpoint import find_hook_point
from sauce_hooks.sae import FeatureStats
from sauce_hooks.scenes import CONCEPTS, Scene, sample
from sauce_hooks.scenes.dual import DualRecipe, build_dual, embed_image, load_dual, loose_caption, train_dual
from tiny import D_IN, D_SAE, SIDE, build_llava, make_sae, pictures, snapshot

WORDS = ("tiger", "red", "happy", "wood", "golf")
GREY = [{"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}]


@pytest.fixture(scope="module")
def llava(processor):
    return build_llava(len(processor.tokenizer))


@pytest.fixture(scope="module")
def paired(llava, processor):
    """A CLIP model around the LLaVA's tower, its text encoder untrained, and its processor."""
    dual, both = build_dual(llava, processor, DualRecipe(width=32, joint=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as it comes out of the box, texts hardly differ
        for part in (dual.text_model, dual.text_projection, dual.visual_projection):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dual, both


@pytest.fixture
def vision_sae(llava):
    """Learnt on the LLaVA."""
    return VisionSAE.wrap(make_sae(), find_hook_point(llava), model=llava)


def with_rows(vision_sae, rows):
    """The same SAE with its first decoder rows replaced."""
    other = copy.deepcopy(vision_sae)
    with torch.no_grad():
        other.sae.W_dec[: len(rows)] = rows
    return other


def stats(fmav):
    return FeatureStats((fmav > 0).float(), fmav, explained_variance=0.9, l0=3.0, n_rows=100)


# The score. ----------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 6)


@st.composite
def problems(draw):
    """Effects, texts and their mean."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    f, w, j = draw(sizes), draw(sizes), draw(st.integers(2, 6))
    return tuple(torch.randn(shape, generator=generator) for shape in ((f, j), (w, j), (j,)))


@given(problems(), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_length_of_a_text_does_not_count_and_that_of_an_effect_does(problem, a, b):
    effects, texts, center = problem
    scores = match_scores(effects, texts, center)
    assert (scores.abs() <= effects.norm(dim=1, keepdim=True) + 1e-5).all()
    assert torch.allclose(match_scores(a * effects, center + b * (texts - center), center) / a, scores, atol=1e-3)


@given(problems(), st.randoms(use_true_random=False))
def test_permuted_features_and_words_permute_the_scores(problem, random):
    effects, texts, center = problem
    rows, columns = list(range(len(effects))), list(range(len(texts)))
    random.shuffle(rows)
    random.shuffle(columns)
    scores = match_scores(effects, texts, center)
    assert torch.allclose(match_scores(effects[rows], texts[columns], center), scores[rows][:, columns], atol=1e-6)


@given(problems())
def test_what_does_nothing_fits_nothing(problem):
    effects, texts, center = problem
    assert (match_scores(effects * 0, texts, center) == 0).all()


@given(problems())
def test_an_effect_that_is_the_word_fits_it_wholly(problem):
    _, texts, center = problem
    lengths = (texts - center).norm(dim=1)
    assert torch.allclose(match_scores(texts - center, texts, center).diagonal(), lengths, atol=1e-5)


# Effects. ------------------------------------------------------------------------------------------------------------


def test_effects_do_not_depend_on_the_scale_of_decoder_rows(paired, vision_sae):
    """A row that is c times longer belongs to a feature whose activations are c times smaller."""
    dual, both = paired
    factor = torch.linspace(0.1, 3, D_SAE)
    vision_sae.stats = stats(torch.linspace(1, 2, D_SAE))
    other = with_rows(vision_sae, factor[:, None] * vision_sae.sae.W_dec.detach())
    other.stats = stats(vision_sae.stats.mean_when_active_f / factor)
    one, two = (feature_effects(dual, s, GREY, processor=both).effects_fj for s in (vision_sae, other))
    assert torch.allclose(one, two, atol=1e-5)
    assert one.norm(dim=1).min() > 1e-4


def test_permuted_features_permute_their_effects(paired, vision_sae):
    dual, both = paired
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    other = with_rows(vision_sae, vision_sae.sae.W_dec.detach()[order])
    one, two = (feature_effects(dual, s, GREY, processor=both).effects_fj for s in (vision_sae, other))
    assert torch.allclose(one[order], two, atol=1e-5)


def test_the_effect_is_what_an_edited_forward_gives(paired, vision_sae):
    """Beside the library: a small change on every patch, the whole model run."""
    dual, both = paired
    vision_sae.tokens = TokenPolicy(edit="patches")
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    batches = [{"pixel_values": pixels[:2]}, {"pixel_values": pixels[2:]}]
    found = feature_effects(dual, vision_sae, batches, processor=both)
    assert found.n_images == 3
    rows = F.normalize(vision_sae.sae.W_dec.detach(), dim=-1)

    def embedding(edit):
        def hook(module, args, output):
            acts = (output[0] if isinstance(output, tuple) else output).clone()
            acts[:, 1:] += edit
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        handle = dual.vision_model.encoder.layers[vision_sae.hook_point.layer].register_forward_hook(hook)
        try:
            with torch.no_grad():
                return F.normalize(dual.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        finally:
            handle.remove()

    for feature in (0, 5, 47):
        expected = (embedding(0.01 * rows[feature]) - embedding(-0.01 * rows[feature])).mean(0) / 0.02
        assert torch.allclose(found.effects_fj[feature], expected, atol=0.02 * float(expected.norm()))
        assert expected.norm() > 1e-3


def test_the_model_is_left_as_it_was(paired, vision_sae):
    dual, both = paired
    before = snapshot(dual)
    feature_effects(dual, vision_sae, GREY, processor=both)
    learn_concept_from_word(dual, vision_sae, "red", processor=both, against=WORDS)
    assert snapshot(dual) == before
    assert all(parameter.grad is None for parameter in dual.parameters())


def test_without_images_a_plain_one_is_made(paired, vision_sae):
    dual, both = paired
    found = feature_effects(dual, vision_sae, processor=both)
    assert found.n_images == 1
    assert found.effects_fj.shape == (D_SAE, 16)
    several = feature_effects(dual, vision_sae, pictures(5), processor=both, batch_size=2)
    assert several.n_images == 5
    assert not torch.allclose(several.effects_fj, found.effects_fj, atol=1e-4)


# Words find planted features. ------------------------------------------------------------------------------------------


@pytest.fixture
def planted(paired, vision_sae):
    """Feature 3 writes what brings the embedding towards "tiger", 7 towards "red", 11 towards "golf"."""
    dual, both = paired
    basis = with_rows(vision_sae, torch.eye(D_IN))
    jacobian_dj = feature_effects(dual, basis, GREY, processor=both).effects_fj[:D_IN]
    texts = embed_words(dual, WORDS, processor=both)
    rows = vision_sae.sae.W_dec.detach().clone()
    for feature, word in ((3, "tiger"), (7, "red"), (11, "golf")):
        others = torch.stack([t for w, t in zip(WORDS, texts, strict=True) if w != word])
        row = (texts[WORDS.index(word)] - others.mean(0)) @ torch.linalg.pinv(jacobian_dj)
        rows[feature] = row
    planted = with_rows(vision_sae, rows)
    planted.stats = stats(1 / rows.norm(dim=1))
    for feature in (3, 7, 11):  # the shortest way to move it may be a long one: these fire as strongly as they must
        planted.stats.mean_when_active_f[feature] = 3.0
    return planted


@pytest.mark.parametrize(("word", "feature"), [("tiger", 3), ("red", 7), ("golf", 11)])
def test_a_word_finds_the_feature_that_was_planted_for_it(paired, planted, word, feature):
    dual, both = paired
    effects = feature_effects(dual, planted, GREY, processor=both)
    concept = learn_concept_from_word(dual, planted, word, processor=both, against=WORDS, effects=effects, k=4)
    assert concept.features[0] == feature
    assert list(concept.scores) == sorted(concept.scores, reverse=True)
    assert planted.concepts[word] == concept


def test_the_planted_features_get_their_labels(paired, planted):
    dual, both = paired
    effects = feature_effects(dual, planted, GREY, processor=both)
    labels = label_features(dual, planted, WORDS, processor=both, effects=effects, chance=0.05)
    assert [labels.words[f][0] for f in (3, 7, 11)] == ["tiger", "red", "golf"]
    frame = labels.to_frame()
    assert set(frame.columns) == {"feature", "rank", "word", "score"}
    assert set(frame["feature"]) == set(range(D_SAE))
    assert frame[(frame["feature"] == 7) & (frame["rank"] == 1)]["word"].item() == "red"


def test_where_it_comes_from_is_said(paired, vision_sae):
    dual, both = paired
    concept = learn_concept_from_word(
        dual, vision_sae, "red", processor=both, name="rot", against=WORDS, templates=("a {}",), k=2, gamma=-1.5
    )
    assert (concept.name, concept.gamma, len(concept.features)) == ("rot", -1.5, 2)
    said = concept.provenance
    assert (said["scorer"], said["word"], said["templates"], said["model"]) == ("from a word", "red", ["a {}"], "clip")
    assert (said["against"], said["images"]) == (len(WORDS) - 1, 1)
    assert vision_sae.concepts["rot"] == concept


def test_a_feature_that_never_fires_fits_no_word(paired, planted):
    dual, both = paired
    planted.stats.mean_when_active_f[7] = 0
    concept = learn_concept_from_word(dual, planted, "red", processor=both, against=WORDS, k=D_SAE)
    assert 7 not in concept.features
    labels = label_features(dual, planted, WORDS, processor=both, chance=0.5)
    assert labels.words[7] == ()
    assert labels.best_f[7] == 0


# Labels. -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(0.01, 0.5))
def test_a_share_of_random_features_is_labelled_as_promised(seed, chance):
    """Features that are random directions themselves."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4000, 8, generator=generator)
    texts = F.normalize(torch.randn(6, 8, generator=generator), dim=-1)
    effects = FeatureEffects(directions[:2000], directions[2000:], 1)
    labels = labels_of(effects, texts, (*WORDS, "blue"), best=2, chance=chance)
    assert abs(labels.labelled_share - chance) < 4 * (2 * chance * (1 - chance) / 2000) ** 0.5 + 0.002


@given(st.integers(0, 1000), st.randoms(use_true_random=False))
def test_labels_follow_permuted_features_and_words(seed, random):
    generator = torch.Generator().manual_seed(seed)
    effects = FeatureEffects(torch.randn(9, 4, generator=generator), torch.randn(50, 4, generator=generator), 1)
    texts = torch.randn(5, 4, generator=generator)
    rows, columns = list(range(9)), list(range(5))
    random.shuffle(rows)
    random.shuffle(columns)
    labels = labels_of(effects, texts, WORDS, best=3, chance=0.5)
    other = labels_of(
        FeatureEffects(effects.effects_fj[rows], effects.random_nj, 1),
        texts[columns],
        [WORDS[c] for c in columns],
        best=3,
        chance=0.5,
    )
    assert other.words == tuple(labels.words[r] for r in rows)
    assert all(score > labels.threshold for row in labels.scores for score in row)


# Words are any text. ---------------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=20).filter(lambda text: text.strip()))
def test_any_word_has_an_embedding_of_length_one(paired, text):
    dual, both = paired
    embedded = embed_words(dual, [text, "red"], processor=both)
    assert torch.allclose(embedded.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(embedded[1], embed_words(dual, ["red"], processor=both)[0], atol=1e-5)


def test_braces_in_a_word_or_template_are_text(paired):
    dual, both = paired
    assert embed_words(dual, ["{0} {red}"], processor=both.tokenizer, templates=["{a} {}"]).isfinite().all()


def test_common_words_are_words_and_none_twice():
    assert len(set(COMMON_WORDS)) == len(COMMON_WORDS) > 50
    assert all(word.strip() for word in COMMON_WORDS)


@pytest.mark.parametrize("word", ["", " ", "\n"])
def test_an_empty_word_is_an_error_and_stores_nothing(paired, vision_sae, word):
    dual, both = paired
    with pytest.raises(ContrastError, match="empty word"):
        learn_concept_from_word(dual, vision_sae, word, processor=both)
    assert not vision_sae.concepts


@pytest.mark.parametrize("vocabulary", [[], ["red"], ["red", "red"], ["red", " "]])
def test_a_vocabulary_that_leaves_no_choice_is_an_error(paired, vision_sae, vocabulary):
    dual, both = paired
    with pytest.raises(ContrastError, match=r"vocabulary|empty word"):
        label_features(dual, vision_sae, vocabulary, processor=both)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"k": 0}, "k=0"), ({"against": []}, "no other word"), ({"against": ["red"]}, "no other word"),
     ({"templates": ["no place"]}, "templates"), ({"templates": []}, "templates")],
)  # fmt: skip
def test_settings_that_say_nothing_are_an_error(paired, vision_sae, options, says):
    dual, both = paired
    with pytest.raises(ContrastError, match=says):
        learn_concept_from_word(dual, vision_sae, "red", processor=both, **{"against": WORDS, **options})


def test_words_that_the_text_encoder_takes_for_one_are_an_error(paired, vision_sae):
    dual, both = paired  # its tokenizer knows neither
    with pytest.raises(ContrastError, match="same as the mean"):
        learn_concept_from_word(dual, vision_sae, "qwrt", processor=both, against=["zxcv", "yuio"])


# The right tower. ------------------------------------------------------------------------------------------------------


def test_an_sae_learnt_on_llava_is_at_home_in_the_clip_model_of_its_tower(paired, vision_sae):
    dual, _ = paired
    assert vision_sae.locate(dual).path == "vision_model.encoder.layers.2"
    assert vision_sae.hook_point.path == "model.vision_tower.encoder.layers.2"


def test_other_blocks_behind_the_hook_point_do_not_matter_and_those_before_it_do(paired, vision_sae):
    dual, both = paired
    for layer, same in ((3, True), (2, False), (0, False)):
        other = copy.deepcopy(dual)
        with torch.no_grad():
            other.vision_model.encoder.layers[layer].mlp.fc1.weight.add_(0.1)
        if same:
            assert learn_concept_from_word(other, vision_sae, "red", processor=both, against=WORDS).features
        else:
            with pytest.raises(SAEMismatchError):
                learn_concept_from_word(other, vision_sae, "red", processor=both, against=WORDS)


def test_a_model_without_a_text_encoder_is_refused(llava, paired, vision_sae):
    with pytest.raises(HookPointError, match=r"get_text_features.*openai/clip-vit-large-patch14-336"):
        learn_concept_from_word(llava, vision_sae, "red", processor=paired[1], against=WORDS)


def test_siglip_pools_with_attention_and_pads_its_texts(paired):
    from transformers import SiglipConfig, SiglipModel

    _, both = paired
    text = {"vocab_size": len(both.tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 16, "projection_size": 32}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": SIDE, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    dual = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    place = find_hook_point(dual)
    sae = VisionSAE.wrap(make_sae(), place, model=dual)
    concept = learn_concept_from_word(dual, sae, "red", processor=both, against=WORDS, k=3)
    assert len(concept.features) == 3
    assert feature_effects(dual, sae, GREY, processor=both).effects_fj.any(dim=1).all()
    ids = both.tokenizer(["red"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = dual.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    found = embed_words(dual, ["red"], processor=both, templates=["{}"])
    assert torch.allclose(found, F.normalize(expected.detach(), dim=-1), atol=1e-5)


def test_an_sae_behind_what_the_embedding_reads_is_refused(paired, llava):
    """CLIP reads the class token of the last block; patches edited there change nothing."""
    dual, both = paired
    place = find_hook_point(dual, -1)
    sae = VisionSAE.wrap(make_sae(), place, TokenPolicy(edit="patches"), model=dual)
    with pytest.raises(ContrastError, match="changes the embedding"):
        feature_effects(dual, sae, GREY, processor=both)


# The bundled world's text encoder. -------------------------------------------------------------------------------------


def test_training_leaves_the_tower_alone_up_to_the_hook_point(llava, processor, tmp_path):
    recipe = DualRecipe(scenes=24, width=32, joint=16, steps=3, batch=8)
    dual, both = train_dual(llava, processor, recipe)
    place = find_hook_point(llava)
    ours, theirs = dual.vision_model.encoder.layers, llava.model.vision_tower.encoder.layers
    for layer in range(len(ours)):
        same = all(torch.equal(a, b) for a, b in zip(ours[layer].parameters(), theirs[layer].parameters(), strict=True))
        assert same == (layer <= place.layer)
    dual.save_pretrained(tmp_path)
    both.save_pretrained(tmp_path)
    again, processor_again = load_dual(tmp_path)
    assert torch.equal(embed_words(again, WORDS, processor=processor_again), embed_words(dual, WORDS, processor=both))


def test_the_class_token_alone_is_what_the_whole_block_gives(paired):
    dual, _ = paired
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = dual.vision_model(pixels, output_hidden_states=True).hidden_states
        embedded = embed_image(dual, states[-2], dual.vision_model.encoder.layers[-1])
        assert torch.allclose(embedded, dual.get_image_features(pixel_values=pixels).pooler_output, atol=1e-4)


def test_captions_tell_only_what_is_true():
    import numpy as np

    rng = np.random.default_rng(0)
    for scene in sample(60, seed=3, split="train"):
        assert isinstance(scene, Scene)
        told = {word for word in CONCEPTS if word in loose_caption(scene, rng).replace(",", " ").split()}
        assert told <= scene.concepts
