"""Every model family against the same laws, in a tiny model with random weights. docs/families.md is made from these."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families as truth
import support_table
from sauce_hooks import ConceptEraser, find_hook_point
from sauce_hooks.activations import read_activations
from sauce_hooks.errors import EditError, HookPointError, IneffectiveEraserError, UnlistedFamilyWarning
from sauce_hooks.hookpoint import FAMILIES, HookPoint, as_output, as_tokens, find_towers, positions, select
from support_table import EVERYTHING, GENERATING, REFUSED, SUPPORTED, Subject, far, make_vision_sae, subject
from tiny import build_llava, logits, model_inputs, snapshot

NAMES = {name: spec for name, spec in truth.FAMILIES.items() if name in SUPPORTED}
SHAPES = {"batch": "batch", "tiles": "batch", "packed": "packed", "packed1": "packed", "nhwc": "grid", "nchw": "maps"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning"),  # nnsight, of its own attributes
]


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


def families(names: Any = SUPPORTED) -> pytest.MarkDecorator:
    """For each of these families."""
    return pytest.mark.parametrize("case", names, indirect=True)


# Where. ---------------------------------------------------------------------------------------------------------------


@families()
def test_the_hook_point_is_the_true_one(case: Subject):
    spec, point = case.spec, case.point
    assert (point.tower, point.n_layers, point.path) == (spec.tower, spec.n, case.path(point.layer))
    assert point.last_read == max(set(range(spec.n)) - set(spec.inert))
    assert point.layer <= min(point.first_read, max(spec.n - 2, 0)), "something is read before the default block"
    assert point.layout.shape == SHAPES[spec.layout]
    assert point.layout.class_token == ("first" if spec.cls == "first+regs" else spec.cls or "none")
    assert (point.layout.registers > 0) == (spec.cls == "first+regs")
    with torch.no_grad():
        (output,) = block_outputs(case, case.cold(), point)
    assert isinstance(output, tuple) == (spec.out == "tuple")
    assert as_tokens(output, point).shape[-1] == point.d_in


@families()
@pytest.mark.filterwarnings("error::sauce_hooks.errors.UnlistedFamilyWarning")
def test_the_family_is_listed(case: Subject):
    find_hook_point(case.pristine)


SEVERAL_ENTRIES = tuple(name for name, spec in NAMES.items() if spec.layout in ("tiles", "packed", "packed1"))


@families(SEVERAL_ENTRIES)
def test_an_image_that_is_several_entries_of_the_batch_is_not_fixed(case: Subject):
    assert not case.point.layout.fixed


@families()
def test_a_block_has_many_names(case: Subject):
    model, n = case.pristine, case.spec.n
    for block in range(n):
        by_path = find_hook_point(model, case.path(block))
        assert (by_path.layer, by_path.path) == (block, case.path(block))
        if by_path.tower == find_towers(model)[0].path:  # numbers count in the first tower
            assert by_path == find_hook_point(model, block + 1) == find_hook_point(model, block - n)


@families()
def test_nothing_goes_by_the_first_block_that_is_read(case: Subject):
    """With a block's output held at one value, the image still matters exactly where an earlier block is read too."""
    model = case.warm()
    for block in range(case.spec.n):
        point = find_hook_point(model, case.path(block))
        scores = [blinded(model, point, inputs) for inputs in (case.inputs, truth.other_image(case.inputs))]
        assert (not torch.equal(*scores)) == (block > point.first_read), point.path


def blinded(model: Any, point: HookPoint, inputs: dict[str, Tensor]) -> Tensor:
    def constant(module: nn.Module, args: Any, output: Any) -> Any:
        blank = torch.linspace(-1, 1, tensor(output).numel()).view_as(tensor(output))
        return (blank, *output[1:]) if isinstance(output, tuple) else blank

    handle = point.module(model).register_forward_hook(constant, prepend=True)
    try:
        return truth.score(model, inputs)
    finally:
        handle.remove()


def tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def block_outputs(case: Subject, model: Any, point: HookPoint) -> list[Any]:
    """What a block gives in the model's own forward."""
    seen: list[Any] = []
    handle = point.module(model).register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)
    case.score(model)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_says_why(name: str):
    model, _ = truth.build(name)
    with pytest.raises(HookPointError, match="there is nothing to hook") as refusal:
        find_hook_point(model)
    assert FAMILIES[model.config.model_type].refused in str(refusal.value)


