"""The edits beyond Eq. 6, each with its law; and how rules of several concepts become one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks.bank import Concept, Subspace
from sauce_hooks.concepts.projections import TokenMoments, difference_of_means, leace
from sauce_hooks.erasure import EDITS, ConceptEraser, Edit, MergedEdit, Rule
from sauce_hooks.erasure.edit import confined, keep_norm, sources
from sauce_hooks.erasure.merging import merge_edits
from sauce_hooks.erasure.rules import merge_rules, stronger
from sauce_hooks.errors import ContrastError, EditError
from tiny import D_IN, make_sae, make_vision_sae

KINDS = {"jumprelu": {}, "topk": {"k": 8}, "abstopk": {"k": 8}}
"""The fast path; one whose features hang on each other; one whose activations may be negative."""

seeds = st.integers(0, 2**20)


def sae_of(kind):
    return make_sae(kind, dtype="float64", **KINDS[kind])


def acts(seed, batch=3, tokens=6):
    return torch.randn(batch, tokens, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(seed, r):
    drawn = torch.randn(D_IN, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.contiguous()


def concept_of(sae, x, features=(2, 5, 7, 11), **settings):
    """A concept with the means and gates that these activations have."""
    z = sae.encode(x)[..., list(features)].abs().flatten(0, 1)
    means, gates = (z.mean(0) + 0.1).tolist(), (z.mean(0) / 2).tolist()
    return Concept("x", tuple(features), means=tuple(means), gates=tuple(gates), **settings)


def merged(sae, concept, kind, gamma=-1.0):
    return MergedEdit([Edit("patches", sae, merge_rules([EDITS[kind](concept, gamma)]), keep_norm=concept.keep_norm)])


def changed(sae, before, after, features):
    """The features' activations that a change of the residual stream stands for, if the decoder rows are independent."""
    rows = sae.W_dec[list(features)]
    return torch.linalg.lstsq(rows.T, (after - before).flatten(0, 1).T).solution.T.reshape(*before.shape[:2], -1)


# Each edit by its definition. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", ["scale", "gated", "clamp"])
@given(seed=seeds, gamma=st.sampled_from([-2.0, -0.5, 0.0]), share=st.sampled_from([0.0, 0.3]))
@torch.no_grad()
def test_every_feature_becomes_what_the_edit_says(kind, edit, seed, gamma, share):
    sae, x = sae_of(kind), acts(seed)
    concept = concept_of(sae, x, share=share)
    z = sae.encode(x)[..., list(concept.features)]
    means, gates = torch.tensor(concept.means), torch.tensor(concept.gates)
    above = z.abs() > gates
    opened = above & (above.double().mean(1, keepdim=True) > share)
    wanted = {
        "scale": gamma * z,
        "gated": torch.where(opened, gamma * means / means.mean() * z, z),
        "clamp": torch.where(opened, gamma * means * z.sign(), z),
    }[edit]
    found = z + changed(sae, x, merged(sae, concept, edit, gamma)(x), concept.features)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@torch.no_grad()
def test_a_gated_edit_leaves_tokens_below_the_gate_bit_identical(kind, seed):
    sae, x = sae_of(kind), acts(seed)
    concept = concept_of(sae, x)
    below = (sae.encode(x)[..., list(concept.features)].abs() <= torch.tensor(concept.gates)).all(-1)
    for edit in ("gated", "clamp", "replace"):
        assert torch.equal(merged(sae, concept, edit)(x)[below], x[below])


@given(seed=seeds, scale=st.sampled_from([0.25, 4.0]))
@torch.no_grad()
def test_the_gated_factor_has_no_unit(seed, scale):
    """In other units of the activation (means and all) the factors are the same."""
    sae, x = sae_of("jumprelu"), acts(seed)
    concept = concept_of(sae, x)
    other = replace(concept, means=tuple(scale * mean for mean in concept.means))
    for feature, rule in EDITS["gated"](concept, -1.0).items():
        assert EDITS["gated"](other, -1.0)[feature].gamma == pytest.approx(rule.gamma)


@given(seed=seeds)
@torch.no_grad()
def test_a_share_judges_each_image_by_itself(seed):
    sae, x = sae_of("jumprelu"), acts(seed, batch=4)
    edit = merged(sae, concept_of(sae, x, share=0.4), "clamp")
    torch.testing.assert_close(edit(x), torch.cat([edit(image[None]) for image in x]))


# Replacement. --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@torch.no_grad()
def test_a_replaced_token_is_another_token_of_its_image(kind, seed):
    sae, x = sae_of(kind), acts(seed)
    concept = concept_of(sae, x)
    flagged = (sae.encode(x)[..., list(concept.features)].abs() > torch.tensor(concept.gates)).any(-1)
    out = merged(sae, concept, "replace")(x)
    assert torch.equal(out[~flagged], x[~flagged])
    for image, done, flags in zip(x, out, flagged, strict=True):
        if not flags.all():
            clean = image[~flags]
            assert all(any(torch.equal(token, other) for other in clean) for token in done[flags])


