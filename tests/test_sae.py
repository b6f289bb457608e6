import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sauce_hooks import Concept, ConceptBank, TokenPolicy, VisionSAE, find_hook_point, read_activations, train_sae
from sauce_hooks.errors import ImagesError, NonFiniteActivationsError, SAEFileError, SAEMismatchError, UnreadableImageWarning
from sauce_hooks.sae import PRESETS, FeatureStats
from sauce_hooks.sae.initialization import geometric_median
from sauce_hooks.sae.objective import SauceTrainingSAE, SauceTrainingSAEConfig
from sauce_hooks.sae.statistics import feature_stats
from tiny import D_IN, D_SAE, make_sae, make_vision_sae, model_inputs, pictures, snapshot, weights

IMAGES = [{"pixel_values": model_inputs(8, seed=i)["pixel_values"]} for i in range(8)]
"""64 images: 64 rows of the last token, 1,024 of the patches."""
SIZES = {
    "sauce": {"expansion": 2, "batch_size": 16, "epochs": 3},
    "batchtopk": {"expansion": 2, "batch_size": 128, "epochs": 2, "options": {"k": 4}},
}
"""What makes a preset small enough for a test; 12 and 16 steps."""


def train(model, preset="sauce", images=IMAGES, **options):
    return train_sae(model, images, preset=preset, progress=False, **{**SIZES[preset], **options})


def encoded(sae, n=50):
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(9))
    return sae.encode(x.to(sae.dtype)) if isinstance(sae, SAE) else sae.encode(x)


def assert_equal(one, other):
    """Two `VisionSAE`s are the same in everything that is saved."""
    assert torch.equal(encoded(one), encoded(other))
    assert torch.equal(one.decode(encoded(one)), other.decode(encoded(other)))
    assert (one.hook_point, one.tokens, one.concepts) == (other.hook_point, other.tokens, other.concepts)
    assert (one.stats is None) == (other.stats is None)
    if one.stats is not None:
        for name, value in vars(one.stats).items():
            found = getattr(other.stats, name)
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found


# The paper's objective. ----------------------------------------------------------------------------------------------


def test_the_sauce_preset_is_the_papers():
    preset = PRESETS["sauce"]
    assert (preset.expansion, preset.lr, preset.batch_size, preset.epochs) == (64, 4e-4, 1024, 2)
    assert (preset.options, preset.b_dec_init, preset.normalize) == (
        {"l1_coefficient": 8e-5},
        "geometric_median",
        False,
    )
    assert (preset.lr_warm_up_steps, preset.lr_decay_share) == (0, 0.0)


def objective(sae, x, alpha):
    step = TrainStepInput(
        sae_in=x, coefficients={"l1": alpha}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    return sae.training_forward_pass(step).loss


def test_the_objective_by_hand():
    sae = SauceTrainingSAE(SauceTrainingSAEConfig(d_in=2, d_sae=2, l1_coefficient=0.5))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.b_enc.copy_(torch.tensor([0.0, -1.0]))
        sae.W_dec.copy_(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))  # brought to the unit vectors
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    # x − b_pre = (2, 3) and (−1, 0), so z = (2, 2) and (0, 0), and x̂ = (3, 2) and (1, 0).
    x = torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    # ‖x − x̂‖² = 1 and 1, ‖z‖₁ = 4 and 0; the mean of 1 + 0.5·4 and 1 is 2.
    assert objective(sae, x, 0.5).item() == pytest.approx(2.0)


@given(seed=st.integers(0, 1000), alpha=st.floats(0, 2), stretch=st.floats(0.1, 10))
def test_the_objective_is_eq3_over_unit_rows_whatever_their_norm_was(seed, alpha, stretch):
    generator = torch.Generator().manual_seed(seed)
    sae = SauceTrainingSAE(SauceTrainingSAEConfig(d_in=5, d_sae=9, l1_coefficient=alpha))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_dec.mul_(stretch)
    x = torch.randn(7, 5, generator=generator)
    z = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    eq3 = ((x - z @ rows - sae.b_dec).pow(2).sum(1) + alpha * z.abs().sum(1)).mean()
    torch.testing.assert_close(objective(sae, x, alpha), eq3)


# The geometric median. -----------------------------------------------------------------------------------------------

points = arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.floats(-8, 8, width=16))


def total_distance(points_nd, point_d):
    return (points_nd.double() - point_d.double()).norm(dim=1).sum()


@given(points=points, seed=st.integers(0, 100))
@settings(max_examples=100)
def test_no_point_near_the_geometric_median_is_closer_to_all(points, seed):
    points = torch.from_numpy(points)
    median = geometric_median(points, iterations=1000)
    steps = torch.randn(64, points.shape[1], generator=torch.Generator().manual_seed(seed))
    scale = 1e-4 + (points - points.mean(0)).norm(dim=1).mean()
    least = min(total_distance(points, median + reach * scale * step) for step in steps for reach in (1e-2, 0.1, 1.0))
    assert total_distance(points, median) <= least + 1e-3 * scale * len(points)


@given(half=points, center=st.floats(-5, 5, width=16))
def test_the_geometric_median_of_a_symmetric_set_is_its_centre(half, center):
    half = torch.from_numpy(half)
    assume(torch.linalg.matrix_rank(half) > 1)  # on a line every point between the middle two is a median
    found = geometric_median(torch.cat([center + half, center - half]), iterations=1000)
    torch.testing.assert_close(found, torch.full_like(found, center), atol=1e-2, rtol=0)


@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), stretch=st.floats(0.1, 10))
def test_the_geometric_median_moves_and_grows_with_the_points(seed, shift, stretch):
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed))
    found = geometric_median(points * stretch + shift, iterations=1000)
    torch.testing.assert_close(found, geometric_median(points, iterations=1000) * stretch + shift, atol=1e-3, rtol=1e-4)


def test_a_mean_that_is_one_of_the_points_does_not_hold_the_iteration_up():
    found = geometric_median(torch.tensor([[-3.0], [0.0], [1.0], [1.0], [1.0]]), iterations=1000)
    assert found.item() == pytest.approx(1.0, abs=1e-2)


def test_one_outlier_moves_the_mean_and_not_the_geometric_median():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    far = torch.cat([points, torch.full((1, 3), 1e4)])
    assert (far.mean(0) - points.mean(0)).norm() > 50
    assert (geometric_median(far) - geometric_median(points)).norm() < 0.1


# Training. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "architecture"), [("sauce", "standard"), ("batchtopk", "jumprelu")])
def test_training_gives_an_sae_of_the_default_place(model, preset, architecture):
    sae = train(model, preset)
    assert isinstance(sae, VisionSAE)
    assert (sae.d_in, sae.d_sae) == (D_IN, 2 * D_IN)
    assert (sae.hook_point, sae.tokens) == (find_hook_point(model), PRESETS[preset].tokens)
    assert (sae.sae.cfg.architecture(), sae.sae.cfg.metadata.hook_name) == (architecture, sae.hook_point.path)
    assert len(sae.concepts) == 0
    torch.testing.assert_close(sae.sae.W_dec.norm(dim=1), torch.ones(2 * D_IN))


@pytest.mark.parametrize("preset", SIZES)
def test_the_statistics_are_those_of_the_rows_it_was_trained_on(model, preset):
    sae = train(model, preset)
    rows = read_activations(model, IMAGES, sae.hook_point, tokens=sae.tokens.read)
    expected = feature_stats(sae.sae, rows)
    assert expected.n_rows == sae.stats.n_rows == (64 if preset == "sauce" else 1024)
    assert torch.equal(sae.stats.frequency_f, expected.frequency_f)
    assert sae.stats.explained_variance == pytest.approx(expected.explained_variance)


@pytest.mark.parametrize("preset", SIZES)
def test_training_learns(model, preset):
    short, long = (train(model, preset, epochs=epochs, lr=3e-3).stats for epochs in (1, 30))
    assert long.explained_variance > max(0.3, short.explained_variance)


def test_batchtopk_fires_k_features_on_average(model):
    sae = train(model, "batchtopk", epochs=30)
    assert 2 < sae.stats.l0 < 8  # the threshold is a running mean, so about 4


def test_place_and_tokens_can_be_chosen(model):
    place, tokens = find_hook_point(model, -3), TokenPolicy(read="class", edit="all")
    sae = train(model, hook_point=place, tokens=tokens)
    assert (sae.hook_point, sae.tokens, sae.stats.n_rows) == (place, tokens, 64)