# That it takes effect. ------------------------------------------------------------------------------------------------


@families()
def test_it_erases_cold_and_warm(case: Subject):
    (cold, after_cold), (warm, after_warm) = case.erased_cold, case.erased_warm
    assert torch.equal(cold, warm)
    assert far(cold, case.bare)
    for status in (after_cold, after_warm):
        assert (status.proven, status.problem) == (True, None)
        assert (status.images_seen, status.tower_runs, status.edits_run) == (1, 1, 1)


@families(GENERATING)
def test_it_erases_in_generate(case: Subject):
    (cold, after_cold), (warm, after_warm) = case.generated_cold, case.generated_warm
    assert torch.equal(cold, warm)
    assert far(cold, case.generated)
    for status in (after_cold, after_warm):
        assert status.problem is None
        assert (status.images_seen, status.tower_runs, status.edits_run) == (1, 1, 1)


@families()
def test_never_silently_nothing(case: Subject):
    """At every block: erased, or refused."""
    model, spec = case.warm(), case.spec
    for block in range(spec.n - spec.class_only):
        point = find_hook_point(model, case.path(block))
        sae = make_vision_sae(point)
        if block in spec.inert:
            with pytest.raises(IneffectiveEraserError, match="changes nothing"):
                case.eraser(model, sae=sae, allow_bypass=True).attach()
            continue
        if block > point.first_read:
            with pytest.raises(IneffectiveEraserError, match="goes by this edit"):
                case.eraser(model, sae=sae, allow_bypass=False).attach()
        with case.eraser(model, sae=sae, allow_bypass=True):
            assert not torch.equal(case.score(model), case.bare), point.path


@families([name for name, spec in NAMES.items() if spec.cls])
def test_the_class_token_is_read_where_the_layout_says_so(case: Subject):
    """In the last block that is read, it can reach nobody but the language side."""
    model = case.warm()
    point = find_hook_point(model, case.path(case.point.last_read))

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        acts_utd = as_tokens(output, point).clone()
        n = acts_utd.shape[1]
        others = sorted(set(range(n)) - set(positions(point.layout, "patches", n)))
        acts_utd[:, others] += torch.linspace(-1, 1, point.d_in) ** 3
        return as_output(acts_utd, output, point)

    point.module(model).register_forward_hook(disturb, prepend=True)
    assert (not torch.equal(case.score(model), case.bare)) == point.layout.class_read


CLASS_ONLY = tuple(name for name, spec in NAMES.items() if spec.class_only)


@families(CLASS_ONLY)
def test_where_only_the_class_token_is_read_an_edit_of_it_counts(case: Subject):
    model = case.warm()
    with case.eraser(model, sae=make_vision_sae(find_hook_point(model, -1), edit="all")):
        assert far(case.score(model), case.bare)


@families(CLASS_ONLY)
def test_where_only_the_class_token_is_read_an_edit_of_the_patches_is_refused(case: Subject):
    model = case.warm()
    sae = make_vision_sae(find_hook_point(model, -1), edit="patches")
    with pytest.raises(IneffectiveEraserError), case.eraser(model, sae=sae, allow_bypass=True):
        assert torch.equal(case.score(model), case.bare)


# That nothing else happens. -------------------------------------------------------------------------------------------


@families()
def test_an_eraser_of_nothing_changes_no_bit(case: Subject):
    for model in (case.cold(), case.warm()):
        with case.eraser(model, None):
            assert torch.equal(case.score(model), case.bare)


@families()
def test_it_leaves_no_trace(case: Subject):
    model = case.warm()
    changed_by_itself = changes(model, lambda: case.score(model))  # Qwen-VL keeps its rope_deltas, say

    def erase() -> None:
        with case.eraser(model):
            case.score(model)

    def fail() -> None:
        with pytest.raises(ZeroDivisionError), case.eraser(model):
            case.score(model)
            raise ZeroDivisionError

    for visit in (erase, fail):
        assert changes(model, visit) == changed_by_itself
        assert torch.equal(case.score(model), case.bare)


