import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import Concept, ConceptBank, learn_concept, read_activations
from sauce_hooks.concepts import SetStatistics, accumulate, pooled, sauce_score, select_features, set_statistics
from sauce_hooks.concepts import learn as learn_module
from sauce_hooks.concepts.statistics import N_BINS
from sauce_hooks.errors import ContrastError, EditError, ImagesError, SAEFileError, UnknownConceptError
from tiny import D_SAE, make_vision_sae, model_inputs, pictures, snapshot

seeds = st.integers(0, 2**20)
BRIGHT = [{"pixel_values": 1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2)]
DARK = [{"pixel_values": -1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2, 4)]


def statistics(mean, n=1):
    mean = torch.tensor(mean, dtype=torch.float64)
    none = torch.zeros(N_BINS, len(mean), dtype=torch.int32)
    return SetStatistics(n, mean * n, mean.pow(2) * n, (mean > 0).double() * n, none)


def activations(seed, n, d_sae=6):
    """Sparse random z of `n` images of 3 tokens."""
    z = torch.randn(n, 3, d_sae, generator=torch.Generator().manual_seed(seed)).relu()
    return z * (z > 0.5)


# Eq. 4. --------------------------------------------------------------------------------------------------------------


def test_eq4_by_hand():
    # (4, 1, 0)/5 − (1, 1, 2)/4, whatever the sizes of the sets
    score = sauce_score(statistics([4.0, 1.0, 0.0], n=3), statistics([1.0, 1.0, 2.0], n=50))
    torch.testing.assert_close(score, torch.tensor([0.55, -0.05, -0.5], dtype=torch.float64))


@given(seed=seeds, stretch=st.floats(0.01, 100))
def test_eq4_does_not_depend_on_the_scale_and_changes_sign_with_the_sets(seed, stretch):
    one, other = (SetStatistics.of(pooled(activations(seed + i, 5), "mean")) for i in (0, 1))
    stretched = replace(one, sum_f=one.sum_f * stretch)
    torch.testing.assert_close(sauce_score(stretched, other), sauce_score(one, other), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sauce_score(other, one), -sauce_score(one, other))
    assert abs(float(sauce_score(one, other).sum())) < 1e-6


def test_a_set_on_which_nothing_fires_scores_zero_and_not_nan():
    assert sauce_score(statistics([0.0, 0.0]), statistics([0.0, 0.0])).tolist() == [0.0, 0.0]


# Statistics. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "max"])
@given(seed=seeds, sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_statistics_of_parts_add_up_to_those_of_the_whole(pool, seed, sizes):
    z = activations(seed, sum(sizes))
    parts, whole = accumulate([pooled(part, pool) for part in z.split(sizes)]), SetStatistics.of(pooled(z, pool))
    assert parts.n == whole.n == sum(sizes)
    torch.testing.assert_close(parts.sum_f, whole.sum_f)
    assert torch.equal(parts.fired_f, whole.fired_f)
    of_images = z.double().mean(1) if pool == "mean" else z.double().amax(1)
    torch.testing.assert_close(parts.mean_f, of_images.mean(0), rtol=1e-6, atol=1e-7)
    assert torch.equal(parts.fired_f, (z.amax(1) > 0).sum(0).double())


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_of_signed_activations_the_size_counts(pool):
    z = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    signed, sizes = SetStatistics.of(pooled(z, pool)), SetStatistics.of(pooled(z.abs(), pool))
    assert torch.equal(signed.sum_f, sizes.sum_f) and torch.equal(signed.fired_f, sizes.fired_f)
    assert (signed.fired_f == 5).all()


def test_a_batch_is_encoded_in_parts_that_fit(model, sae, monkeypatch):
    whole = set_statistics(model, sae, BRIGHT)
    monkeypatch.setattr(learn_module, "CHUNK", 2 * 16 * sae.d_sae)
    parts = []
    real = type(sae).encode
    monkeypatch.setattr(type(sae), "encode", lambda self, x: (parts.append(len(x)), real(self, x))[1])
    in_parts = set_statistics(model, sae, BRIGHT)
    assert max(parts) == 2 and in_parts.n == whole.n
    torch.testing.assert_close(in_parts.sum_f, whole.sum_f)


def test_statistics_of_nothing_are_an_error():
    with pytest.raises(ContrastError, match="empty"):
        accumulate([])


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_statistics_of_images_are_those_of_their_encodings(model, sae, pool):
    found = set_statistics(model, sae, BRIGHT, pool=pool)
    rows = torch.cat(list(read_activations(model, BRIGHT, sae.hook_point))).reshape(12, 16, -1)
    expected = SetStatistics.of(pooled(sae.encode(rows), pool))
    assert found.n == 12
    torch.testing.assert_close(found.sum_f, expected.sum_f)


# Selection. ----------------------------------------------------------------------------------------------------------


@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=30), k=st.integers(1, 40))
def test_selection_takes_the_k_best_positive_ones_the_lower_index_first(scores, k):
    expected = sorted((i for i, s in enumerate(scores) if s > 0), key=lambda i: (-scores[i], i))[:k]
    features, values = select_features(torch.tensor(scores, dtype=torch.float64), k)
    assert list(features) == expected
    assert list(values) == [scores[i] for i in expected]