@pytest.mark.parametrize("preset", SIZES)
def test_the_seed_decides_the_result(model, preset):
    one, same, other = (train(model, preset, seed=seed) for seed in (0, 0, 1))
    assert_equal(one, same)
    assert not torch.equal(one.sae.W_dec, other.sae.W_dec)


def test_training_leaves_model_and_global_random_state_as_they_were(model):
    state, values = snapshot(model), weights(model)
    # Python's own `random` is left out: the run-time type checks of these tests draw from it.
    randomness = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    train(model)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert repr(np.random.get_state()) == randomness[1]  # noqa: NPY002
    assert snapshot(model) == state
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_in_bf16_trains_an_sae_in_fp32(model):
    assert train(model.to(torch.bfloat16)).sae.dtype == torch.float32


def test_pictures_train_as_model_inputs_do(model, processor):
    images = pictures(32)
    inputs = [dict(processor.image_processor(images=[image], return_tensors="pt")) for image in images]
    of_pictures = train(model, images=images, processor=processor, image_batch_size=1)
    assert_equal(of_pictures, train(model, images=inputs))


def test_an_unreadable_image_among_many_is_named_and_left_out(model, processor, tmp_path):
    for i, image in enumerate(pictures(40)):
        image.save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.warns(UnreadableImageWarning, match=r"broken\.png"):
        assert train(model, images=tmp_path, processor=processor).stats.n_rows == 40


def test_a_one_shot_iterator_is_an_error(model):
    with pytest.raises(ImagesError, match="more than once"):
        train(model, images=iter(IMAGES))


