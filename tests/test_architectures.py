from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput

from sauce_hooks import ConceptEraser, TokenPolicy, VisionSAE, train_sae
from sauce_hooks.erasure import Edit, MergedEdit, Rule
from sauce_hooks.erasure.edit import dense_delta, scaled_change
from sauce_hooks.errors import PresetError
from sauce_hooks.sae import PRESETS, Preset
from sauce_hooks.sae.batchtopk import FromFirstBatchTopKTrainingSAE
from sauce_hooks.sae.inference import build, for_inference
from tiny import D_IN, build_llava, logits, model_inputs

IMAGES = [{"pixel_values": model_inputs(8, seed=i)["pixel_values"]} for i in range(4)]
"""32 images: 512 rows of the patches."""
TOKENS = TokenPolicy(read="patches", edit="patches")
CASES = {
    "sauce": ("sauce", {"l1_coefficient": 0.1}),
    "standard": ("standard", {"l1_coefficient": 0.1}),
    "gated": ("gated", {"l1_coefficient": 0.1}),
    "topk": ("topk", {"k": 4}),
    "topk, free decoder": ("topk", {"k": 4, "rescale_acts_by_decoder_norm": False, "decoder_init_norm": 1.0}),
    "topk, sparse": ("topk", {"k": 4, "use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}),
    "abstopk": ("abstopk", {"k": 4}),
    "batchtopk": ("batchtopk", {"k": 4}),
    "batchtopk, free decoder": ("batchtopk", {"k": 4, "rescale_acts_by_decoder_norm": False, "decoder_init_norm": 1.0}),
    "matryoshka": ("matryoshka_batchtopk", {"k": 4}),
    "matryoshka, by level": (
        "matryoshka_batchtopk",
        {"k": 4, "use_matryoshka_aux_loss": True, "matryoshka_widths": [8, 64]},
    ),
    "jumprelu": ("jumprelu", {"l0_coefficient": 0.01}),
    "jumprelu, quadratic": ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 8, "l0_coefficient": 0.1}),
    "jumprelu, tanh": ("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": 0.1}),
    "matching pursuit": ("matching_pursuit", {"max_iterations": 4}),
    "matching pursuit, to a residual": ("matching_pursuit", {"residual_threshold": 2.0, "max_iterations": 8}),
    "not centred": ("standard", {"l1_coefficient": 0.1, "apply_b_dec_to_input": False}),
    "matching pursuit, not centred": ("matching_pursuit", {"max_iterations": 4, "apply_b_dec_to_input": False}),
}
FREE = {"topk, free decoder", "topk, sparse", *(name for name in CASES if name.startswith("matching pursuit"))}
"""Whose decoder rows can't be brought to norm one without changing which features fire."""


def recipe(name, **changes):
    architecture, options = CASES[name]
    return replace(Preset(architecture, 2, TOKENS, options, lr=3e-3, batch_size=64, epochs=1), **changes)


@cache
def tower():
    return build_llava()


@cache
def trained(name, normalize, epochs):
    return train_sae(tower(), IMAGES, preset=recipe(name, normalize=normalize, epochs=epochs), progress=False)


def test_all_that_sae_lens_can_train_is_tried_here():
    assert {architecture for architecture, _ in CASES.values()} == {"sauce", *SAE_TRAINING_CLASS_REGISTRY}


# Training, saving, erasing. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_learns(name, normalize):
    short, long = (trained(name, normalize, epochs) for epochs in (1, 12 if normalize else 6))
    assert long.stats.explained_variance > max(0.2, short.stats.explained_variance + 0.02)
    norms = long.sae.W_dec.norm(dim=1)
    if name not in FREE:
        torch.testing.assert_close(norms, torch.ones(2 * D_IN))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_it_encodes_equally(name, normalize, tmp_path):
    sae = trained(name, normalize, 1)
    sae.save(tmp_path / "sae")
    x = 5 * torch.randn(50, D_IN, generator=torch.Generator().manual_seed(3))
    z = sae.encode(x)
    assert z.count_nonzero() > 0
    for other in (VisionSAE.load(tmp_path / "sae"), SAE.load_from_disk(tmp_path / "sae")):
        with torch.no_grad():
            assert torch.equal(other.encode(x), z)
            assert torch.equal(other.decode(z), sae.decode(z))


