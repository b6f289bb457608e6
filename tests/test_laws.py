"""Laws of docs/method.md as properties, where the other tests hold them case by case."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sauce_hooks import ConceptEraser, VisionSAE, find_hook_point, read_activations
from sauce_hooks.errors import EditError, IneffectiveEraserError
from tiny import D_IN, D_SAE, logits, make_sae, make_vision_sae, model_inputs, snapshot

ARCHITECTURES = {"standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 8}}
architectures = st.sampled_from(sorted(ARCHITECTURES))
features = st.sets(st.integers(0, D_SAE - 1), max_size=12)


@pytest.fixture(scope="module")
def own(_llava):
    """A model of this module's own: every example must leave it as it was, so one is enough."""
    model = copy.deepcopy(_llava)
    logits(model)
    return model


@settings(max_examples=15)
@given(architecture=architectures, features=features, seed=st.integers(0, 99), named=st.booleans())
def test_null_edits_change_no_bit_of_the_models_answer(own, architecture, features, seed, named):
    sae = VisionSAE.wrap(make_sae(architecture, seed=seed, **ARCHITECTURES[architecture]), find_hook_point(own))
    inputs = model_inputs(seed=seed)
    with ConceptEraser(own, sae, [sorted(features)] if named and features else [], gamma=1.0):
        inside = logits(own, inputs)
    assert torch.equal(inside, logits(own, inputs))


@settings(max_examples=10)
@given(architecture=architectures, features=features, gamma=st.sampled_from([-1.0, -0.5, 0.0, 1.0]), keep=st.booleans())
def test_a_baked_model_gives_what_the_eraser_gives(own, architecture, features, gamma, keep):
    sae = VisionSAE.wrap(make_sae(architecture, **ARCHITECTURES[architecture]), find_hook_point(own))
    eraser = ConceptEraser(own, sae, [sorted(features)] if features else [], gamma=gamma, preserve_error=keep)
    state = snapshot(own)
    if keep and (gamma == 1.0 or not features):
        with pytest.raises(EditError, match="nothing to bake"):
            eraser.bake()
        return
    with eraser:
        inside = logits(own)
    assert torch.equal(logits(eraser.bake()), inside)
    assert snapshot(own) == state


ACTIONS = {
    "forward": lambda model, sae: logits(model),
    "generate": lambda model, sae: model.generate(**model_inputs(), max_new_tokens=2, do_sample=False),
    "text alone": lambda model, sae: model(input_ids=model_inputs()["input_ids"][:, -3:]),
    "read": lambda model, sae: list(read_activations(model, [model_inputs()], sae.hook_point)),
    "an error": lambda model, sae: model(input_ids=None),
}


@settings(max_examples=15)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from(["red", "tiger", "blue"]), st.lists(st.sampled_from(sorted(ACTIONS)), max_size=2)),
        max_size=3,
    )
)
def test_whatever_is_done_inside_however_deep_the_model_is_left_as_it_was(own, layers):
    sae = make_vision_sae(own)
    before, state = logits(own), snapshot(own)
    with contextlib.suppress(ValueError), contextlib.ExitStack() as stack:
        for concept, actions in layers:
            stack.enter_context(ConceptEraser(own, sae, [concept]))
            for action in actions:
                ACTIONS[action](own, sae)
    assert snapshot(own) == state
    assert torch.equal(logits(own), before)


def replace_block(model, sae):
    layers = model.model.vision_tower.encoder.layers
    layers[2] = copy.deepcopy(layers[2])


def clear_hooks(model, sae):
    sae.hook_point.module(model)._forward_hooks.clear()


def replace_tower(model, sae):
    model.model.vision_tower = copy.deepcopy(model.model.vision_tower)


def read_elsewhere(model, sae):
    model.config.vision_feature_layer = -4


@settings(max_examples=15)
@given(
    sabotage=st.sampled_from([replace_block, clear_hooks, replace_tower, read_elsewhere]),
    first=st.integers(0, 2),
    then=st.integers(1, 2),
    caught=st.booleans(),
)
def test_an_eraser_that_loses_its_effect_at_any_time_says_so(_llava, sabotage, first, then, caught):
    model = copy.deepcopy(_llava)
    sae = make_vision_sae(model)
    with pytest.raises(IneffectiveEraserError), ConceptEraser(model, sae, ["red"]):
        for _ in range(first):
            logits(model)
        sabotage(model, sae)
        for _ in range(then):  # what somebody else catches is told again on leaving
            with contextlib.suppress(IneffectiveEraserError) if caught else contextlib.nullcontext():
                logits(model)


@settings(max_examples=10)
@given(
    architecture=architectures,
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    layer=st.sampled_from([-2, -3, -4]),
)
def test_an_sae_that_is_loaded_encodes_as_the_one_saved(own, tmp_path_factory, architecture, seed, dtype, layer):
    options = {**ARCHITECTURES[architecture], "dtype": dtype}
    sae = VisionSAE.wrap(make_sae(architecture, seed=seed, **options), find_hook_point(own, layer), model=own)
    folder = tmp_path_factory.mktemp("sae") / "sae"
    sae.save(folder)
    loaded = VisionSAE.load(folder)
    rows = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(seed)).to(sae.sae.dtype)
    with torch.no_grad():
        assert torch.equal(loaded.sae.encode(rows), sae.sae.encode(rows))
        assert torch.equal(loaded.sae.decode(loaded.sae.encode(rows)), sae.sae.decode(sae.sae.encode(rows)))
    assert loaded.hook_point == sae.hook_point
