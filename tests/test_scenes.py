from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sauce_hooks import scenes
from sauce_hooks.errors import UnknownConceptError
from sauce_hooks.scenes import CONCEPTS, CONCRETE, DOMAINS, HELD_OUT, SIBLINGS, Scene, Thing, domain_of, sample
from sauce_hooks.scenes.language import (
    DESCRIBE,
    FRENCH,
    LANGUAGES,
    NAMES,
    NO,
    YES,
    YES_NO,
    caption,
    split_words,
    vocabulary,
)
from sauce_hooks.scenes.render import IMAGE_SIZE, render
from tiny import build_llava, logits, pictures

seeds = st.integers(0, 2**30)
splits = st.sampled_from(["train", "val", "test"])
concepts = st.sampled_from(CONCEPTS)

# The world. ----------------------------------------------------------------------------------------------------------


def test_the_five_domains_are_as_large_as_asked():
    assert {domain: len(names) for domain, names in DOMAINS.items()} == {
        "object": 10, "sport": 6, "color": 8, "emotion": 5, "material": 5
    }  # fmt: skip
    assert "tiger" in DOMAINS["object"]
    assert "red" in DOMAINS["color"]
    assert set(CONCRETE) == {"object", "sport"}


def test_every_concept_is_of_one_domain_and_has_a_sibling_there():
    assert len(set(CONCEPTS)) == len(CONCEPTS) == sum(map(len, DOMAINS.values()))
    assert set(SIBLINGS) == set(CONCEPTS)
    for concept, sibling in SIBLINGS.items():
        assert sibling != concept
        assert domain_of(sibling) == domain_of(concept)


def test_every_concept_occurs_and_several_domains_meet_in_one_image():
    drawn = sample(400, seed=0)
    assert set().union(*(scene.concepts for scene in drawn)) == set(CONCEPTS)
    assert {len(scene.things) for scene in drawn} == {1, 2, 3}
    assert sum(len({domain_of(c) for c in scene.concepts}) > 1 for scene in drawn) > 200


# Sampling. -----------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 4), seed=seeds, split=splits, concept=concepts)
def test_what_must_be_there_is_and_what_must_not_is_not(n, seed, split, concept):
    holding = sample(n, seed=seed, split=split, contains=concept)
    lacking = sample(n, seed=seed, split=split, lacks=concept)
    assert len(holding) == len(lacking) == n
    assert all(concept in scene.concepts for scene in holding)
    assert all(concept not in scene.concepts for scene in lacking)


@given(seed=seeds, lacks=st.sets(concepts, max_size=8), contains=concepts)
def test_several_concepts_can_be_lacking_at_once(seed, lacks, contains):
    for scene in sample(3, seed=seed, contains=contains, lacks=sorted(lacks - {contains})):
        assert contains in scene.concepts
        assert scene.concepts.isdisjoint(lacks - {contains})


@given(n=st.integers(0, 4), more=st.integers(0, 4), seed=seeds, split=splits, contains=st.none() | concepts)
def test_fewer_scenes_are_the_first_of_more(n, more, seed, split, contains):
    options = {"seed": seed, "split": split, "contains": contains}
    assert sample(n, **options) == sample(n + more, **options)[:n]


@given(seed=seeds, other=seeds)
@settings(max_examples=5)
def test_no_image_is_in_two_splits_whatever_the_seeds(seed, other):
    pixels = {
        split: {scene.image.tobytes() for s in {seed, other} for scene in sample(5, seed=s, split=split)}
        for split in ("train", "val", "test")
    }
    assert len(set().union(*pixels.values())) == sum(map(len, pixels.values()))


def test_seeds_give_different_scenes():
    assert sample(5, seed=0) != sample(5, seed=1)


@pytest.mark.parametrize("options", [{"contains": "tigre"}, {"lacks": "tigre"}, {"lacks": ["red", "tigre"]}])
def test_an_unknown_concept_is_an_error_that_names_the_nearest(options):
    with pytest.raises(UnknownConceptError, match="Did you mean 'tiger'"):
        sample(1, seed=0, **options)


