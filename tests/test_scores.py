"""Scores of features: their formulas, and the laws that all of them obey."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from sauce_hooks import learn_concept
from sauce_hooks.concepts import SCORERS, SetStatistics, accumulate, select_features
from sauce_hooks.concepts.scores import auroc_score, cohens_d_score, crisp_score, fisher_score, log_odds_score, saeuron_score
from sauce_hooks.errors import ContrastError
from tiny import make_vision_sae, model_inputs

seeds = st.integers(0, 2**20)
sizes = st.integers(2, 30)
EVERY = pytest.mark.parametrize("name", SCORERS)
SHIFTED = ("saeuron", "crisp")
"""Scores that single features out, so that swapping the sets does not merely change their sign."""


def activations(seed, n, d_sae=12):
    """Sparse random z of `n` images, a feature dead and one always on."""
    z = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(seed)).relu()
    z = z * (z > 0.4)
    z[:, 0], z[:, 1] = 0, 1.5
    return z


def of(z):
    return SetStatistics.of(z)


@EVERY
@given(seed=seeds, n=sizes, m=sizes)
def test_every_score_is_finite_and_nothing_for_a_feature_that_says_nothing(name, seed, n, m):
    score = SCORERS[name](of(activations(seed, n)), of(activations(seed + 1, m)))
    assert score.shape == (12,) and torch.isfinite(score).all()
    assert score[0] == pytest.approx(0, abs=1e-12) or (name == "log_odds" and n != m)


@EVERY
@given(seed=seeds, n=sizes)
def test_a_set_against_itself_scores_nothing(name, seed, n):
    z = of(activations(seed, n))
    assert SCORERS[name](z, z).abs().max() < 1e-9
    assert select_features(SCORERS[name](z, z).round(decimals=9), 5) == ((), ())


@EVERY
@given(seed=seeds, n=sizes, m=sizes)
def test_swapped_sets_change_the_sign(name, seed, n, m):
    if name in SHIFTED:
        return
    one, other = of(activations(seed, n)), of(activations(seed + 1, m))
    torch.testing.assert_close(SCORERS[name](one, other), -SCORERS[name](other, one))


@EVERY
@given(seed=seeds, feature=st.integers(2, 11))
def test_a_feature_that_tells_the_sets_apart_is_the_best(name, seed, feature):
    with_it, without = activations(seed, 40), activations(seed + 1, 40)
    with_it[:, feature], without[:, feature] = 3 + with_it[:, feature], 0
    score = SCORERS[name](of(with_it), of(without))
    assert int(score.argmax()) == feature
    assert select_features(score, 1)[0] == (feature,)


@EVERY
@given(seed=seeds, parts=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_it_does_not_matter_how_the_images_came_together(name, seed, parts):
    z = activations(seed, sum(parts))
    whole, pieces = of(z), accumulate(z.split(parts))
    negatives = of(activations(seed + 1, 9))
    torch.testing.assert_close(SCORERS[name](pieces, negatives), SCORERS[name](whole, negatives))
    taken_away = whole - of(z[: parts[0]])
    rest = of(z[parts[0] :])
    assert taken_away.n == rest.n and torch.equal(taken_away.histogram_bf, rest.histogram_bf)
    torch.testing.assert_close(taken_away.squares_f, rest.squares_f)


# Formulas. -----------------------------------------------------------------------------------------------------------


@given(seed=seeds, n=sizes, m=sizes)
def test_auroc_is_mann_whitneys_u_of_the_rounded_activations(seed, n, m):
    one, other = activations(seed, n), activations(seed + 1, m)

    def rounded(z):
        return torch.where(z > 0, 2 ** (torch.floor(4 * torch.log2(z.clamp_min(1e-9))) / 4), 0).double().numpy()

    found = auroc_score(of(one), of(other))
    for feature in range(12):
        u = mannwhitneyu(rounded(one)[:, feature], rounded(other)[:, feature]).statistic
        assert float(found[feature]) == pytest.approx(u / (n * m) - 0.5, abs=1e-9)


@given(seed=seeds, n=sizes, m=sizes)
def test_cohens_d_and_fisher_by_numpy(seed, n, m):
    one, other = (activations(seed + i, k).double().numpy() for i, k in ((0, n), (1, m)))
    with np.errstate(all="ignore"):
        pooled = np.sqrt(((n - 1) * one.var(0, ddof=1) + (m - 1) * other.var(0, ddof=1)) / (n + m - 2))
        d = (one.mean(0) - other.mean(0)) / pooled
        fisher = (one.mean(0) - other.mean(0)) ** 2 / (one.var(0) + other.var(0)) * np.sign(one.mean(0) - other.mean(0))
    for found, expected in ((cohens_d_score, d), (fisher_score, fisher)):
        values = found(of(torch.tensor(one)), of(torch.tensor(other))).numpy()
        sure = np.isfinite(expected) & (np.abs(expected) < 1e5)
        np.testing.assert_allclose(values[sure], expected[sure], rtol=1e-5, atol=1e-8)


def test_log_odds_by_hand():
    # fires on 3 of 4 images with the concept, on 1 of 4 without: log (3.5/1.5) − log (1.5/3.5)
    one, other = (torch.tensor([[1.0]] * k + [[0.0]] * (4 - k)) for k in (3, 1))
    assert float(log_odds_score(of(one), of(other))) == pytest.approx(2 * math.log(3.5 / 1.5))


@given(seed=seeds, percentile=st.sampled_from([50.0, 75.0, 90.0]))
def test_saeuron_takes_no_more_than_the_percentile_leaves(seed, percentile):
    score = saeuron_score(of(activations(seed, 20, 100)), of(activations(seed + 1, 20, 100)), percentile)
    assert 0 < int((score > 0).sum()) <= 100 - percentile + 1


@given(seed=seeds, candidates=st.integers(1, 20))
def test_crisp_ranks_its_candidates_only(seed, candidates):
    one, other = of(activations(seed, 30, 60)), of(activations(seed + 1, 30, 60))
    score = crisp_score(one, other, candidates)
    margin = one.frequency_f - other.frequency_f
    chosen = set(torch.nonzero(score)[:, 0].tolist())
    assert len(chosen) <= candidates
    assert all(margin[f] > 0 for f in chosen)


def test_a_feature_that_never_varies_has_a_large_score_and_no_infinite_one():
    z = torch.zeros(5, 3), torch.ones(5, 3)
    for score in (cohens_d_score, fisher_score):
        assert torch.isfinite(score(of(z[1]), of(z[0]))).all()
        assert (score(of(z[1]), of(z[0])) > 100).all()


def test_auroc_says_what_to_do_where_there_is_no_histogram():
    with_it, without = SetStatistics.of(activations(0, 4), histogram=False), of(activations(1, 4))
    for pair in ((with_it, without), (without, with_it)):
        with pytest.raises(ContrastError, match="histograms=True"):
            auroc_score(*pair)


@EVERY
def test_no_other_score_needs_a_histogram(name):
    pair = [activations(seed, 9) for seed in (0, 1)]
    if name != "auroc":
        plain = [SetStatistics.of(z, histogram=False) for z in pair]
        assert torch.equal(SCORERS[name](*plain), SCORERS[name](*map(of, pair)))


# Through learn_concept. ----------------------------------------------------------------------------------------------

BRIGHT = [{"pixel_values": 1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2)]
DARK = [{"pixel_values": -1.5 + 0.3 * model_inputs(6, seed=i)["pixel_values"]} for i in range(2, 4)]


@EVERY
@pytest.mark.parametrize("pool", ["mean", "max", "class", "last"])
def test_learn_concept_takes_every_score_and_pool_by_name(model, name, pool):
    sae = make_vision_sae(model, "standard")
    concept = learn_concept(model, sae, "bright", BRIGHT, DARK, scorer=name, pool=pool, k=5)
    assert concept.provenance["scorer"] == name and concept.provenance["pool"] == pool
    assert 1 <= len(concept.features) <= 5


def test_a_users_own_score_works_the_same_way(model):
    sae = make_vision_sae(model, "standard")

    def mine(positives, negatives):
        return torch.arange(sae.d_sae) - sae.d_sae + 3.0

    concept = learn_concept(model, sae, "mine", BRIGHT, DARK, scorer=mine)
    assert concept.features == (sae.d_sae - 1, sae.d_sae - 2)
    assert concept.provenance["scorer"] == "mine"


def test_an_unknown_score_names_the_known_ones(model):
    with pytest.raises(ContrastError, match=r"'best'.*cohens_d"):
        learn_concept(model, make_vision_sae(model), "x", BRIGHT, DARK, scorer="best")