def test_too_few_images_are_an_error_that_leaves_nothing(model, tmp_path):
    with pytest.raises(ImagesError, match="batch"):
        train(model, images=IMAGES[:1], epochs=1, out=tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def test_nan_activations_are_an_error_that_leaves_nothing(model, tmp_path):
    with torch.no_grad():
        model.model.vision_tower.pre_layrnorm.weight[0] = torch.nan
    with pytest.raises(NonFiniteActivationsError):
        train(model, out=tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


# Going on with an interrupted training. ------------------------------------------------------------------------------


def interrupt(monkeypatch, owner, name, calls):
    """Makes the call after `calls` calls of a function raise, as Ctrl-C would; those after that go through again."""
    real, left = getattr(owner, name), [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize(("owner", "name", "calls"), [(SAETrainer, "step", 1), (SAETrainer, "step", 7), (torch, "save", 4)])
def test_a_resumed_training_ends_as_an_unbroken_one(model, tmp_path, monkeypatch, preset, owner, name, calls):
    out = tmp_path / "sae"
    with monkeypatch.context() as patched:
        interrupt(patched, owner, name, calls)
        with pytest.raises(KeyboardInterrupt):
            train(model, preset, out=out, checkpoint_every=3)
    steps = []
    monkeypatch.setattr(SAETrainer, "step", lambda *args, real=SAETrainer.step: (steps.append(1), real(*args))[1])
    resumed = train(model, preset, out=out, checkpoint_every=3, resume=True)
    done = {"step": calls - calls % 3, "save": 3}[name]
    assert len(steps) == (12 if preset == "sauce" else 16) - done  # nothing is trained on twice
    monkeypatch.undo()
    assert_equal(resumed, train(model, preset))
    assert_equal(resumed, VisionSAE.load(out))
    assert {path.name for path in (out / "training").iterdir()} == {"settings.json", "metrics.jsonl", "lock"}


def test_an_unfinished_training_is_not_overwritten_unasked(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, SAETrainer, "step", 4)
        with pytest.raises(KeyboardInterrupt):
            train(model, out=tmp_path / "sae", checkpoint_every=2)
    with pytest.raises(SAEFileError, match="resume=True"):
        train(model, out=tmp_path / "sae")


def test_resuming_where_nothing_was_begun_starts(model, tmp_path):
    assert_equal(train(model, out=tmp_path / "sae", resume=True), train(model))


def test_an_unfinished_training_is_no_saved_sae(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, SAETrainer, "step", 4)
        with pytest.raises(KeyboardInterrupt):
            train(model, out=tmp_path / "sae", checkpoint_every=2)
    with pytest.raises(SAEFileError):
        VisionSAE.load(tmp_path / "sae")


# Feature statistics. -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@torch.no_grad()
def test_feature_statistics_are_eq7_and_eq8_however_the_rows_come(seed, sizes):
    sae = make_sae(seed=seed)
    rows = torch.randn(max(2, sum(sizes)), D_IN, generator=torch.Generator().manual_seed(seed))
    sizes[-1] += len(rows) - sum(sizes)
    found = feature_stats(sae, list(rows.split(sizes)))
    z = sae.encode(rows)
    fired = (z > 0).float()
    torch.testing.assert_close(found.frequency_f, fired.mean(0))
    for feature in range(D_SAE):
        active = z[:, feature][z[:, feature] > 0]
        assert found.mean_when_active_f[feature].item() == pytest.approx(
            active.mean().item() if len(active) else 0, rel=1e-4
        )
    left = (rows - sae.decode(z)).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum()
    assert found.explained_variance == pytest.approx(1 - left.item(), rel=1e-3, abs=1e-3)
    assert found.l0 == pytest.approx(fired.sum(1).mean().item())
    assert found.n_rows == len(rows)
    assert found.dead_share == pytest.approx((fired.sum(0) == 0).float().mean().item())


# Saving and loading. -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(model, tmp_path):
    """A `VisionSAE` with everything on it, and the folder it lies in."""
    sae = make_vision_sae(model)
    sae.tokens = TokenPolicy(read="class", edit="all")
    sae.stats = FeatureStats(torch.rand(D_SAE), torch.rand(D_SAE), 0.75, 3.5, 100)
    sae.save(tmp_path / "sae")
    return sae, tmp_path / "sae"


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("standard", {}), ("jumprelu", {}), ("gated", {}), ("topk", {"k": 8}), ("jumprelu", {"dtype": "bfloat16"})],
)
def test_what_is_loaded_equals_what_was_saved(model, tmp_path, architecture, options):
    sae = make_vision_sae(model, architecture, **options)
    sae.save(tmp_path / "deep" / "sae")
    assert_equal(VisionSAE.load(tmp_path / "deep" / "sae"), sae)
    assert_equal(VisionSAE.load(str(tmp_path / "deep" / "sae")), sae)


def test_everything_is_loaded_again(stored):
    assert_equal(VisionSAE.load(stored[1]), stored[0])


def test_sae_lens_loads_it_too(stored):
    assert torch.equal(encoded(SAE.load_from_disk(stored[1])), encoded(stored[0]))


def test_what_training_saved_is_what_it_returned(model, tmp_path):
    for preset in SIZES:
        sae = train(model, preset, out=tmp_path / preset)
        assert_equal(VisionSAE.load(tmp_path / preset), sae)


def test_saving_again_replaces_the_old(model, stored):
    sae, folder = stored
    sae.concepts.add(Concept("green", (8,)))
    sae.stats = None
    sae.save(folder)
    assert_equal(VisionSAE.load(folder), sae)
    assert [path.name for path in folder.parent.iterdir()] == ["sae"]


def test_a_folder_with_other_things_in_it_is_not_touched(stored, tmp_path):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "tiger.txt").write_text("mine")
    with pytest.raises(SAEFileError, match="refusing"):
        stored[0].save(other)
    assert [path.name for path in other.iterdir()] == ["tiger.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "sae"]


def test_saving_keeps_what_else_lies_in_the_folder(stored):
    sae, folder = stored
    (folder / "training" / "000000100").mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    sae.save(folder)
    assert (folder / "training" / "000000100").is_dir()
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fresh", [True, False], ids=["a new folder", "an old folder"])
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [(SAE, "save_model", 0), (ConceptBank, "save", 0), (json, "dumps", 1), *[(os, "replace", n) for n in range(6)],
     *[(os, "rename", n) for n in range(3)]],
)  # fmt: skip
def test_a_save_that_fails_leaves_the_old_or_the_new_and_nothing_between(stored, monkeypatch, fresh, owner, name, calls):
    sae, folder = stored
    target = folder.parent / "new" if fresh else folder
    old = {} if fresh else content(folder)
    other = make_vision_sae_like(sae)
    other.save(folder.parent / "whole")
    new = content(folder.parent / "whole")
    shutil.rmtree(folder.parent / "whole")
    with monkeypatch.context() as patched:
        interrupt(patched, owner, name, calls)
        try:
            other.save(target)
        except KeyboardInterrupt:
            found = content(target) if target.exists() else {}
            assert found in (old, new)
            VisionSAE.load(folder)
        else:
            assert content(target) == new
    assert {path.name for path in folder.parent.iterdir()} <= {"sae", "new"}