@families()
def test_it_leaves_no_trace_when_the_forward_fails(case: Subject):
    model = case.warm()
    before = snapshot(model)

    def fail(module: nn.Module, args: Any) -> None:
        raise ZeroDivisionError

    handle = case.point.module(model).register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), case.eraser(model):
        case.score(model)
    handle.remove()
    assert changes_between(before, snapshot(model)) <= changes(model, lambda: case.score(model))
    assert torch.equal(case.score(model), case.bare)


def changes(model: Any, visit: Any) -> set[tuple[str, str]]:
    """Which attributes of which modules are others after a visit."""
    before = snapshot(model)
    visit()
    return changes_between(before, snapshot(model))


def changes_between(before: dict[str, Any], after: dict[str, Any]) -> set[tuple[str, str]]:
    assert before.keys() == after.keys()
    assert all(before[name][0] is after[name][0] for name in before)
    gone = {(name, key) for name in before for key in before[name][1].keys() ^ after[name][1].keys()}
    return gone | {(n, k) for n in before for k, v in before[n][1].items() if after[n][1].get(k, v) != v}


# Several at once. -----------------------------------------------------------------------------------------------------


@families()
def test_order_does_not_matter(case: Subject):
    model = case.warm()
    some, others = case.eraser(model, range(30)), case.eraser(model, range(20, 48))
    with some, others:
        nested = case.score(model)
    with others, some:
        reordered = case.score(model)
    with some | others:
        merged = case.score(model)
    assert torch.equal(nested, reordered)
    assert torch.equal(nested, merged)
    assert far(nested, case.bare)