def strongest(sae, x, n=2):
    """Features that really fire on x."""
    return [int(f) for f in sae.encode(x).abs().sum(tuple(range(x.ndim - 1))).topk(n).indices]


@pytest.mark.parametrize("name", CASES)
def test_an_eraser_changes_the_answer_and_leaves_no_trace(name):
    model, sae = tower(), trained(name, True, 12)
    features = strongest(sae, 5 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)), 8)
    before = logits(model)
    with ConceptEraser(model, sae, [features]):
        erased = logits(model)
    assert not torch.equal(erased, before)
    with ConceptEraser(model, sae, [features], gamma=1):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 1000), gamma=st.sampled_from([-0.5, 0.0, 0.5, 3.0]))
@settings(max_examples=5)
def test_what_an_eraser_adds_is_the_features_share_of_the_reconstruction(name, seed, gamma):
    sae = trained(name, True, 12).sae.requires_grad_(False)
    x = 5 * torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(seed))
    chosen = strongest(sae, x, 3)
    edit = MergedEdit([Edit("all", sae, dict.fromkeys(chosen, (Rule(gamma),)))])
    changed = edit(x)
    z = sae.encode(x)
    shares = sae.W_dec[chosen]
    torch.testing.assert_close(changed - x, (gamma - 1) * z[..., chosen] @ shares, atol=1e-4, rtol=1e-4)
    factors = torch.full((3,), gamma)
    torch.testing.assert_close(
        changed, x + dense_delta(x, sae, torch.tensor(chosen), scaled_change(factors)), atol=1e-4, rtol=1e-4
    )
    silent = (z[..., chosen] == 0).all(-1)
    assert torch.equal(changed[silent], x[silent])
    alone = torch.cat([edit(row[None]) for row in x])
    torch.testing.assert_close(alone, changed, atol=1e-4, rtol=1e-4)
    assert edit(x.bfloat16()).dtype == torch.bfloat16


# From training to inference. -----------------------------------------------------------------------------------------


def drawn(name, seed, d_in=7, **options):
    """A training SAE in float64 with every weight random, as at the start of a training step."""
    architecture, own = CASES[name]
    own = {**own, "dtype": "float64", **options}
    if "matryoshka_widths" in own:
        own["matryoshka_widths"] = [2, 3 * d_in]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = build(Preset(architecture, 3, TOKENS, own), d_in)
        with torch.no_grad():
            for parameter_name, parameter in sae.named_parameters():
                if parameter_name == "threshold":
                    parameter.copy_(torch.rand_like(parameter))
                elif architecture == "matching_pursuit" and parameter_name == "W_dec":
                    parameter.mul_(0.8 + 0.4 * torch.rand(len(parameter), 1))  # the pursuit goes astray over longer rows
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            if hasattr(sae, "topk_threshold"):
                sae.topk_threshold.fill_(float(torch.rand(())))
    return sae