def make_vision_sae_like(sae):
    """Another SAE of the same place: other weights, concepts and statistics."""
    stats = FeatureStats(torch.rand(D_SAE), torch.rand(D_SAE), 0.5, 2.0, 7)
    return VisionSAE(make_sae(seed=1), sae.hook_point, TokenPolicy(), ConceptBank([Concept("green", (8,))]), stats)


def edit_json(name: str, change: Callable[[dict], object]):
    def damage(folder: Path):
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    **{
        f"no {name}": lambda folder, name=name: (folder / name).unlink()
        for name in (
            "vision_sae.json",
            "concepts.json",
            "cfg.json",
            "sae_weights.safetensors",
            "feature_stats.safetensors",
        )
    },
    **{
        f"{name} is {what}": overwrite(name, text)
        for name in (
            "vision_sae.json",
            "concepts.json",
            "cfg.json",
            "sae_weights.safetensors",
            "feature_stats.safetensors",
        )
        for what, text in (("empty", b""), ("noise", b"\xff\x00\x01noise"), ("a list", b"[]"), ("an object", b"{}"))
    },
    "a later format": edit_json("vision_sae.json", lambda data: data.update(format=3)),
    "no hook point": edit_json("vision_sae.json", lambda data: data.pop("hook_point")),
    "half a hook point": edit_json("vision_sae.json", lambda data: data["hook_point"].pop("path")),
    "an unknown policy": edit_json("vision_sae.json", lambda data: data["tokens"].update(read="every")),
    "a bank of a later format": edit_json("concepts.json", lambda data: data.update(format=3)),
    "a concept without features": edit_json("concepts.json", lambda data: data["concepts"][0].pop("features")),
    "a concept with a feature twice": edit_json("concepts.json", lambda data: data["concepts"][0].update(features=[1, 1])),
    "an unknown architecture": edit_json("cfg.json", lambda data: data.update(architecture="magic")),
    "weights of another size": edit_json("cfg.json", lambda data: data.update(d_sae=D_SAE + 1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_an_error(stored, damage):
    damage(stored[1])
    with pytest.raises(SAEFileError):
        VisionSAE.load(stored[1])


def test_an_sae_that_does_not_fit_its_own_hook_point_is_an_error(stored):
    edit_json("vision_sae.json", lambda data: data["hook_point"].update(d_in=7))(stored[1])
    with pytest.raises((SAEFileError, SAEMismatchError)):
        VisionSAE.load(stored[1])


@given(data=st.data())
@settings(max_examples=60)
def test_a_file_cut_short_is_an_error(stored, tmp_path_factory, data):
    folder = stored[1]
    copy = tmp_path_factory.mktemp("cut") / "sae"
    shutil.copytree(folder, copy)
    victim = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    whole = (folder / victim).read_bytes()
    (copy / victim).write_bytes(whole[: data.draw(st.integers(0, len(whole.rstrip()) - 1))])
    with pytest.raises(SAEFileError):
        VisionSAE.load(copy)


def test_an_sae_that_is_not_ours_is_an_error_that_says_so(tmp_path):
    make_sae().save_model(tmp_path / "foreign")
    with pytest.raises(SAEFileError, match=r"no saved VisionSAE but of the format 'SAE-Lens'.*hook_point"):
        VisionSAE.load(tmp_path / "foreign")


@pytest.mark.parametrize("source", ["no/such-folder", "/no/such/folder", "not a name at all", ""])
def test_what_is_neither_folder_nor_repository_is_an_error(source):
    with pytest.raises(SAEFileError):
        VisionSAE.load(source)


def test_others_may_read_what_was_saved(stored):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in stored[1].iterdir())
