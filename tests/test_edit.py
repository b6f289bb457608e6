import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks.bank import Projection
from sauce_hooks.erasure import Edit, MergedEdit, Rule
from sauce_hooks.erasure.edit import (
    Columns,
    decode_edit,
    dense_delta,
    project_out,
    scale_features,
    scaled_change,
    sparse_delta_edit,
)
from sauce_hooks.erasure.rules import merge_rules
from sauce_hooks.errors import EditError
from tiny import D_IN, D_SAE, make_sae

ELEMENTWISE = ["standard", "jumprelu"]
EVERY = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 8},
    "topk, rescaled": {"k": 8, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 8},
    "matching_pursuit": {"max_iterations": 6},
    "standard, layer norm": {"normalize_activations": "layer_norm"},
    "jumprelu, constant norm": {"normalize_activations": "constant_norm_rescale"},
    "standard, bias not taken off": {"apply_b_dec_to_input": False},
}
"""What an SAE can be, by name: the architecture first."""

seeds = st.integers(0, 2**20)
gammas = st.dictionaries(st.integers(0, D_SAE - 1), st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=12)


def sae_of(kind, **options):
    return make_sae(kind.split(",")[0], **{**EVERY[kind], **options})


def acts(seed, dtype=torch.float64, batch=3, tokens=5):
    return torch.randn(batch, tokens, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def edit(sae, gammas, preserve_error=True, tokens="patches"):
    return Edit(tokens, sae, {f: (Rule(gamma),) for f, gamma in gammas.items()}, preserve_error)


def tensors(gammas, dtype=torch.float64):
    return torch.tensor(list(gammas)), torch.tensor(list(gammas.values()), dtype=dtype)


def change(gammas, dtype=torch.float64):
    features_k, gamma_k = tensors(gammas, dtype)
    return features_k, scaled_change(gamma_k)


@torch.no_grad()
def by_definition(sae, x, gammas):
    """x + decode(C(z)) − decode(z), each from its own encoding: some SAEs keep the input's norm for one decode."""
    edited = sae.decode(scale_features(sae.encode(x), *tensors(gammas, sae.dtype)))
    return x + (edited - sae.decode(sae.encode(x)))


# Eq. 6. --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worked():
    """Two dimensions, three features, numbers that can be followed by hand."""
    sae = make_sae("standard", d_in=2, d_sae=3, dtype="float64")
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


X = torch.tensor([[3.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
Z = torch.tensor([[2.0, 2.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
"""ReLU((x − b_pre) W_enc + b_enc): 3−1, 2, (2+2)−1; the second token fires nothing."""
GAMMAS = {0: -0.5, 2: -0.5}


@torch.no_grad()
def test_eq6_by_hand(worked):
    assert torch.equal(worked.encode(X), Z)
    assert scale_features(Z, *tensors(GAMMAS))[0].tolist() == [-1.0, 2.0, -1.5]
    # decode(C(z)) = (1, 0) − 1·(1, 0) + 2·(0, 1) − 1.5·(1, −1); the second token becomes the bias.
    literal = torch.tensor([[-1.5, 3.5], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(decode_edit(X, worked, *change(GAMMAS)), literal)
    assert torch.equal(MergedEdit([edit(worked, GAMMAS, preserve_error=False)])(X), literal)
    # decode(z) = (6, −1), so the change is (−7.5, 4.5); the second token stays.
    kept = torch.tensor([[-4.5, 6.5], [0.0, -1.0]], dtype=torch.float64)
    assert torch.equal(X + dense_delta(X, worked, *change(GAMMAS)), kept)
    assert torch.equal(MergedEdit([edit(worked, GAMMAS)])(X), kept)


@given(seed=seeds, gammas=gammas)
def test_scaling_touches_the_chosen_features_only(seed, gammas):
    z = torch.rand(4, D_SAE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = z.clone()
    scaled = scale_features(z, *tensors(gammas))
    assert torch.equal(z, before)
    for feature in range(D_SAE):
        assert torch.equal(scaled[:, feature], z[:, feature] * gammas.get(feature, 1.0))


# Null edit. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gamma_one_is_bit_identical(kind, dtype):
    null = MergedEdit([edit(sae_of(kind), dict.fromkeys(range(D_SAE), 1.0))])
    assert null.is_null
    assert torch.equal(null(acts(0, dtype)), acts(0, dtype))


def test_no_edit_is_bit_identical():
    assert MergedEdit([]).is_null
    assert torch.equal(MergedEdit([])(acts(0)), acts(0))


def test_dropping_the_error_is_no_null_edit():
    sae = sae_of("standard", dtype="float64")
    dropped = MergedEdit([edit(sae, {0: 1.0}, preserve_error=False)])
    assert not dropped.is_null
    with torch.no_grad():
        assert torch.equal(dropped(acts(0)), sae.decode(sae.encode(acts(0))))


# Locality. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
@given(seed=seeds, gammas=gammas)
def test_a_token_on_which_nothing_chosen_fires_is_bit_identical(kind, seed, gammas):
    sae, x = sae_of(kind), acts(seed, torch.float32)
    with torch.no_grad():
        silent = (sae.encode(x)[..., list(gammas)] == 0).all(-1)
        assert torch.equal(MergedEdit([edit(sae, gammas)])(x)[silent], x[silent])


@pytest.mark.parametrize("kind", [kind for kind in EVERY if "norm" not in kind])
@given(seed=seeds, gammas=gammas)
def test_the_change_lies_in_the_span_of_the_chosen_decoder_rows(kind, seed, gammas):
    sae, x = sae_of(kind, dtype="float64"), acts(seed)
    with torch.no_grad():
        change = (MergedEdit([edit(sae, gammas)])(x) - x).flatten(0, 1).T
        rows = sae.W_dec[list(gammas)].T
        outside = change - rows @ torch.linalg.lstsq(rows, change).solution
    assert outside.abs().max() < 1e-10 * (1 + change.abs().max())


# Sparse equals dense. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
@given(seed=seeds, gammas=gammas)
def test_the_edit_is_decode_of_the_change_minus_decode(kind, seed, gammas):
    sae, x = sae_of(kind, dtype="float64"), acts(seed)
    torch.testing.assert_close(MergedEdit([edit(sae, gammas)])(x), by_definition(sae, x, gammas), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ELEMENTWISE)
@pytest.mark.parametrize(
    ("acts_dtype", "sae_dtype"),
    [("float32", "float32"), ("float64", "float32"), ("float32", "float64"), ("bfloat16", "float32"),
     ("float16", "float32"), ("bfloat16", "bfloat16")],
)  # fmt: skip
@given(seed=seeds, gammas=gammas)
def test_sparse_equals_dense_within_rounding(architecture, acts_dtype, sae_dtype, seed, gammas):
    x, sae = acts(seed, getattr(torch, acts_dtype)), make_sae(architecture, dtype=sae_dtype)
    exact = make_sae(architecture, dtype="float64")
    with torch.no_grad():
        for mine, given in zip(exact.parameters(), sae.parameters(), strict=True):
            mine.copy_(given)
        columns = Columns.of(exact, torch.arange(D_SAE))
        pre = x.double() @ columns.W_enc_dk + columns.b_enc_k
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(sae.dtype).eps)
        margin = (pre - (0 if columns.threshold_k is None else columns.threshold_k)).abs()[..., sorted(gammas)]
        decided = (margin > 30 * eps).all(-1)  # rounding can't decide who fires
        found = MergedEdit([edit(sae, gammas)])(x)
        expected = by_definition(exact, x.double(), gammas)
    assert found.dtype == x.dtype
    tolerance = 60 * eps
    torch.testing.assert_close(found.double()[decided], expected[decided], rtol=tolerance, atol=tolerance)


def test_the_fast_path_is_taken_where_it_is_right_and_nowhere_else():
    fast = {kind for kind in EVERY if Columns.of(sae_of(kind), torch.tensor([0])) is not None}
    assert fast == {"standard", "jumprelu", "standard, bias not taken off"}


@torch.no_grad()
def test_fast_and_dense_are_one_function():
    sae, gammas = make_sae("jumprelu", dtype="float64"), {3: -0.5, 9: 2.0}
    features_k, gamma_k = tensors(gammas)
    sparse = sparse_delta_edit(acts(1), Columns.of(sae, features_k), gamma_k)
    torch.testing.assert_close(sparse, acts(1) + dense_delta(acts(1), sae, *change(gammas)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("preserve_error", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_what_comes_out_has_the_dtype_that_went_in(kind, preserve_error, dtype):
    found = MergedEdit([edit(sae_of(kind), {0: -0.5, 7: 0.0}, preserve_error)])(acts(0, dtype))
    assert found.dtype == dtype
    assert found.shape == acts(0).shape
    assert found.isfinite().all()


# Union. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("preserve_error", [True, False])
@given(seed=seeds, gammas=gammas, data=st.data())
@torch.no_grad()
def test_any_split_order_or_repetition_gives_one_result(kind, preserve_error, seed, gammas, data):
    sae, x = sae_of(kind), acts(seed, torch.float32)
    parts = data.draw(st.lists(st.sets(st.sampled_from(sorted(gammas)), min_size=1), max_size=5))
    split = data.draw(st.permutations([set(gammas) - set().union(*parts), *parts, *parts[:1]]))
    edits = [edit(sae, {f: gammas[f] for f in part}, preserve_error) for part in split]
    assert torch.equal(MergedEdit(edits)(x), MergedEdit([edit(sae, gammas, preserve_error)])(x))


@given(seed=seeds, first=gammas, second=gammas)
@torch.no_grad()
def test_changes_of_two_saes_add_up(seed, first, second):
    one, other = (make_sae("jumprelu", seed=i, dtype="float64") for i in (1, 2))
    x, edits = acts(seed), [edit(one, first), edit(other, second)]
    expected = by_definition(one, x, first) + by_definition(other, x, second) - x
    torch.testing.assert_close(MergedEdit(edits)(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(MergedEdit(edits[::-1])(x), expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds, factors=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=4))
@torch.no_grad()
def test_of_contradicting_gammas_the_strongest_holds(seed, factors):
    sae, x = make_sae(), acts(seed)
    merged = MergedEdit([edit(sae, {3: gamma}) for gamma in factors])
    assert torch.equal(merged(x), MergedEdit([edit(sae, {3: min(factors)})])(x))


@pytest.mark.parametrize("split", [[{3: -0.5}, {3: 2.5}], [{3: 2.5}, {3: -0.5}]])
def test_of_factors_equally_far_from_one_the_lower_holds(split):
    assert merge_rules({f: Rule(gamma) for f, gamma in gammas.items()} for gammas in split) == {3: (Rule(-0.5),)}


def test_the_same_feature_of_two_saes_is_no_contradiction():
    assert not MergedEdit([edit(make_sae(), {3: -0.5}), edit(make_sae(), {3: 0.0})]).is_null


def test_keeping_and_dropping_the_error_at_once_is_an_error():
    sae = make_sae()
    with pytest.raises(EditError, match="preserve_error"):
        MergedEdit([edit(sae, {1: 0.0}, True), edit(sae, {2: 0.0}, False)])


@pytest.mark.parametrize("other", ["an SAE", "a projection"])
def test_dropping_the_error_merges_with_its_own_sae_only(other):
    rival = edit(make_sae(), {1: 0.0}, False) if other == "an SAE" else projection(torch.eye(D_IN)[:1])
    with pytest.raises(EditError, match="preserve_error"):
        MergedEdit([edit(make_sae(), {1: 0.0}, False), rival])


def test_edits_of_different_tokens_at_one_place_are_an_error():
    sae = make_sae()
    with pytest.raises(EditError, match="all, patches"):
        MergedEdit([edit(sae, {1: 0.0}), edit(sae, {2: 0.0}, tokens="all")])


# The dense rival. ----------------------------------------------------------------------------------------------------


def basis(seed, r):
    """`r` orthonormal rows."""
    return torch.linalg.qr(torch.randn(D_IN, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q.T


def projection(directions_rd, center=None):
    center = torch.zeros(D_IN, dtype=directions_rd.dtype) if center is None else center
    return Edit("patches", projections=(Projection(directions_rd, directions_rd, center),))


@given(seed=seeds, r=st.integers(1, 6))
def test_projecting_sets_the_component_to_the_centres_and_nothing_else(seed, r):
    v, x, center = basis(seed, r), acts(seed), acts(seed + 1)[0, 0]
    out = project_out(x, v, v, v @ center)
    torch.testing.assert_close(out @ v.T, (center @ v.T).expand(3, 5, r))
    torch.testing.assert_close(out - out @ v.T @ v, x - x @ v.T @ v)
    torch.testing.assert_close(project_out(out, v, v, v @ center), out)
    torch.testing.assert_close(MergedEdit([projection(v, center)])(x), out)


@given(seed=seeds, r=st.integers(1, 5), data=st.data())
def test_projections_unite_in_any_order_and_repetition(seed, r, data):
    v, x = basis(seed, r), acts(seed)
    parts = [projection(row[None]) for row in v]
    mixed = projection((v.sum(0) / r**0.5)[None])  # within the span of the others
    order = data.draw(st.permutations([*parts, *parts[:2], mixed]))
    torch.testing.assert_close(MergedEdit(order)(x), project_out(x, v, v, torch.zeros(r, dtype=x.dtype)))


@given(seed=seeds, n=st.integers(1, 4), data=st.data())
def test_every_projection_of_several_reaches_its_own_centre(seed, n, data):
    """Neither orthogonal to each other nor orthogonal projections themselves."""
    draw = torch.Generator().manual_seed(seed)
    left, right, centers = (torch.randn(n, D_IN, generator=draw, dtype=torch.float64) for _ in range(3))
    right = right / (left * right).sum(1, keepdim=True)  # R Lᵀ = 1
    edits = [
        Edit("patches", projections=(Projection(one[None], other[None], center),))
        for one, other, center in zip(left, right, centers, strict=True)
    ]
    out = MergedEdit(data.draw(st.permutations([*edits, edits[0]])))(acts(seed))
    torch.testing.assert_close(out @ right.T, (right * centers).sum(1).expand(3, 5, n), rtol=1e-5, atol=1e-5)
    written = (out - acts(seed)).flatten(0, 1).T
    torch.testing.assert_close(left.T @ torch.linalg.lstsq(left.T, written).solution, written, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_projection_and_a_feature_edit_add_up_in_any_order():
    sae, x = make_sae(dtype="float64"), acts(0)
    edits = [edit(sae, {1: -0.5, 2: 0.0}), projection(basis(3, 2))]
    alone = [MergedEdit([e])(x) - x for e in edits]
    for order in (edits, edits[::-1]):
        torch.testing.assert_close(MergedEdit(order)(x), x + alone[0] + alone[1])
