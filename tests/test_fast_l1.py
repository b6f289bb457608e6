"""The five-product L1 step against SAE-Lens's own: losses, gradients, 200 steps, the trainer's accounts."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sauce_hooks.sae import fast_l1
from sauce_hooks.sae.fast_l1 import FastL1TrainingSAE, use_fused_adam

WAYS = {"dense": -1.0, "sparse": 2.0}
"""`sparse_below` that makes every batch go one way."""
BOTH_WAYS = pytest.mark.parametrize("way", WAYS)


def build(sae_class, way="dense", seed=0, d_in=6, d_sae=20, shift=0.0, dtype="float64", **config):
    sae = sae_class(StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, dtype=dtype, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.add_(shift)
    sae.sparse_below = WAYS[way]
    return sae


def data(rows, d_in=6, seed=1, dtype=torch.float64):
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward(sae, x, alpha=0.3):
    return sae.training_forward_pass(
        step_input=TrainStepInput(
            sae_in=x, coefficients={"l1": alpha}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
    )


def assert_same_step(one, other, x, alpha=0.3, **tolerance):
    """Loss, its parts, everything else in the output, and all gradients."""
    outputs = [forward(sae, x, alpha) for sae in (one, other)]
    for output in outputs:
        output.loss.backward()
    for name in ("loss", "sae_in", "sae_out", "feature_acts", "hidden_pre"):
        values = [getattr(output, name).detach() for output in outputs]
        torch.testing.assert_close(*values, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert list(outputs[0].losses) == list(outputs[1].losses)
    for name in outputs[0].losses:
        torch.testing.assert_close(outputs[0].losses[name], outputs[1].losses[name], **tolerance)
    for (name, parameter), twin in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, twin.grad, **tolerance, msg=lambda text, name=name: f"grad of {name}: {text}"
        )
        assert twin.grad.stride() == twin.stride()


# One step. -----------------------------------------------------------------------------------------------------------


class Losses(torch.nn.Module):
    """The losses as a function of the parameters."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return tuple(forward(self.sae, x).losses.values())


