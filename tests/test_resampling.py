import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sauce_hooks import TokenPolicy, train_sae
from sauce_hooks.errors import PresetError
from sauce_hooks.sae import PRESETS, Preset
from sauce_hooks.sae.inference import build, for_inference
from sauce_hooks.sae.presets import RESAMPLED
from sauce_hooks.sae.resampling import draw_inputs, resample_dead
from sauce_hooks.sae.statistics import feature_stats
from tiny import model_inputs

WIDTH = 6
FEATURE_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "b_gate": 0, "b_mag": 0, "r_mag": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(recipe, d_in, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(recipe, d_in)


def begun(architecture, seed, **options):
    """A training SAE with random weights and an Adam that has made a step, so that it remembers something of each."""
    sae = seeded(Preset(architecture, 3, TokenPolicy(), options), WIDTH, seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for parameter in sae.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator(seed)))
        parameter.grad = torch.randn(parameter.shape, generator=generator(seed + 1))
    optimizer.step()
    return sae, optimizer


def content(sae, optimizer):
    """Every weight and everything the optimiser remembers of it, by name; a copy."""
    return {
        (name, key): value.detach().clone()
        for name, parameter in sae.named_parameters()
        for key, value in {"weight": parameter, **optimizer.state[parameter]}.items()
    }


# Which inputs are drawn. ---------------------------------------------------------------------------------------------


def test_rows_are_drawn_in_proportion_to_their_loss_squared():
    x, errors = torch.arange(4.0)[:, None], torch.tensor([0.0, 1.0, 2.0, 3.0])
    draws = torch.cat([draw_inputs(x, errors, 1, one) for one in [generator(1)] for _ in range(1000)])
    shares = draws.flatten().long().bincount(minlength=4) / 1000
    torch.testing.assert_close(shares, torch.tensor([0.0, 1.0, 4.0, 9.0]) / 14, atol=0.05, rtol=0)