@torch.no_grad()
def test_of_the_clean_tokens_the_one_most_like_it_without_the_concept_is_taken():
    x = torch.tensor([[10.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 1.0]])
    bare = torch.tensor([[0.0, 0.9], [1.0, 0.0], [0.0, 1.0], [9.0, 1.0]])
    assert sources(x, bare, torch.tensor([True, False, False, False])).tolist() == [2, 1, 2, 3]
    assert sources(x, bare, torch.tensor([True, True, True, True])).tolist() == [-1] * 4


@given(seed=seeds)
@torch.no_grad()
def test_where_every_token_is_flagged_the_features_alone_go(seed):
    sae, x = sae_of("jumprelu"), acts(seed, tokens=1)
    concept = concept_of(sae, x)
    rules = {f: (replace(rule, gate=0.0),) for f, rule in EDITS["replace"](concept, 0.0).items()}
    expected = MergedEdit([Edit("patches", sae, dict.fromkeys(concept.features, (Rule(0.0),)))])(x)
    torch.testing.assert_close(MergedEdit([Edit("patches", sae, rules)])(x), expected)


@torch.no_grad()
def test_only_chosen_tokens_are_replaced_and_only_they_are_taken():
    sae, x = sae_of("jumprelu"), acts(3)
    edit, alone = merged(sae, concept_of(sae, x), "replace"), x[:, 1:]
    out = edit(x, range(1, 6))
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[:, 1:], edit(alone))
    assert not torch.equal(out, x)


# Where it may write. -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", ["scale", "gated", "clamp"])
@given(seed=seeds, r=st.integers(1, 5), inside=st.booleans())
@torch.no_grad()
def test_a_confined_change_is_the_change_projected(kind, edit, seed, r, inside):
    sae, x, rows = sae_of(kind), acts(seed), basis(seed, r)
    concept = concept_of(sae, x)
    free = merged(sae, concept, edit)(x) - x
    found = merged(sae, replace(concept, subspace=Subspace(rows, inside)), edit)(x) - x
    along = free @ rows.T @ rows
    torch.testing.assert_close(found, along if inside else free - along, rtol=1e-7, atol=1e-7)
    if not inside:
        assert (found @ rows.T).abs().max() < 1e-6 * (1 + free.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, r=st.integers(1, 5), inside=st.booleans())
@torch.no_grad()
def test_without_the_error_a_confined_change_is_added_to_the_reconstruction(kind, seed, r, inside):
    sae, x = sae_of(kind), acts(seed)
    concept = concept_of(sae, x, subspace=Subspace(basis(seed, r), inside))
    rules = merge_rules([EDITS["scale"](concept, -1.0), {30: Rule(0.0)}])
    free = MergedEdit([Edit("patches", sae, {30: (Rule(0.0),)}, preserve_error=False)])(x)
    change = merged(sae, concept, "scale")(x) - x
    found = MergedEdit([Edit("patches", sae, rules, preserve_error=False)])(x)
    torch.testing.assert_close(found, free + change, rtol=1e-7, atol=1e-7)


@given(seed=seeds, r=st.integers(1, 5))
def test_inside_and_outside_add_up(seed, r):
    change, rows = acts(seed), basis(seed + 1, r)
    parts = [confined(change, Subspace(rows, inside)) for inside in (True, False)]
    torch.testing.assert_close(sum(parts), change)
    assert torch.equal(confined(change, None), change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(seed=seeds)
@torch.no_grad()
def test_every_changed_token_keeps_its_norm_and_its_direction_is_the_edits(dtype, seed):
    sae, x = sae_of("jumprelu"), acts(seed).to(dtype)
    concept = concept_of(sae, x.double())
    free = merged(sae, concept, "scale")(x)
    kept = merged(sae, replace(concept, keep_norm=True), "scale")(x)
    same = (free == x).all(-1)
    assert torch.equal(kept[same], x[same])
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1), rtol=tolerance, atol=tolerance)
    cosine = torch.cosine_similarity(kept.double(), free.double(), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=tolerance, atol=tolerance)
    assert torch.equal(keep_norm(x, x), x)


# Union. --------------------------------------------------------------------------------------------------------------

rules = st.builds(
    Rule,
    st.sampled_from([-2.0, -0.5, 0.0, 1.0, 2.5]),
    offset=st.sampled_from([-1.0, 0.0, 1.0]),
    gate=st.sampled_from([0.0, 0.5]),
    share=st.sampled_from([0.0, 0.3]),
    replace=st.booleans(),
    subspace=st.sampled_from([None, Subspace(basis(1, 2), True), Subspace(basis(2, 2), True), Subspace(basis(1, 2), False)]),
)


