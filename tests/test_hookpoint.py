import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sauce_hooks.errors import HookPointError, TokenPolicyError
from sauce_hooks.hookpoint import (
    HookPoint,
    TokenLayout,
    TokenPolicy,
    find_hook_point,
    positions,
    select,
    tokens_per_image,
)
from tiny import N_LAYERS, N_PATCHES, build_llava, model_inputs

BLOCKS = "model.vision_tower.encoder.layers"


def block_output(model, hook_point):
    """What a plain hook sees at a hook point."""
    seen = []
    handle = hook_point.module(model).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        hook_point.tower_module(model)(pixel_values=model_inputs()["pixel_values"])
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("layer", [*range(-N_LAYERS, 0), *range(1, N_LAYERS + 1)])
def test_layer_counts_as_hidden_states_do(model, layer):
    with torch.no_grad():
        tower = model.model.vision_tower(pixel_values=model_inputs()["pixel_values"], output_hidden_states=True)
    assert torch.equal(block_output(model, find_hook_point(model, layer)), tower.hidden_states[layer])


def test_a_siglip_tower_is_one_of_patches_alone():
    model = build_llava(tower="siglip")
    found = find_hook_point(model)
    with torch.no_grad():
        tower = model.model.vision_tower(pixel_values=model_inputs()["pixel_values"], output_hidden_states=True)
    assert torch.equal(block_output(model, found), tower.hidden_states[-2])
    assert found.layout == TokenLayout("none", class_read=False)
    assert tokens_per_image(model, found, "patches") == tokens_per_image(model, found, "all") == N_PATCHES


def test_the_default_block_is_the_one_llava_reads(model):
    found = find_hook_point(model)
    assert (found.path, found.layer, found.last_read) == (f"{BLOCKS}.2", 2, 2)
    assert (found.n_layers, found.d_in, found.family) == (N_LAYERS, 32, "llava")


def test_of_several_layers_read_the_last_counts(cold):
    cold.config.vision_feature_layer = [-4, 3]
    assert find_hook_point(cold).last_read == 2


@pytest.mark.parametrize("index", range(N_LAYERS))
def test_a_dotted_path_names_its_block(cold, index):
    found = find_hook_point(cold, f"{BLOCKS}.{index}")
    assert found == find_hook_point(cold, index + 1)
    assert found.module(cold) is cold.get_submodule(f"{BLOCKS}.{index}")


def test_a_bare_vision_tower_has_hook_points_too(cold):
    inside, alone = find_hook_point(cold), find_hook_point(cold.model.vision_tower)
    assert alone.module(cold.model.vision_tower) is inside.module(cold)
    assert alone.layout.class_read and not inside.layout.class_read  # whoever reads a bare tower may read the class token
    assert replace(alone.layout, class_read=False) == inside.layout


@pytest.mark.parametrize("layer", [0, N_LAYERS + 1, -N_LAYERS - 1, f"{BLOCKS}.{N_LAYERS}", "model.language_model", "", "?"])
def test_a_missing_layer_is_an_error_that_says_which_there_are(cold, layer):
    with pytest.raises(HookPointError, match=f"{N_LAYERS} blocks"):
        find_hook_point(cold, layer)


def test_an_unknown_model_is_an_error_that_lists_the_candidates():
    unknown = nn.ModuleDict({"stages": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    with pytest.raises(HookPointError, match=r"stages \(2 × Linear\).*FAMILIES"):
        find_hook_point(unknown)


def test_a_hook_point_of_another_model_is_an_error(cold):
    with pytest.raises(HookPointError, match="find_hook_point"):
        find_hook_point(cold).module(cold.model.vision_tower)


names = st.text(max_size=20)
counts = st.integers(0, 10_000)


@given(
    st.builds(
        HookPoint,
        path=names,
        layer=counts,
        n_layers=counts,
        d_in=counts,
        family=names,
        tower=names,
        layout=st.builds(
            TokenLayout,
            class_token=st.sampled_from(["first", "last", "none"]),
            registers=counts,
            shape=st.sampled_from(["batch", "packed", "grid", "maps"]),
            tiles_in_row=st.none() | st.tuples(counts, counts),
            fixed=st.booleans(),
            class_read=st.booleans(),
            even=st.booleans(),
        ),
        reads=st.lists(counts, min_size=1).map(tuple),
        place=st.sampled_from(["tower", "projector", "language"]),
    )
)
def test_a_hook_point_survives_json(hook_point):
    assert HookPoint.from_dict(json.loads(json.dumps(hook_point.to_dict()))) == hook_point


@pytest.mark.parametrize(
    ("tokens", "chosen"), [("all", [0, 1, 2, 3]), ("patches", [1, 2, 3]), ("class", [0]), ("last", [3])]
)
def test_a_policy_names_its_tokens(tokens, chosen):
    acts_btd = torch.arange(4.0)[None, :, None].expand(2, 4, 5)
    assert select(acts_btd, TokenLayout("first"), tokens)[0, :, 0].tolist() == chosen


@pytest.mark.parametrize(("tokens", "count"), [("all", N_PATCHES + 1), ("patches", N_PATCHES), ("class", 1), ("last", 1)])
def test_tokens_per_image_counts_what_is_selected(model, tokens, count):
    hook_point = find_hook_point(model)
    assert tokens_per_image(model, hook_point, tokens) == count
    assert select(block_output(model, hook_point), hook_point.layout, tokens).shape[1] == count


def test_a_tower_without_class_token_has_none_to_name():
    with pytest.raises(TokenPolicyError, match="no class token"):
        positions(TokenLayout("none"), "class", 4)
    assert positions(TokenLayout("none"), "patches", 4) == range(4)


@pytest.mark.parametrize("choice", [{"read": "every"}, {"edit": "class"}, {"read": ""}])
def test_an_unknown_policy_is_an_error(choice):
    with pytest.raises((TokenPolicyError, TypeError), match=r"policy|type"):
        TokenPolicy(**choice)


def test_the_width_is_the_towers(cold):
    assert find_hook_point(build_llava(width=64)).d_in == 64