@BOTH_WAYS
@pytest.mark.parametrize("config", [{}, {"apply_b_dec_to_input": False}], ids=["b_dec", "no b_dec"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_the_gradients_are_those_of_finite_differences(way, config, seed):
    sae, x = build(FastL1TrainingSAE, way, seed, d_in=3, d_sae=7, **config), data(4, 3, seed + 1)
    assume(forward(sae, x).hidden_pre.abs().min() > 1e-3)  # away from where relu has none
    names = list(dict(sae.named_parameters()))

    def losses(*values):
        return torch.func.functional_call(Losses(sae), {f"sae.{n}": v for n, v in zip(names, values, strict=True)}, (x,))

    assert torch.autograd.gradcheck(losses, tuple(p.detach().clone().requires_grad_() for p in sae.parameters()))


@given(
    way=st.sampled_from(list(WAYS)),
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    d_in=st.integers(1, 7),
    d_sae=st.integers(1, 40),
    alpha=st.floats(0, 5),
    shift=st.sampled_from([0.0, -2.0, 4.0, -1e6]),
    subtract=st.booleans(),
)
@settings(max_examples=200)
def test_the_step_is_sae_lens_own(way, seed, rows, d_in, d_sae, alpha, shift, subtract):
    sizes = {"seed": seed, "d_in": d_in, "d_sae": d_sae, "shift": shift, "apply_b_dec_to_input": subtract}
    theirs, ours = build(StandardTrainingSAE, **sizes), build(FastL1TrainingSAE, way, **sizes)
    assert_same_step(theirs, ours, data(rows, d_in, seed + 1), alpha, rtol=1e-10, atol=1e-9)


@BOTH_WAYS
def test_in_single_precision_the_step_is_equal_within_rounding(way):
    sizes = {"d_in": 32, "d_sae": 256, "dtype": "float32", "shift": -4.0}
    theirs, ours = build(StandardTrainingSAE, **sizes), build(FastL1TrainingSAE, way, **sizes)
    assert_same_step(theirs, ours, data(64, 32, dtype=torch.float32), rtol=1e-4, atol=1e-3)


@BOTH_WAYS
def test_rows_of_another_dtype_than_the_sae(way):
    theirs, ours = build(StandardTrainingSAE, dtype="float32"), build(FastL1TrainingSAE, way, dtype="float32")
    outputs = [forward(sae, data(5, dtype=torch.bfloat16)) for sae in (theirs, ours)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)


@BOTH_WAYS
def test_a_decoder_row_of_norm_zero_has_a_gradient(way):
    theirs, ours = build(StandardTrainingSAE, shift=2.0), build(FastL1TrainingSAE, way, shift=2.0)
    for sae in (theirs, ours):
        sae.W_dec.data[3] = 0
    assert_same_step(theirs, ours, data(5))


@BOTH_WAYS
def test_nan_is_not_hidden(way):
    x = data(5)
    x[2, 1] = torch.nan
    assert forward(build(FastL1TrainingSAE, way), x).loss.isnan()


@BOTH_WAYS
def test_gradients_add_up_over_two_batches(way):
    sae = build(FastL1TrainingSAE, way)
    for seed in (1, 2):
        forward(sae, data(5, seed=seed)).loss.backward()
    both, parts = sae.W_enc.grad.clone(), []
    for seed in (1, 2):
        sae.zero_grad()
        forward(sae, data(5, seed=seed)).loss.backward()
        parts.append(sae.W_enc.grad)
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_five_products_where_sae_lens_makes_six():
    flops = {}
    for sae in (build(StandardTrainingSAE), build(FastL1TrainingSAE)):
        counter = FlopCounterMode(display=False)
        with counter:
            forward(sae, data(50)).loss.backward()
        flops[type(sae)] = counter.get_total_flops() / (2 * 50 * 6 * 20)
    assert flops[StandardTrainingSAE] == pytest.approx(6, abs=0.05)
    assert flops[FastL1TrainingSAE] == pytest.approx(5, abs=0.05)


def test_a_batch_goes_the_sparse_way_when_few_features_are_active(monkeypatch):
    went = []
    monkeypatch.setattr(fast_l1._Sparse, "of", lambda z, real=fast_l1._Sparse.of: (went.append(1), real(z))[1])
    for shift, expected in ((0.0, 0), (-1e6, 1)):
        sae = build(FastL1TrainingSAE, shift=shift)
        del sae.sparse_below
        forward(sae, data(9))
        assert len(went) == expected


# Under autocast. -----------------------------------------------------------------------------------------------------


BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def measured(sae, x, low=False, around_backward=False):
    """x̂, the losses and all gradients, in float64."""
    with torch.autocast(**BF16, enabled=low):
        output = forward(sae, x)
        if around_backward:
            output.loss.backward()
    if not around_backward:
        output.loss.backward()
    values = {"x_hat": output.sae_out.detach(), **output.losses, **{n: p.grad for n, p in sae.named_parameters()}}
    assert all(value.dtype == x.dtype for value in values.values())
    return {name: value.detach().double() for name, value in values.items()}


@pytest.mark.parametrize("around_backward", [False, True], ids=["forward", "forward and backward"])
@given(seed=st.integers(0, 10_000), shift=st.sampled_from([0.0, -4.0]), subtract=st.booleans())
@settings(max_examples=20)
def test_autocast_costs_no_more_exactness_than_sae_lens_pays(around_backward, seed, shift, subtract):
    sizes = {"seed": seed, "d_in": 32, "d_sae": 256, "shift": shift, "apply_b_dec_to_input": subtract}
    exact = measured(build(StandardTrainingSAE, **sizes), data(64, 32, seed + 1))
    x = data(64, 32, seed + 1, dtype=torch.float32)
    theirs = measured(build(StandardTrainingSAE, dtype="float32", **sizes), x, True, around_backward)
    ours = measured(build(FastL1TrainingSAE, dtype="float32", **sizes), x, True, around_backward)
    for name, value in exact.items():
        off, their_off = ((one[name] - value).norm() / value.norm() for one in (ours, theirs))
        assert off < 1.5 * their_off + 3e-4, f"{name}: {off:.2g}, SAE-Lens {their_off:.2g}"


def test_gradients_do_not_depend_on_whether_the_backward_pass_is_under_autocast_too():
    x = data(64, 32, dtype=torch.float32)
    out, inside = (
        measured(build(FastL1TrainingSAE, d_in=32, d_sae=256, dtype="float32"), x, True, around) for around in (False, True)
    )
    assert all(torch.equal(out[name], inside[name]) for name in out)


def test_autocast_leaves_double_precision_alone():
    theirs, ours = build(StandardTrainingSAE), build(FastL1TrainingSAE)
    with torch.autocast(**BF16):
        assert_same_step(theirs, ours, data(5), rtol=1e-10, atol=1e-9)


class Made(TorchDispatchMode):
    """The dtypes of products, and of all tensors of so many entries."""

    def __init__(self, entries):
        super().__init__()
        self.entries, self.products, self.large = entries, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                self.products.append(out.dtype)
            if out.numel() == self.entries:
                self.large.add(out.dtype)
        return out


def test_under_autocast_all_products_and_all_that_is_as_large_as_z_are_low_precision():
    x = data(50, dtype=torch.float32)
    made = {}
    for sae in (build(StandardTrainingSAE, dtype="float32"), build(FastL1TrainingSAE, dtype="float32")):
        with Made(50 * 20) as made[type(sae)]:
            measured(sae, x, True)
    assert made[StandardTrainingSAE].products == [torch.bfloat16] * 6
    assert torch.float32 in made[StandardTrainingSAE].large
    assert made[FastL1TrainingSAE].products == [torch.bfloat16] * 5
    assert made[FastL1TrainingSAE].large == {torch.bfloat16}


def test_200_steps_under_autocast_give_sae_lens_curve():
    curves = []
    for sae_class in (TheirUnitRows, OurUnitRows):
        sae = build(sae_class, d_in=16, d_sae=64, dtype="float32", shift=-6.0, l1_coefficient=0.3, l1_warm_up_steps=50)
        curves.append(learn(trainer_of(sae, 32, fused=True, autocast=True), 16, 32, torch.float32))
    assert curves[0][-10:].mean() < 0.5 * curves[0][:10].mean()
    torch.testing.assert_close(*curves, rtol=2e-2, atol=0)


# What it does not stand for. -----------------------------------------------------------------------------------------


class OtherPenalty(FastL1TrainingSAE):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": feature_acts.pow(2).sum()}


class OtherActivation(FastL1TrainingSAE):
    def get_activation_fn(self):
        return torch.nn.SiLU()


@pytest.mark.parametrize(
    ("sae_class", "config"),
    [
        (FastL1TrainingSAE, {"lp_norm": 2.0}),
        (FastL1TrainingSAE, {"normalize_activations": "layer_norm"}),
        (FastL1TrainingSAE, {"normalize_activations": "constant_norm_rescale"}),
        (OtherPenalty, {}),
        (OtherActivation, {}),
    ],
)
def test_what_is_not_covered_goes_sae_lens_way(sae_class, config):
    their_class = type(
        "Theirs", (StandardTrainingSAE,), {k: v for k, v in vars(sae_class).items() if k.startswith(("c", "g"))}
    )
    theirs, ours = build(their_class, **config), build(sae_class, **config)
    assert_same_step(theirs, ours, data(5), rtol=0, atol=0)
    assert forward(ours, data(5)).feature_acts.grad_fn is not None


def test_a_hook_of_sae_lens_is_heard():
    sae, heard = build(FastL1TrainingSAE), []
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: heard.append(acts.shape))
    forward(sae, data(5))
    assert heard == [(5, 20)]
    sae.reset_hooks()
    forward(sae, data(5))
    assert len(heard) == 1


def test_another_loss_goes_sae_lens_way():
    sae = build(FastL1TrainingSAE, dtype="float32")
    step = TrainStepInput(data(5, dtype=torch.float32), {"l1": 0.3}, None, 0, False)
    assert sae.is_covered(step)
    sae.mse_loss_fn = lambda out, x: (out - x).abs()
    assert not sae.is_covered(step)


# With SAE-Lens's trainer. --------------------------------------------------------------------------------------------


class UnitRows:
    """Decoder rows held at norm one, as in the paper's objective."""

    def training_forward_pass(self, step_input):
        with torch.no_grad():
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        return super().training_forward_pass(step_input)


class TheirUnitRows(UnitRows, StandardTrainingSAE):
    pass


class OurUnitRows(UnitRows, FastL1TrainingSAE):
    pass


def trainer_of(sae, rows, fused=False, autocast=False):
    config = SAETrainerConfig(
        total_training_samples=200 * rows,
        train_batch_size_samples=rows,
        lr=3e-3,
        lr_end=3e-4,
        lr_warm_up_steps=10,
        lr_decay_steps=40,
        dead_feature_window=20,
        feature_sampling_window=70,
        device=str(sae.device),
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    if fused:
        use_fused_adam(trainer)
    return trainer


def learn(trainer, d_in, rows, dtype, steps=200):
    """The losses of training on sparse sums of fixed directions."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(2 * d_in, d_in, generator=generator, dtype=torch.float64)
    curve = []
    for _ in range(steps):
        trainer.maybe_reset_sparsity()
        codes = torch.rand(rows, 2 * d_in, generator=generator, dtype=torch.float64)
        x = ((codes > 0.9) * codes) @ directions + 3
        curve.append(trainer.step(x.to(dtype)).loss.item())
        trainer.n_training_steps += 1
    return torch.tensor(curve)


@BOTH_WAYS
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", {"rtol": 1e-9, "atol": 0}), ("float32", {"rtol": 2e-3, "atol": 0})]
)
@pytest.mark.parametrize("classes", [(StandardTrainingSAE, FastL1TrainingSAE), (TheirUnitRows, OurUnitRows)])
def test_200_steps_give_the_same_curve_and_the_same_accounts(way, fused, dtype, tolerance, classes):
    trainers, curves = [], []
    for sae_class in classes:
        sae = build(sae_class, way, d_in=16, d_sae=64, dtype=dtype, shift=-6.0, l1_coefficient=0.3, l1_warm_up_steps=50)
        trainers.append(trainer_of(sae, 32, fused and sae_class is classes[1]))
        curves.append(learn(trainers[-1], 16, 32, getattr(torch, dtype)))
    theirs, ours = trainers
    assert curves[0][-10:].mean() < 0.5 * curves[0][:10].mean()
    torch.testing.assert_close(*curves, **tolerance)
    assert 0 < theirs.dead_neurons.sum() < 64  # so that there is something to count
    if dtype == "float64":
        for name in ("act_freq_scores", "n_forward_passes_since_fired", "dead_neurons"):
            assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    for name in ("n_training_samples", "n_frac_active_samples"):
        assert getattr(theirs, name) == getattr(ours, name)


def test_a_step_reads_nothing_back_from_the_device():
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()  # the meta device has nothing to read, so a read cannot pass unseen
    sae = build(OurUnitRows, dtype="float32").to("meta")
    trainer = trainer_of(sae, 8)
    for _ in range(3):
        trainer.step(torch.empty(8, 6, device="meta"))
        trainer.n_training_steps += 1


def test_fused_adam_survives_saving_the_trainer(tmp_path):
    def fresh():
        return trainer_of(build(FastL1TrainingSAE, d_in=16, d_sae=64), 32, fused=True)

    whole, first, second = fresh(), fresh(), fresh()
    learn(whole, 16, 32, torch.float64, steps=20)
    learn(first, 16, 32, torch.float64, steps=20)
    first.save_trainer_state(tmp_path)
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_trainer_state(tmp_path)
    assert second.optimizer.param_groups[0]["fused"]
    for trainer in (whole, second):
        learn(trainer, 16, 32, torch.float64, steps=5)
    assert all(torch.equal(one, other) for one, other in zip(whole.sae.parameters(), second.sae.parameters(), strict=True))