@given(one=rules, other=rules, third=rules)
def test_the_stronger_rule_is_the_same_however_they_meet(one, other, third):
    assert stronger(one, one) == one
    assert stronger(one, other) == stronger(other, one) in (one, other)
    assert stronger(stronger(one, other), third) == stronger(one, stronger(other, third))


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@given(seed=seeds, ruled=st.lists(st.tuples(st.integers(0, 7), rules), min_size=1, max_size=10), data=st.data())
@torch.no_grad()
def test_any_split_order_or_repetition_of_rules_gives_one_result(kind, seed, ruled, data):
    sae, x = sae_of(kind), acts(seed)
    numbers = range(len(ruled))
    parts = data.draw(st.lists(st.sets(st.sampled_from(numbers), min_size=1), max_size=4))
    split = data.draw(st.permutations([set(numbers) - set().union(*parts), *parts, *parts[:1]]))
    edits = [Edit("patches", sae, merge_rules({f: rule} for f, rule in (ruled[i] for i in part))) for part in split]
    at_once = Edit("patches", sae, merge_rules({f: rule} for f, rule in ruled))
    assert torch.equal(MergedEdit(edits)(x), MergedEdit([at_once])(x))
    assert torch.equal(MergedEdit([merge_edits(edits)])(x), MergedEdit([at_once])(x))


def test_two_words_of_a_user_must_not_contradict_each_other():
    with pytest.raises(EditError, match=r"γ = -0.5 and γ = -1"):
        merge_rules([{3: Rule(-0.5, stated=-0.5)}, {3: Rule(-1.0, stated=-1.0)}])
    assert merge_rules([{3: Rule(-0.5, stated=-0.5)}, {3: Rule(-1.0)}]) == {3: (Rule(-1.0, stated=-0.5),)}


# Dense projections. --------------------------------------------------------------------------------------------------


def sets_of(seed, n=60, d=6):
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=draw, dtype=torch.float64)
    first, second = (torch.randn(n, d, generator=draw, dtype=torch.float64) @ mixing for _ in range(2))
    return first + 2 * torch.randn(d, generator=draw, dtype=torch.float64), second


def moments(*sets):
    return [TokenMoments.of([part]) for part in sets]


@given(seed=seeds)
def test_after_leace_no_linear_classifier_tells_the_sets_apart(seed):
    """The cross-covariance with the label is what every linear classifier starts from (Belrose et al., Theorem 3.1)."""
    first, second = sets_of(seed)
    projection = leace(*moments(first, second))
    edit = MergedEdit([Edit("patches", projections=(projection,))])
    gap, former = (a.mean(0) - b.mean(0) for a, b in ((edit(first[None])[0], edit(second[None])[0]), (first, second)))
    assert gap.norm() < 1e-4 * former.norm()


@given(seed=seeds)
def test_leace_changes_the_tokens_least(seed):
    """Of all projections that do that, in the sense of mean squared change; the difference of means is one of them."""
    first, second = sets_of(seed)
    both = torch.cat([first, second])[None]
    change = {
        fit: (MergedEdit([Edit("patches", projections=(fit(*moments(first, second)),))])(both) - both).var(1).sum()
        for fit in (leace, difference_of_means)
    }
    assert change[leace] <= change[difference_of_means] * (1 + 1e-4)


@given(seed=seeds, cut=st.integers(1, 59))
def test_moments_of_parts_add_up(seed, cut):
    first, second = sets_of(seed)
    whole, parts = moments(first)[0], moments(first[:cut], first[cut:])
    together = parts[0] + parts[1]
    assert together.n == whole.n
    torch.testing.assert_close(together.mean_d, first.mean(0))
    torch.testing.assert_close(together.covariance_dd, torch.cov(first.T, correction=0))
    for fit in (leace, difference_of_means):
        torch.testing.assert_close(fit(together, *moments(second)).right_rd, fit(whole, *moments(second)).right_rd)


@pytest.mark.parametrize("fit", [leace, difference_of_means])
def test_sets_with_one_mean_have_no_projection(fit):
    same = moments(torch.eye(4), torch.eye(4))
    with pytest.raises(ContrastError, match="same"):
        fit(*same)


# Through the eraser. -------------------------------------------------------------------------------------------------


def test_an_edit_without_what_it_needs_says_so(model):
    sae = make_vision_sae(model)
    bare = Concept("bare", (1, 2))
    for edit, lacking in (("gated", "means"), ("clamp", "means"), ("replace", "gates"), ("project", "projection")):
        with pytest.raises(EditError, match=f"bare.*{lacking}"):
            ConceptEraser(model, sae, [bare], edit=edit)
    with pytest.raises(EditError, match=r"'smear'.*clamp"):
        ConceptEraser(model, sae, [bare], edit="smear")
    with pytest.raises(EditError, match=r"bare.*does not know"):
        ConceptEraser(model, sae, [replace(bare, edit="tomorrow's")])


def test_a_concept_brings_its_own_edit(model):
    sae = make_vision_sae(model)
    clamped = Concept("a", (1, 2), means=(1.0, 2.0), gates=(0.5, 0.5), edit="clamp", gamma=-2.0)
    assert dict(ConceptEraser(model, sae, [clamped]).edit.rules) == {
        1: (Rule(0.0, -2.0, 0.5),),
        2: (Rule(0.0, -4.0, 0.5),),
    }
    assert dict(ConceptEraser(model, sae, [clamped], edit="scale").edit.rules) == dict.fromkeys((1, 2), (Rule(-2.0),))