def test_containing_and_lacking_the_same_is_an_error():
    with pytest.raises(ValueError, match="tiger"):
        sample(1, seed=0, contains="tiger", lacks=["red", "tiger"])


# Rendering. ----------------------------------------------------------------------------------------------------------


@given(seed=seeds, split=splits)
@settings(max_examples=10)
def test_equal_scenes_give_equal_pixels(seed, split):
    one, same = (sample(1, seed=seed, split=split)[0] for _ in range(2))
    assert one.image is not same.image
    assert one.image.tobytes() == same.image.tobytes()
    assert (one.image.mode, one.image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))


@given(seed=seeds)
@settings(max_examples=15)
def test_each_mask_covers_its_thing_and_nothing_beyond(seed):
    scene = sample(1, seed=seed)[0]
    masks = render(scene).masks
    assert len(masks) == len(scene.things)
    for thing, mask in zip(scene.things, masks, strict=True):
        y, x = (axis / IMAGE_SIZE for axis in np.nonzero(mask))
        assert mask.sum() > 0.1 * (thing.size * IMAGE_SIZE) ** 2
        for axis, center in zip((x, y), thing.center, strict=True):
            assert abs(axis - center).max() <= thing.size / 2 + 1.5 / IMAGE_SIZE
            assert abs(axis.mean() - center) < 0.2 * thing.size


@given(seed=seeds, color=st.sampled_from(DOMAINS["color"]))
@settings(max_examples=15)
def test_a_colour_changes_the_pixels_of_its_thing_alone(seed, color):
    thing = Thing("object", "envelope", "red", None, (0.3, 0.6), 0.4, seed)
    scene, other = (Scene((replace(thing, color=c),), seed) for c in ("red", color))
    changed = (np.asarray(scene.image) != np.asarray(other.image)).any(-1)
    mask = render(scene).masks[0] > 0
    grown = np.asarray(torch.nn.functional.max_pool2d(torch.tensor(mask)[None].float(), 5, 1, 2)[0] > 0)
    assert not (changed & ~grown).any()
    assert color == "red" or changed[mask].mean() > 0.5


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_two_concepts_of_a_domain_look_the_same(domain):
    def drawn(name):
        kind = {"sport": "game", "emotion": "face"}.get(domain, "object")
        looks = {"color": None, "material": None, "shape": "mug" if domain in ("color", "material") else None}
        looks[domain if domain in looks else "shape"] = name
        return np.asarray(Scene((Thing(kind, center=(0.5, 0.5), size=0.6, seed=1, **looks),), 1).image, dtype=float)

    images = [drawn(name) for name in (*DOMAINS[domain], None)]
    differences = [abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]]
    assert min(differences) > 1


# Language. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@given(seed=seeds)
def test_a_caption_names_exactly_the_true_concepts(language, seed):
    for scene in sample(3, seed=seed):
        words = split_words(caption(scene, language))
        assert {concept for concept, name in NAMES[language].items() if name in words} == scene.concepts
    assert scene.caption == caption(scene)


def test_a_caption_goes_from_left_to_right():
    tiger = Thing("object", "tiger", "red", "wood", (0.7, 0.3), 0.3, 0)
    face = Thing("face", "angry", None, None, (0.2, 0.3), 0.3, 0)
    game = replace(face, kind="game", shape="tennis", center=(0.5, 0.8))
    scene = Scene((tiger, face, game), 0)
    assert scene.caption == "an angry face, a tennis game and a red wood tiger."
    assert caption(scene, "fr") == "un visage fâché, un jeu de raquettes et un tigre rouge en bois."
    assert Scene((replace(tiger, shape=None, color=None, material=None),), 0).caption == "a thing."


