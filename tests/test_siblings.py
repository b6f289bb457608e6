"""Features that siblings carry too are left out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import learn_concept, scenes
from sauce_hooks.concepts import SCORERS, SetStatistics, set_statistics
from sauce_hooks.concepts.learn import contrast
from sauce_hooks.concepts.siblings import left_out, worst_contrast
from sauce_hooks.errors import ContrastError
from tiny import model_inputs

seeds = st.integers(0, 2**20)
D_SAE = 12
EVERY = pytest.mark.parametrize("scorer", SCORERS)
BRIGHT = [{"pixel_values": 1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2)]
DARK = [{"pixel_values": -1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2, 4)]


def activations(seed, n=40):
    z = torch.randn(n, D_SAE, generator=torch.Generator().manual_seed(seed)).relu()
    return z * (z > 0.4)


def of(z):
    return SetStatistics.of(z)


def planted(seed, *features):
    z = activations(seed)
    z[:, list(features)] += 3
    return of(z)


@EVERY
@given(seed=seeds)
def test_siblings_with_the_statistics_of_the_positives_leave_no_feature(scorer, seed):
    tigers, rest = planted(seed, 3, 5), of(activations(seed + 1))
    with pytest.raises(ContrastError, match=r"no feature tells 'tiger' from its siblings.*'cat'"):
        contrast("tiger", tigers, rest, {"cat": tigers}, scorer=scorer)


@pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "saeuron"])  # of 12 features it takes one
@given(seed=seeds, own=st.integers(0, 5), shared=st.integers(6, 11))
def test_a_feature_that_a_sibling_has_as_well_goes_and_the_concepts_own_stays(scorer, seed, own, shared):
    tigers, cats, rest = planted(seed, own, shared), planted(seed, shared), of(activations(seed + 1))
    options = {"scorer": scorer, "k": D_SAE}
    assert {own, shared} <= set(contrast("tiger", tigers, rest, **options).features)
    concept = contrast("tiger", tigers, rest, {"cat": cats, "car": of(activations(seed + 2))}, **options)
    assert concept.features[0] == own and shared not in concept.features
    assert shared in concept.provenance["left_out"]["cat"]
    assert concept.provenance["siblings"] == {"cat": 40, "car": 40}


@EVERY
@given(seed=seeds)
def test_the_order_of_siblings_does_not_matter_and_more_of_them_never_add_to_a_score(scorer, seed):
    score = SCORERS[scorer]
    tigers, rest, cats, cars = (of(activations(seed + i)) for i in range(4))
    alone, one, two = (
        worst_contrast(score, tigers, rest, dict(siblings)) for siblings in ((), [("a", cats)], [("a", cats), ("b", cars)])
    )
    assert torch.equal(alone, score(tigers, rest))
    assert (one <= alone).all() and (two <= one).all()
    assert torch.equal(two, worst_contrast(score, tigers, rest, {"b": cars, "a": cats}))


@given(seed=seeds)
def test_what_is_left_out_is_named_once_under_the_sibling_that_has_most_of_it(seed):
    rest, z = of(activations(seed)), activations(seed + 1)
    tigers, cats, lions = (of(z * scale) for scale in (1.0, 1.5, 2.0))
    score = SCORERS["difference"]
    speaking = [int(f) for f in torch.nonzero(score(tigers, rest) > 0)[:, 0]]
    found = left_out(score, tigers, rest, {"cat": cats, "lion": lions}, speaking)
    assert found == ({"lion": speaking} if speaking else {})
    assert left_out(score, tigers, rest, {}, speaking) == {}


# learn_concept. ------------------------------------------------------------------------------------------------------


def test_siblings_are_images_or_statistics_by_name_or_a_single_set(model, sae):
    cats = [{"pixel_values": model_inputs(6, seed=9)["pixel_values"]}]
    statistics = set_statistics(model, sae, cats)
    by_name = learn_concept(model, sae, "bright", BRIGHT, DARK, siblings={"cat": cats})
    assert by_name == learn_concept(model, sae, "bright", BRIGHT, DARK, siblings={"cat": statistics})
    assert by_name == learn_concept(model, sae, "bright", BRIGHT, DARK, siblings=cats)
    assert by_name == learn_concept(model, sae, "bright", BRIGHT, DARK, siblings=cats[0])
    assert by_name.provenance["siblings"] == {"cat": 6}
    without = learn_concept(model, sae, "bright", BRIGHT, DARK)
    assert without.features != by_name.features and "siblings" not in without.provenance


def test_siblings_that_are_the_positives_are_an_error_and_store_nothing(model, sae):
    with pytest.raises(ContrastError, match="siblings"):
        learn_concept(model, sae, "bright", BRIGHT, DARK, siblings={"cat": BRIGHT})
    assert "bright" not in sae.concepts


def test_in_the_bundled_world_what_all_faces_share_is_no_part_of_bored():
    model, processor, sae = scenes.load()

    def drawn(n, **kind):
        return [scene.image for scene in scenes.sample(n, seed=5, split="train", **kind)]

    bored, rest = drawn(40, contains="bored"), drawn(60, lacks="bored")
    faces = {c: drawn(15, contains=c, lacks="bored") for c in scenes.DOMAINS["emotion"] if c != "bored"}
    statistics = {c: set_statistics(model, sae, images, processor=processor) for c, images in faces.items()}
    shown = set_statistics(model, sae, bored, processor=processor)
    plain = learn_concept(model, sae, "bored ", shown, rest, processor=processor, k=4)
    apart = learn_concept(model, sae, "bored ", shown, rest, processor=processor, k=4, siblings=statistics)

    def share(feature):
        return max(float(found.mean_f[feature] / shown.mean_f[feature]) for found in statistics.values())

    assert max(map(share, plain.features)) > 1
    assert all(share(feature) < 1 for feature in apart.features)
    assert {f for found in apart.provenance["left_out"].values() for f in found} <= set(plain.features)