@given(seed=seeds, planted=st.sets(st.integers(0, 39), min_size=1, max_size=8))
def test_planted_features_are_the_ones_selected(seed, planted):
    def z_of(n, seed, more):
        z = activations(seed, n, d_sae=40)
        z[..., list(planted)] += more
        return SetStatistics.of(pooled(z, "mean"))

    score = sauce_score(z_of(60, seed, 3.0), z_of(60, seed + 1, 0.0))
    assert set(select_features(score, len(planted))[0]) == planted


def plant(model, sae, feature):
    """Make a feature fire on bright images and on no dark one."""
    bright, dark = (torch.cat(list(read_activations(model, s, sae.hook_point))).mean(0) for s in (BRIGHT, DARK))
    with torch.no_grad():
        direction = (bright - dark) / (bright - dark).norm()
        sae.sae.W_enc[:, feature] = direction
        sae.sae.b_enc[feature] = (sae.sae.b_dec - (bright + dark) / 2) @ direction
    return sae


def test_a_feature_planted_in_an_sae_is_learnt_from_images(model):
    sae = plant(model, make_vision_sae(model, "standard"), 11)
    concept = learn_concept(model, sae, "bright", BRIGHT, DARK, k=1)
    assert concept.features == (11,)
    assert 11 not in learn_concept(model, sae, "dark", DARK, BRIGHT, k=10).features


# learn_concept. ------------------------------------------------------------------------------------------------------


def test_a_learnt_concept_is_stored_with_its_provenance(model, sae):
    concept = learn_concept(model, sae, "bright", BRIGHT, DARK[:1], k=5, gamma=-2.0, pool="max")
    assert sae.concepts["bright"] is concept
    assert (concept.name, concept.gamma, len(concept.features), len(concept.scores)) == ("bright", -2.0, 5, 5)
    assert list(concept.scores) == sorted(concept.scores, reverse=True)
    told = {"scorer": "sauce", "k": 5, "pool": "max", "positives": 12, "negatives": 6, "tokens": "patches"}
    assert concept.provenance.items() >= told.items()
    assert concept.provenance["hook_point"] == sae.hook_point.path
    assert concept.provenance.keys() == {*told, "digests", "sae", "hook_point", "date", "library"}
    assert sae.concepts.sae == sae.record()


def test_the_digests_of_provenance_are_those_of_the_images(model, sae):
    first, again, other = (
        learn_concept(model, sae, "bright", sets, DARK, k=5).provenance["digests"]
        for sets in (BRIGHT, BRIGHT, DARK[:1] + BRIGHT)
    )
    assert first == again
    assert first[0] != other[0] and first[1] == other[1]


def test_a_learnt_concept_knows_the_means_of_its_features(model, sae):
    concept = learn_concept(model, sae, "bright", BRIGHT, DARK[:1], k=5)
    bright, dark = (set_statistics(model, sae, images) for images in (BRIGHT, DARK[:1]))
    assert list(concept.means) == [float(bright.mean_f[f]) for f in concept.features]
    both = (12 * bright.mean_f + 6 * dark.mean_f) / 18
    assert list(concept.gates) == pytest.approx([float(both[f]) for f in concept.features])
    assert all(mean > gate > 0 for mean, gate in zip(concept.means, concept.gates, strict=True))


def test_sets_and_their_statistics_give_the_same_concept(model, sae):
    sets = [set_statistics(model, sae, images) for images in (BRIGHT, DARK)]
    assert learn_concept(model, sae, "bright", *sets) == learn_concept(model, sae, "bright", BRIGHT, DARK)


def test_pictures_need_the_processor_and_give_the_same_concept(model, sae, processor):
    sets = pictures(4, seed=1), pictures(4, seed=2)
    inputs = [dict(processor.image_processor(images=images, return_tensors="pt")) for images in sets]
    from_pictures = learn_concept(model, sae, "c", *sets, processor=processor, batch_size=3)
    assert from_pictures.features == learn_concept(model, sae, "c", *inputs).features


def test_a_scorer_of_ones_own_decides(model, sae):
    def only_seven(positives, negatives):
        return torch.nn.functional.one_hot(torch.tensor(7), D_SAE).double() * positives.n / negatives.n

    concept = learn_concept(model, sae, "seven", BRIGHT, DARK, scorer=only_seven)
    assert (concept.features, concept.scores, concept.provenance["scorer"]) == ((7,), (1.0,), "only_seven")