@families()
def test_each_row_is_erased_on_its_own(case: Subject):
    if case.spec.sizes:
        with pytest.raises(EditError, match="does not follow from the batch"):
            case.erased_by_row()
    scores = case.erased_by_row(case.spec.sizes)
    whole, _ = case.erased_warm
    torch.testing.assert_close(scores[0], whole[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(scores[1], case.bare[1])
    assert far(scores[0], case.bare[0])


ALONE = tuple(name for name, spec in NAMES.items() if spec.kind != "dual" and name != "minicpmv4_6")
"""Duals score each image against each text; MiniCPM-V packs the patches of all images into one picture."""


@families(ALONE)
def test_a_row_is_erased_as_it_would_be_alone(case: Subject):
    model = case.warm()
    first = {name: value[: len(value) // 2] for name, value in case.inputs.items()}
    with case.eraser(model):
        alone = truth.score(model, first)
    torch.testing.assert_close(case.erased_by_row(case.spec.sizes)[:1], alone, atol=1e-4, rtol=1e-4)


# Through nnsight. -----------------------------------------------------------------------------------------------------


@families()
def test_a_trace_erases_as_the_hook_does(case: Subject):
    assert torch.equal(case.traced, case.erased_warm[0])


@families()
def test_reading_gives_what_the_forward_computes(case: Subject):
    model = case.warm()
    before = snapshot(model)
    rows = torch.cat(list(read_activations(model, case.inputs, case.point)))
    assert not changes_between(before, snapshot(model))
    torch.testing.assert_close(rows, true_rows(case), atol=1e-5, rtol=1e-5)


TEXT = ("input_ids", "attention_mask", "decoder_input_ids", "qformer_input_ids", "qformer_attention_mask")
TEXT_TYPES = (
    "mm_token_type_ids",
    "token_type_ids",
    "image_embeds_position_mask",
    "image_attention_mask",
    "cross_attention_mask",
)


@families()
def test_images_are_read_without_a_text(case: Subject):
    rows = torch.cat(list(read_activations(case.warm(), images_alone(case), case.point)))
    torch.testing.assert_close(rows, true_rows(case), atol=1e-5, rtol=1e-5)


def images_alone(case: Subject) -> dict[str, Tensor]:
    return {name: value for name, value in case.inputs.items() if name not in TEXT}


def true_rows(case: Subject) -> Tensor:
    (output,) = block_outputs(case, case.cold(), case.point)
    return select(as_tokens(output, case.point), case.point.layout, "patches").flatten(0, 1)


# Two towers. ----------------------------------------------------------------------------------------------------------


def test_where_images_go_through_two_towers_both_must_be_erased():
    case = subject("deepseek_vl_hybrid")
    model = case.cold()
    towers = [tower.path for tower in find_towers(model)]
    assert towers == ["model.vision_model", "model.high_res_vision_model"]
    points = [find_hook_point(model), find_hook_point(model, "model.high_res_vision_model.vision_encoder.layers.1")]
    one, other = (case.eraser(model, sae=make_vision_sae(point), allow_bypass=False) for point in points)
    for alone in (one, other):
        with pytest.raises(IneffectiveEraserError, match="which no eraser edits"), alone:
            case.score(model)
    with one, other:
        both = case.score(model)
        assert one.status().proven and other.status().proven
    with case.eraser(model, allow_bypass=True):
        in_part = case.score(model)
    assert far(both, in_part) and far(both, case.bare) and far(in_part, case.bare)
    assert torch.equal(case.score(model), case.bare)


def test_a_video_does_not_go_by_the_eraser_of_the_image_tower():
    images, video = subject("video_llava"), subject("video_llava_video")
    model = video.warm()
    with pytest.raises(IneffectiveEraserError, match="which no eraser edits"), images.eraser(model):
        video.score(model)


def test_with_both_towers_erased_a_video_is_fine():
    images, video = subject("video_llava"), subject("video_llava_video")
    model = video.warm()
    with images.eraser(model), video.eraser(model):
        both = video.score(model)
    assert torch.equal(both, video.erased_warm[0])


# Families that nobody has listed. -------------------------------------------------------------------------------------


def renamed(model: Any, **parts: str) -> Any:
    """A model of a family that no table has; `parts` rename the types of its parts."""
    model = copy.deepcopy(model)
    model.config.model_type = "something_new"
    for part, model_type in parts.items():
        model.get_submodule(part.replace("__", ".")).config.model_type = model_type
    return model


@pytest.mark.filterwarnings("ignore::sauce_hooks.errors.UnlistedFamilyWarning")
@pytest.mark.parametrize("parts", [{}, {"model__vision_tower": "some_new_tower"}], ids=["family", "family and tower"])
def test_an_unknown_family_is_found_by_structure(parts: dict[str, str]):
    known = build_llava()
    model = renamed(known, **parts)
    with pytest.warns(UnlistedFamilyWarning, match="found by structure"):
        point = find_hook_point(model)
    assert (point.path, point.layout.class_token) == (find_hook_point(known).path, "first")
    before = logits(model)
    with ConceptEraser(model, make_vision_sae(point), [EVERYTHING], gamma=-3.0) as eraser:
        assert far(logits(model), before)
        assert eraser.status().proven
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore::sauce_hooks.errors.UnlistedFamilyWarning")
def test_in_an_unknown_family_a_block_that_is_not_read_shows_itself():
    """Its config cannot be asked which block is read: the first forward tells."""
    model = renamed(build_llava())
    eraser = ConceptEraser(model, make_vision_sae(find_hook_point(model, -1)), [EVERYTHING])
    with pytest.raises(IneffectiveEraserError, match="does not reach the language side"), eraser:
        logits(model, model_inputs())


def test_several_towers_of_an_unknown_family_are_listed():
    model = renamed(subject("video_llava").pristine)
    with pytest.raises(HookPointError, match=r"several vision towers: model\.\w+_tower, model\.\w+_tower"):
        find_hook_point(model)


def test_a_model_that_does_not_see_is_refused():
    with pytest.raises(HookPointError, match=r"no vision tower.*layers \(2 × LlamaDecoderLayer"):
        find_hook_point(build_llava().model.language_model)


# The page. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", truth.FAMILIES)
def test_the_page_says_what_was_measured(name: str):
    lines = support_table.PAGE.read_text(encoding="utf-8").splitlines()
    assert support_table.row(name) in lines, "run: make families"


def test_the_page_has_nothing_else():
    page = support_table.PAGE.read_text(encoding="utf-8")
    before, after = (part.splitlines() for part in support_table.INTRO.split("{version}"))
    assert page.splitlines()[: len(before)][:-1] == before[:-1]
    measured, by_hand, _ = page.partition(support_table.BY_HAND)
    assert by_hand, "the section that is written by hand is gone"
    lines = [line for line in measured.splitlines() if line.startswith("| `")]
    assert len(lines) == len(truth.FAMILIES)
    assert all(line in page for line in after[1:])