@given(
    errors=st.lists(st.sampled_from([0.0, 1e-30, 0.5, 3.0, 1e30]), min_size=1, max_size=12),
    n_dead=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_no_row_is_drawn_twice_nor_one_without_loss(errors, n_dead, seed):
    errors = torch.tensor(errors)
    drawn = draw_inputs(torch.arange(len(errors))[:, None].float(), errors, n_dead, generator(seed)).flatten().long()
    assert len(drawn.unique()) == len(drawn)
    assert (errors[drawn] > 0).all()
    visible = errors / errors.max().clamp_min(1e-38) > 1e-20  # the rest can't be seen beside the largest, squared
    assert min(n_dead, int(visible.sum())) <= len(drawn) <= min(n_dead, int((errors > 0).sum()))


@given(seed=st.integers(0, 1000), stretch=st.floats(1e-3, 1e3))
def test_the_unit_of_the_loss_does_not_matter(seed, stretch):
    x, errors = torch.randn(20, 3, generator=generator(seed)), torch.rand(20, generator=generator(seed)).double()
    assert torch.equal(draw_inputs(x, errors, 5, generator(seed)), draw_inputs(x, errors * stretch, 5, generator(seed)))


# What becomes of an SAE. ---------------------------------------------------------------------------------------------

cases = {
    "architecture": st.sampled_from(RESAMPLED),
    "seed": st.integers(0, 1000),
    "dead": st.lists(st.booleans(), min_size=3 * WIDTH, max_size=3 * WIDTH).map(torch.tensor),
    "n": st.integers(1, 30),
    "centred": st.booleans(),
}


@given(**cases)
def test_features_alive_keep_their_weights_and_moments_to_the_bit(architecture, seed, dead, n, centred):
    sae, optimizer = begun(architecture, seed, apply_b_dec_to_input=centred)
    before = content(sae, optimizer)
    done = resample_dead(sae, optimizer, dead, torch.randn(n, WIDTH, generator=generator(seed)), generator(seed))
    assert done == min(n, int(dead.sum()))
    restarted = dead & (dead.cumsum(0) <= done)
    for (name, key), value in content(sae, optimizer).items():
        old = before[name, key]
        if name in FEATURE_AXIS and value.ndim:
            old, value = (t.movedim(FEATURE_AXIS[name], 0) for t in (old, value))
            if key != "weight":
                assert (value[restarted] == 0).all()
            old, value = old[~restarted], value[~restarted]
        assert torch.equal(old, value), (name, key)


@given(**cases)
def test_restarted_features_lie_along_inputs_of_their_own_and_fire_on_them(architecture, seed, dead, n, centred):
    sae, optimizer = begun(architecture, seed, apply_b_dec_to_input=centred)
    old = copy.deepcopy(sae)
    x = torch.randn(n, WIDTH, generator=generator(seed))
    done = resample_dead(sae, optimizer, dead, x, generator(seed))
    features = dead.nonzero().flatten()[:done]
    rows = sae.W_dec.detach()[features]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(done))
    seen = x - sae.b_dec.detach() * centred
    cosine = rows @ torch.nn.functional.normalize(seen, dim=1).T
    value, own = cosine.max(1) if done else (torch.ones(0), torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(value, torch.ones(done))
    assert len(own.unique()) == done
    if architecture == "matching_pursuit":
        return  # only the best-fitting feature fires, and another's row may be longer than one
    z = sae.encode(x).detach()
    assert (z[own, features] > 0).all()
    length = (old.W_enc.norm(dim=0) * old.W_dec.norm(dim=1))[~dead if not dead.all() else slice(None)].mean().detach()
    torch.testing.assert_close(sae.W_enc.detach()[:, features], 0.2 * length * rows.T)
    # Not more than that: z is 0.2 times the mean length times the length of the input.
    torch.testing.assert_close(z[own, features], 0.2 * length * seen[own].norm(dim=1))


def test_a_restarted_feature_of_matching_pursuit_fires_on_its_input():
    sae = seeded(Preset("matching_pursuit", 3, TokenPolicy()), WIDTH, 0)  # rows of norm one, as training holds them, nearly
    x = torch.randn(8, WIDTH, generator=generator())
    dead = torch.arange(3 * WIDTH) < 8
    assert resample_dead(sae, torch.optim.Adam(sae.parameters()), dead, x, generator()) == 8
    assert ((sae.encode(x) > 0)[:, :8].sum(0) > 0).all()


@given(architecture=st.sampled_from(RESAMPLED), seed=st.integers(0, 1000))
def test_the_generator_decides_all_of_it(architecture, seed):
    x, dead = torch.randn(20, WIDTH, generator=generator(seed)), torch.arange(3 * WIDTH) % 3 == 0
    states = torch.get_rng_state()
    results = []
    for draw in (seed, seed, seed + 1):
        sae, optimizer = begun(architecture, seed)
        resample_dead(sae, optimizer, dead, x, generator(draw))
        results.append(sae.W_dec.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(states, torch.get_rng_state())


@pytest.mark.parametrize("architecture", RESAMPLED)
def test_an_optimiser_without_memory_and_a_batch_without_loss_are_no_trouble(architecture):
    sae = seeded(Preset(architecture, 3, TokenPolicy()), WIDTH, 0)
    for name, parameter in sae.named_parameters():
        parameter.data.add_(0.5 * (name in ("b_enc", "b_gate", "b_mag")))  # so that b_dec itself is not reconstructed
    optimizer = torch.optim.Adam(sae.parameters())
    everything = torch.ones(3 * WIDTH, dtype=torch.bool)
    assert resample_dead(sae, optimizer, ~everything, torch.ones(4, WIDTH), generator()) == 0
    at_center = sae.b_dec.detach().expand(4, WIDTH)  # no direction to take
    assert resample_dead(sae, optimizer, everything, at_center, generator()) == 0
    assert resample_dead(sae, optimizer, everything, torch.ones(4, WIDTH), generator()) == 4
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


# What it is good for. ------------------------------------------------------------------------------------------------


def clustered(n, d_in, n_clusters, seed):
    """Rows around directions of their own, one or two at a time, with a little noise."""
    centers = torch.nn.functional.normalize(torch.randn(n_clusters, d_in, generator=generator(0)), dim=1)
    which = torch.randint(n_clusters, (n, 2), generator=generator(seed))
    strength = 4 + torch.rand(n, 2, generator=generator(seed + 1))
    strength[:, 1] *= torch.rand(n, generator=generator(seed + 2)) < 0.5
    return (strength[:, :, None] * centers[which]).sum(1) + 0.05 * torch.randn(n, d_in, generator=generator(seed + 3))


def trained(architecture, options, resample_every, steps=200, d_in=24, batch=128):
    """What is left after `steps` of SAE-Lens's trainer, nine features in ten born dead."""
    rows, draws = clustered(8192, d_in, 48, 1), generator(7)
    sae = seeded(Preset(architecture, 4, TokenPolicy(), options), d_in, 0)
    born_dead = torch.arange(sae.cfg.d_sae) % 10 != 0
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("b_enc", "b_gate"):
                parameter[born_dead] = -100.0
            if name == "W_dec" and architecture == "matching_pursuit":
                parameter[born_dead] *= 1e-3
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=3e-3,
        lr_end=3e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        device="cpu",
        dead_feature_window=15,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))
    restarted = 0
    for step in range(1, steps + 1):
        x = rows[torch.randint(len(rows), (batch,), generator=draws)]
        trainer.step(x)
        trainer.n_training_steps += 1
        if resample_every and step % resample_every == 0 and step < 0.7 * steps:
            dead = trainer.dead_neurons
            restarted += resample_dead(trainer.sae, trainer.optimizer, dead, x, draws)
            trainer.n_forward_passes_since_fired[dead] = 0
    return feature_stats(for_inference(sae, 1.0), [clustered(4096, d_in, 48, 99)]), restarted


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("sauce", {"l1_coefficient": 0.5}),
        ("standard", {"l1_coefficient": 0.5}),
        ("gated", {"l1_coefficient": 0.5}),
        ("matching_pursuit", {"max_iterations": 3}),
    ],
)
def test_resampling_wins_back_what_dead_features_cost(architecture, options):
    without, _ = trained(architecture, options, 0)
    with_, restarted = trained(architecture, options, 30)
    print([(architecture, round(s.explained_variance, 3), round(s.dead_share, 3), round(s.l0, 2)) for s in (without, with_)])
    assert restarted > 0
    assert without.dead_share > 0.5
    assert with_.dead_share < 0.5 * without.dead_share
    assert with_.explained_variance > without.explained_variance + 0.05