def fires_in_training(sae, x):
    """z of a training SAE; where the batch decides in training, by the threshold that takes over from it."""
    if not hasattr(sae, "topk_threshold"):
        z = sae.encode(x)
        return z.to_dense() if z.is_sparse else z
    pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    if sae.cfg.rescale_acts_by_decoder_norm:
        pre = pre * sae.W_dec.norm(dim=1)
    return pre * (pre > sae.topk_threshold.to(torch.float32))  # the units that SAE-Lens saves thresholds in


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.02, 50))
@settings(max_examples=12)
@torch.no_grad()
def test_inference_on_rows_is_training_on_scaled_rows(name, seed, scale):
    sae = drawn(name, seed)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    x = 3 * torch.randn(12, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / scale
    inference, state = for_inference(sae, scale), torch.get_rng_state()
    z_train, z = fires_in_training(sae, scale * x), inference.encode(x)
    assert torch.equal(z != 0, z_train != 0)
    torch.testing.assert_close(inference.decode(z) * scale, sae.decode(z_train), rtol=1e-6, atol=1e-6)
    # In the units of the residual stream, wherever decoder rows have norm one.
    if name not in FREE:
        torch.testing.assert_close(inference.W_dec.norm(dim=1), torch.ones(21, dtype=torch.float64))
        in_training = z_train if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else z_train * sae.W_dec.norm(dim=1)
        torch.testing.assert_close(z * scale, in_training, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@given(seed=st.integers(0, 1000))
@torch.no_grad()
def test_a_threshold_that_the_last_step_left_below_zero_is_zero(seed):
    sae = drawn("jumprelu", seed)
    sae.threshold.sub_(0.5)
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inference = for_inference(sae, 2.0)
    sae.threshold.clamp_(min=0)  # as SAE-Lens does before every step
    assert torch.equal(inference.encode(x) != 0, sae.encode(2 * x) != 0)
    assert (inference.threshold >= 0).all()


def test_inference_leaves_the_random_state_alone():
    sae, state = drawn("standard", 0), torch.get_rng_state()
    for_inference(sae, 2.0)
    assert torch.equal(torch.get_rng_state(), state)


# BatchTopK's threshold. ----------------------------------------------------------------------------------------------


@given(seeds=st.lists(st.one_of(st.none(), st.integers(0, 1000)), min_size=1, max_size=8), rate=st.floats(0.001, 1.0))
@torch.no_grad()
def test_the_threshold_is_sae_lens_running_mean_corrected_for_its_start(seeds, rate):
    ours, theirs = (
        sae_class(BatchTopKTrainingSAEConfig(d_in=4, d_sae=6, k=2, topk_threshold_lr=rate))
        for sae_class in (FromFirstBatchTopKTrainingSAE, BatchTopKTrainingSAE)
    )
    least = []
    for seed in seeds:  # None: a batch on which nothing fires
        acts = torch.zeros(5, 6)
        if seed is not None:
            acts.uniform_(generator=torch.Generator().manual_seed(seed)).round_(decimals=1)
        ours.update_topk_threshold(acts)
        theirs.update_topk_threshold(acts)
        least += [acts[acts > 0].min()] if acts.any() else []
        if least:
            expected = theirs.topk_threshold / (1 - (1 - rate) ** len(least))
            torch.testing.assert_close(ours.topk_threshold, expected)
            assert min(least) - 1e-6 <= ours.topk_threshold <= max(least) + 1e-6
        else:
            assert ours.topk_threshold == 0


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_after_a_short_training_about_k_features_fire(name):
    assert 3 < trained(name, True, 12).stats.l0 < 8.5  # k = 4, 96 steps; 11 with the mean that starts at zero


# Auxiliary losses. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [
        ("topk", "auxiliary_reconstruction_loss", {}),
        ("topk, free decoder", "auxiliary_reconstruction_loss", {}),
        ("abstopk", "auxiliary_reconstruction_loss", {}),
        ("batchtopk", "auxiliary_reconstruction_loss", {}),
        ("matryoshka", "auxiliary_reconstruction_loss", {}),
        ("matryoshka, by level", "auxiliary_reconstruction_loss", {}),
        ("jumprelu", "pre_act_loss", {"pre_act_loss_coefficient": 3e-6}),
    ],
)
def test_an_auxiliary_loss_reaches_dead_features_and_only_those_that_are_called_dead(name, loss, options):
    dead = torch.arange(21) >= 12
    reached = {}
    for known in (False, True):
        sae = drawn(name, 0, **options)
        with torch.no_grad():
            sae.b_enc[dead] = 0.0 if name == "abstopk" else -100.0  # they can't fire
            if name == "abstopk":
                sae.W_enc[:, dead] *= 1e-6
        x = torch.randn(16, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        step = TrainStepInput(
            sae_in=x,
            coefficients={"l0": 0.0},
            dead_neuron_mask=dead if known else ~dead & dead,
            n_training_steps=0,
            is_logging_step=False,
        )
        out = sae.training_forward_pass(step)
        assert not out.feature_acts[:, dead].any()
        out.loss.backward()
        reached[known] = out.losses[loss].item(), sae.W_enc.grad[:, dead].any().item(), sae.b_enc.grad[dead].any().item()
    assert reached[False] == (0.0, False, False)
    assert reached[True][0] > 0
    assert reached[True][1:] == (True, True)


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka"])
def test_a_preset_says_when_a_feature_is_dead_for_them(name):
    long, short = (
        train_sae(tower(), IMAGES, preset=recipe(name, dead_after=n, epochs=2), progress=False).sae.W_dec for n in (1000, 1)
    )
    assert not torch.equal(long, short)


# Presets. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_at_a_small_size(name):
    sae = train_sae(tower(), IMAGES, preset=name, expansion=2, batch_size=32, epochs=2, progress=False)
    assert (sae.d_sae, sae.tokens) == (2 * D_IN, PRESETS[name].tokens)
    assert torch.isfinite(sae.sae.W_dec).all()
    assert sae.stats.l0 > 0


def test_an_unknown_architecture_is_an_error_that_lists_those_there_are():
    with pytest.raises(PresetError, match=r"'magic'.*abstopk.*batchtopk.*gated.*sauce.*standard.*topk"):
        build(Preset("magic", 2, TOKENS), 8)


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("topk", {"kk": 3}, r"'kk'.*'topk'.*\bk, use_sparse_activations, aux_loss_coefficient"),
        ("sauce", {"l0_coefficient": 1.0}, r"'l0_coefficient'.*l1_coefficient"),
        ("standard", {"d_sae": 64}, r"'d_sae'.*l1_coefficient"),
        ("standard", {"normalize_activations": "layer_norm"}, r"'normalize_activations'"),
        ("topk", {}, r"k=100 features of 16"),
        ("topk", {"k": 2, "use_sparse_activations": True}, r"rescale_acts_by_decoder_norm"),
        ("batchtopk", {"k": 0}, r"k=0 features of 16"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic"}, r"'jumprelu'.*target_l0"),
        ("matryoshka_batchtopk", {"k": 2, "matryoshka_widths": [12, 4, 16]}, r"strictly increasing"),
    ],
)
def test_options_that_cannot_be_are_errors_that_say_what_can(architecture, options, says):
    with pytest.raises(PresetError, match=says):
        build(Preset(architecture, 2, TOKENS, options), 8)