def test_french_names_are_single_words_of_their_own():
    english = {
        word
        for text in (*YES_NO["en"], *DESCRIBE["en"], *CONCEPTS, "user assistant yes no a an and thing face game")
        for word in split_words(text)
    }
    assert set(FRENCH) == set(CONCEPTS)
    assert len(set(FRENCH.values())) == len(FRENCH)
    assert all(split_words(name) == [name] for name in FRENCH.values())
    assert english.isdisjoint(FRENCH.values())
    assert {YES["fr"], NO["fr"]}.isdisjoint({YES["en"], NO["en"]})


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_hold_one_image_and_the_concept(language):
    yes_no = [[scenes.yes_no_prompt(c, p, language) for c in CONCEPTS] for p in range(len(YES_NO[language]))]
    describe = [scenes.describe_prompt(p, language) for p in range(len(DESCRIBE[language]))]
    every = [*(prompt for prompts in yes_no for prompt in prompts), *describe]
    assert len(set(every)) == len(every)
    assert {prompt.count("<image>") for prompt in every} == {1}
    for prompts in yes_no:
        for concept, prompt in zip(CONCEPTS, prompts, strict=True):
            named = {c for c, name in NAMES[language].items() if name in split_words(prompt.split("<image>")[1])}
            assert named == {concept}
    assert scenes.yes_no_prompt("red", HELD_OUT, language) == yes_no[-1][CONCEPTS.index("red")]
    assert scenes.describe_prompt(HELD_OUT, language) == describe[-1]
    assert len(YES_NO[language]) >= 3
    assert len(DESCRIBE[language]) >= 3


def test_a_prompt_for_an_unknown_concept_is_an_error():
    with pytest.raises(UnknownConceptError, match="tiger"):
        scenes.yes_no_prompt("tigre")


@given(seed=seeds)
def test_the_tokenizer_knows_every_word_there_is(processor, seed):
    tokenizer = processor.tokenizer
    texts = [caption(scene, language) for scene in sample(2, seed=seed) for language in LANGUAGES]
    texts += [scenes.yes_no_prompt(c, p, lang) for lang in LANGUAGES for c in CONCEPTS for p in range(len(YES_NO[lang]))]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts).input_ids)
    assert len(set(vocabulary())) == len(vocabulary())
    back = tokenizer.decode(tokenizer(texts[0]).input_ids, skip_special_tokens=True)
    assert split_words(back) == split_words(texts[0])


# Probes. -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes():
    return {split: scenes.probes(3, retained=2, split=split) for split in ("val", "test")}


def pixels(sets):
    return [probe.image.tobytes() for found in sets for probe in found]


def test_probes_hold_and_lack_what_they_should(probes):
    found = probes["test"]
    assert found.domains == DOMAINS
    for concept in CONCEPTS:
        assert [len(s[concept]) for s in (found.positives, found.retained, found.negatives)] == [3, 2, 3]
        assert all(concept in probe.concepts for probe in (*found.positives[concept], *found.retained[concept]))
        assert all(concept not in probe.concepts for probe in found.negatives[concept])
        assert found.domain_of(concept) == domain_of(concept)


def test_no_image_is_probed_twice_or_in_two_splits(probes):
    every = [
        image for f in probes.values() for sets in (f.positives, f.retained, f.negatives) for image in pixels(sets.values())
    ]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_read_in_the_words_of_the_world(language):
    wording = scenes.wording(language=language)
    assert (wording.yes, wording.no) == ((YES[language],), (NO[language],))
    assert wording.yes_no("tiger") == scenes.yes_no_prompt("tiger", language=language)
    names = NAMES[language]
    assert wording.mentions(f"un {names['starfish'].upper()}.", "starfish")
    assert not wording.mentions(names["starfish"], "fish")
    assert not wording.mentions(names["bored"], "red")


# What ships is loaded as any Hugging Face model. ---------------------------------------------------------------------


def test_a_saved_model_and_processor_are_loaded_the_hugging_face_way(processor, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = build_llava(len(processor.tokenizer))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    ask = {"images": pictures(1), "text": scenes.yes_no_prompt("red"), "return_tensors": "pt"}
    for again in (AutoProcessor.from_pretrained(tmp_path), scenes.load_model(tmp_path)[1]):
        for name, tensor in processor(**ask).items():
            torch.testing.assert_close(again(**ask)[name], tensor, atol=0.02, rtol=0)
    assert torch.equal(logits(scenes.load_model(tmp_path)[0]), logits(model))