# As a preset asks for it. --------------------------------------------------------------------------------------------

IMAGES = [{"pixel_values": model_inputs(8, seed=i)["pixel_values"]} for i in range(8)]


KILLING = {"l1_coefficient": 100.0}
"""A penalty under which features die within a few steps."""


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("sauce", KILLING), ("standard", KILLING), ("gated", KILLING), ("matching_pursuit", {"max_iterations": 1})],
)
def test_training_restarts_what_is_dead_when_asked(model, architecture, options):
    tokens = TokenPolicy(read="last", edit="patches")
    recipe = Preset(architecture, 4, tokens, options, lr=0.05, batch_size=16, epochs=6, dead_after=1)

    def weights(**changes):
        return train_sae(model, IMAGES, preset=replace(recipe, **changes), progress=False).sae.W_dec

    assert torch.equal(weights(), weights(resample_every=10_000))
    assert not torch.equal(weights(), weights(resample_every=5))
    assert torch.equal(weights(resample_every=5), weights(resample_every=5))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "abstopk", "matryoshka_batchtopk", "jumprelu"])
def test_resampling_where_the_loss_itself_reaches_dead_features_is_an_error(architecture):
    with pytest.raises(PresetError, match=rf"resample_every=100 is not for '{architecture}'.*sauce"):
        replace(PRESETS["batchtopk"], architecture=architecture, resample_every=100)
