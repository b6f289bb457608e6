"""Where an edit may write so that no other concept's linear reader sees it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks.bank import Concept, Subspace
from sauce_hooks.concepts import SetStatistics, TokenMoments, keep_apart, read_out_score
from sauce_hooks.concepts.readout import read_outs, written_direction
from sauce_hooks.erasure import EDITS, Edit, MergedEdit
from sauce_hooks.erasure.rules import merge_rules
from sauce_hooks.errors import ContrastError
from tiny import D_IN, make_sae

seeds = st.integers(0, 2**20)


def moments_of(seed, n_concepts=4, n=200):
    """Concepts that each add a direction of their own to tokens of one distribution."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D_IN, D_IN, generator=draw, dtype=torch.float64) / D_IN**0.5
    found = {}
    for i in range(n_concepts):
        sets = [torch.randn(n, D_IN, generator=draw, dtype=torch.float64) @ mixing for _ in range(2)]
        added = torch.randn(D_IN, generator=draw, dtype=torch.float64)
        found[f"c{i}"] = (TokenMoments.of([sets[0] + added]), TokenMoments.of([sets[1]]))
    return found


@given(seed=seeds, towards=st.booleans())
def test_only_the_concepts_own_reader_sees_what_is_written(seed, towards):
    apart = keep_apart(moments_of(seed), towards={"c0": ["c1", "c2"]} if towards else {})
    written = torch.cat([space.basis_rd for space in apart.values()]).double()
    read = torch.cat([space.reader_rd for space in apart.values()]).double()
    seen = read @ written.T
    size = read.norm(dim=1)[:, None] * written.norm(dim=1)
    assert ((seen - torch.eye(4)).abs() < 1e-4 * size.clamp_min(1)).all()


@given(seed=seeds)
def test_a_reader_is_fishers_discriminant(seed):
    """No other direction has a larger ratio of the squared difference to the variance."""
    positives, negatives = moments_of(seed, n_concepts=1)["c0"]
    v, cov = positives.mean_d - negatives.mean_d, negatives.covariance_dd

    def ratio(h):
        return (h @ v) ** 2 / (h @ cov @ h)

    best = ratio(read_outs(v[None], cov, ridge=0)[0])
    others = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    assert all(ratio(h) <= best * (1 + 1e-9) for h in [*others, v])


@given(seed=seeds)
def test_other_concepts_know_nothing_of_a_known_ones_edit(seed):
    """Subspaces of a bank count as much as concepts learnt together."""
    moments = moments_of(seed)
    together = keep_apart(moments)
    alone = keep_apart({"c0": moments["c0"]}, [together["c1"], together["c2"]])["c0"]
    for other in ("c1", "c2"):
        reader = together[other].reader_rd[0]
        assert abs(float(alone.basis_rd[0] @ reader)) < 1e-4 * float(alone.basis_rd.norm() * reader.norm())


@given(seed=seeds, gamma=st.sampled_from([-1.0, 0.0, 0.5]))
@torch.no_grad()
def test_gamma_scales_what_the_features_add_to_the_read_out(seed, gamma):
    """h · x′ − h · x = (γ − 1) Σ z_i W_dec[i] · h, and no other read-out moves."""
    sae, apart = make_sae("jumprelu", dtype="float64"), keep_apart(moments_of(seed))
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    features = (1, 4, 9)
    concept = Concept("c0", features, subspace=apart["c0"])
    change = MergedEdit([Edit("patches", sae, merge_rules([EDITS["scale"](concept, gamma)]))])(x) - x
    read = {name: space.reader_rd[0].double() for name, space in apart.items()}
    added = sae.encode(x)[..., list(features)] @ (sae.W_dec[list(features)] @ read["c0"])
    torch.testing.assert_close(change @ read["c0"], (gamma - 1) * added, rtol=1e-3, atol=1e-3)
    for name in ("c1", "c2", "c3"):
        scale = float(change.norm() * read[name].norm())
        assert float((change @ read[name]).abs().max()) <= 1e-4 * scale + 1e-9


@given(seed=seeds)
def test_the_score_adds_up_to_the_difference_of_the_read_out(seed):
    """Over all features, it is what the reconstructions of the two sets differ by in the read-out."""
    draw = torch.Generator().manual_seed(seed)
    z = [torch.rand(6, 48, generator=draw) for _ in range(2)]
    W_dec, h = torch.randn(48, D_IN, generator=draw), torch.randn(1, D_IN, generator=draw)
    score = read_out_score(W_dec, Subspace(h, inside=True, read_rd=h))(*(SetStatistics.of(part) for part in z))
    expected = ((z[0].mean(0) - z[1].mean(0)) @ W_dec @ h[0]).double()
    torch.testing.assert_close(score.sum(), expected, rtol=1e-4, atol=1e-4)


def test_more_concepts_than_there_is_room_for_keep_the_nearest_apart():
    draw = torch.Generator().manual_seed(0)
    v, others = torch.randn(D_IN, generator=draw), torch.randn(100, D_IN, generator=draw)
    near = (torch.nn.functional.normalize(others, dim=1) @ v).abs().argsort(descending=True)
    written = written_direction(v, v, others)
    kept = near[: D_IN // 4]
    assert (others[kept] @ written).abs().max() < 1e-4
    assert (others @ written).abs().max() > 1e-2


def test_two_concepts_that_are_one_cannot_be_kept_apart():
    moments = moments_of(0, n_concepts=2)
    with pytest.raises(ContrastError, match=r"'a': .*the same"):
        keep_apart({"a": moments["c0"], "b": moments["c0"]})


gammas = st.sampled_from([-1.0, -0.25, 0.0, 0.5])


@given(seed=seeds, one=gammas, other=gammas)
@torch.no_grad()
def test_concepts_that_share_a_feature_and_write_apart_forget_as_much_together_as_alone(seed, one, other):
    """What the feature writes for one concept erases nothing of the other: both are written."""
    sae, apart = make_sae("jumprelu", dtype="float64"), keep_apart(moments_of(seed))
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    edits = {
        name: Edit("patches", sae, merge_rules([EDITS["scale"](Concept(name, features, subspace=apart[name]), gamma)]))
        for name, features, gamma in (("c0", (1, 4, 9), one), ("c1", (4, 9, 12), other))
    }
    together = MergedEdit(list(edits.values()))(x) - x
    for name, edit in edits.items():
        read = apart[name].reader_rd[0].double()
        alone = MergedEdit([edit])(x) - x
        scale = float(together.norm() * read.norm())
        assert float(((together - alone) @ read).abs().max()) <= 1e-4 * scale + 1e-9


@given(seed=seeds, everywhere=gammas, apart_gamma=gammas)
@torch.no_grad()
def test_where_a_feature_is_also_changed_everywhere_the_stronger_holds_and_nothing_is_twice(seed, everywhere, apart_gamma):
    sae, apart = make_sae("jumprelu", dtype="float64"), keep_apart(moments_of(seed))["c0"]
    x = torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    read = apart.reader_rd[0].double()
    concepts = (Concept("c0", (4,), subspace=apart), apart_gamma), (Concept("all", (4,)), everywhere)
    edits = [Edit("patches", sae, merge_rules([EDITS["scale"](concept, gamma)])) for concept, gamma in concepts]
    seen = (MergedEdit(edits)(x) - x) @ read
    furthest = max(everywhere, apart_gamma, key=lambda gamma: abs(gamma - 1))
    wanted = (furthest - 1) * sae.encode(x)[..., 4] * (sae.W_dec[4] @ read)
    torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3)