def test_one_preset_serves_any_number_of_widths():
    preset = Preset("matryoshka_batchtopk", 2, TOKENS, {"k": 2, "matryoshka_widths": [4]})
    for d_in in (8, 16):
        with pytest.warns(UserWarning, match="final matryoshka level"):
            assert build(preset, d_in).cfg.matryoshka_widths == [4, 2 * d_in]
    assert preset.options["matryoshka_widths"] == [4]
    nested = Preset("matryoshka_batchtopk", 4, TOKENS, {"k": 2})
    assert build(nested, 64).cfg.matryoshka_widths == [8, 24, 56, 120, 256]
    assert build(nested, 1).cfg.matryoshka_widths[-1] == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("expansion", "batch_size", "epochs", "dead_after") for value in (0, -1, True)),
        *((field, value) for field in ("resample_every", "lr_warm_up_steps") for value in (-1, True)),
        *(("lr", value) for value in (0, -1e-3, float("nan"), float("inf"))),
        *(("lr_decay_share", value) for value in (-0.1, 1.1, float("nan"))),
    ],
)
def test_a_preset_that_cannot_be_says_which_field(field, value):
    with pytest.raises(PresetError, match=rf"^{field}="):
        replace(PRESETS["sauce"], **{field: value})


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_after_a_short_training_as_many_features_fire_as_in_training(model, architecture):
    """The threshold is that of the weights as they ended, not a mean over those of the way there."""
    preset = Preset(architecture, 4, TokenPolicy(), {"k": 4}, lr=1e-2, batch_size=64, epochs=4, normalize=True)
    trained = train_sae(model, IMAGES, preset=preset, progress=False)
    assert trained.stats.l0 == pytest.approx(4, abs=0.8)