def test_learning_leaves_the_model_as_it_was(model, sae):
    state = snapshot(model)
    learn_concept(model, sae, "bright", BRIGHT, DARK)
    assert snapshot(model) == state


@pytest.mark.parametrize(
    ("positives", "negatives", "options"),
    [(BRIGHT, BRIGHT, {}), (BRIGHT, BRIGHT[::-1], {}), ([], DARK, {}), (BRIGHT, [], {}), (BRIGHT, DARK, {"k": 0}),
     (BRIGHT, DARK, {"k": -1})],
    ids=["the same set", "the same set in another order", "no positives", "no negatives", "k=0", "k=-1"],
)  # fmt: skip
def test_sets_that_tell_nothing_apart_are_an_error_and_store_nothing(model, sae, positives, negatives, options):
    with pytest.raises((ContrastError, ImagesError)):
        learn_concept(model, sae, "bright", positives, negatives, **options)
    assert "bright" not in sae.concepts


# The bank. -----------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)


@st.composite
def concepts(draw):
    features = draw(st.lists(st.integers(0, 10_000), unique=True, max_size=6))
    scores = draw(st.just([]) | st.lists(finite, min_size=len(features), max_size=len(features)))
    return Concept(
        name=draw(st.text(max_size=8)),
        features=tuple(features),
        scores=tuple(scores),
        gamma=draw(st.none() | finite),
        provenance=draw(st.dictionaries(st.text(max_size=5), plain, max_size=3)),
    )


banks = st.lists(concepts(), max_size=5).map(ConceptBank)


@given(bank=banks)
def test_a_bank_that_is_loaded_equals_the_one_saved(bank, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "concepts.json"
    bank.save(path)
    found = ConceptBank.load(path)
    assert found == bank
    assert list(found) == list(bank)
    assert [c.provenance for c in found.values()] == [c.provenance for c in bank.values()]
    assert [entry.name for entry in path.parent.iterdir()] == ["concepts.json"]


@given(one=banks, other=banks, third=banks)
def test_of_merged_banks_the_right_one_counts(one, other, third):
    merged = one | other
    assert dict(merged) == {**one, **other}
    assert (one | other) | third == one | (other | third)
    assert one | one == one
    assert one | ConceptBank() == one == ConceptBank() | one


def test_a_bank_is_a_mapping():
    red, blue = Concept("red", (1,)), Concept("blue", (2,))
    bank = ConceptBank([red])
    bank.add(blue)
    assert dict(bank) == {"red": red, "blue": blue}
    assert len(bank) == 2
    assert "red" in bank
    assert "green" not in bank
    assert bank.get("green") is None
    bank.add(Concept("red", (3,)))
    assert bank["red"].features == (3,)
    assert repr(bank) == "ConceptBank(red, blue)"


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownConceptError, match=r"Did you mean 'orange'\? Known concepts: red, orange\."):
        _ = ConceptBank([Concept("red", (1,)), Concept("orange", (2,))])["ornage"]
    with pytest.raises(UnknownConceptError, match=r"^unknown concept 'xyz'\. Known"):
        _ = ConceptBank([Concept("red", (1,))])["xyz"]


@pytest.mark.parametrize("wrong", [{"features": (1, 1)}, {"features": (-1,)}, {"features": (1, 2), "scores": (0.5,)}])
def test_a_concept_that_cannot_be_is_an_error(wrong):
    with pytest.raises(EditError, match="red"):
        Concept("red", **wrong)


def test_a_failed_save_leaves_the_old_bank(tmp_path, monkeypatch):
    path, old = tmp_path / "bank.json", ConceptBank([Concept("red", (1,))])
    old.save(path)

    def full(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(os, "replace", full)
        ConceptBank().save(path)
    assert ConceptBank.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "noise", json.dumps({"format": 99, "concepts": []}), json.dumps({"format": 1, "concepts": [3]}),
     json.dumps({"format": 1, "concepts": [{"name": "red"}]}), json.dumps({"format": 1}),
     json.dumps({"format": 1, "concepts": 3}),
     '{"format": 1, "concepts": [{"name": "a", "features": ["x"], "scores": [], "gamma": null, "provenance": {}}]}'],
)  # fmt: skip
def test_what_is_no_bank_is_an_error(tmp_path, text):
    (tmp_path / "bank.json").write_text(text)
    with pytest.raises(SAEFileError, match=r"bank\.json"):
        ConceptBank.load(tmp_path / "bank.json")


def test_a_missing_bank_is_an_error(tmp_path):
    with pytest.raises(SAEFileError):
        ConceptBank.load(tmp_path / "none.json")
