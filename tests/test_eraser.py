import copy
import gc
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sauce_hooks import Concept, ConceptBank, ConceptEraser, VisionSAE, find_hook_point, read_activations
from sauce_hooks.erasure import PAPER_GAMMA, merge
from sauce_hooks.errors import (
    EditError,
    EraserStateError,
    HookPointError,
    IneffectiveEraserError,
    SAEMismatchError,
    UnknownConceptError,
)
from tiny import D_SAE, build_llava, logits, make_sae, make_vision_sae, model_inputs, snapshot, weights


def erased(model, sae, concepts=("red", "tiger"), **options):
    """The logits inside a plain `with`."""
    with ConceptEraser(model, sae, concepts, **options):
        return logits(model)


# It takes effect. ----------------------------------------------------------------------------------------------------


def test_erasing_changes_the_answer_alike_on_a_cold_and_a_warm_model(cold, model):
    before = logits(copy.deepcopy(model))
    fresh = build_llava(cold.config.text_config.vocab_size)
    cold_answer, warm_answer = (erased(m, make_vision_sae(m)) for m in (fresh, model))
    assert torch.equal(cold_answer, warm_answer)
    assert not torch.allclose(warm_answer, before, atol=1e-3)


@pytest.mark.parametrize("layer", [-2, -3, -4])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("preserve_error", [True, False])
def test_every_block_that_is_read_can_be_edited(model, layer, architecture, preserve_error):
    sae = VisionSAE.wrap(
        make_sae(architecture, **({"k": 8} if architecture == "topk" else {})), find_hook_point(model, layer)
    )
    before, state = logits(model), snapshot(model)
    assert not torch.allclose(erased(model, sae, [range(D_SAE)], preserve_error=preserve_error), before, atol=1e-3)
    assert snapshot(model) == state


def test_what_llava_reads_is_the_edited_activation(model, sae):
    eraser = ConceptEraser(model, sae, ["red"])
    with torch.no_grad():
        pixels = model_inputs()["pixel_values"]
        before = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        with eraser:
            after = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    from sauce_hooks.erasure import MergedEdit

    expected = before.clone()
    expected[:, 1:] = MergedEdit([eraser.edit])(before[:, 1:])
    assert torch.equal(after, expected)
    assert torch.equal(after[:, 0], before[:, 0])  # the class token is not edited


def test_a_siglip_tower_is_erased_likewise():
    model = build_llava(tower="siglip")
    before, state = logits(model), snapshot(model)
    assert not torch.allclose(erased(model, make_vision_sae(model)), before, atol=1e-3)
    assert snapshot(model) == state


def test_the_edit_follows_the_models_dtype(model, sae):
    model.to(torch.bfloat16)
    before = logits(model)
    after = erased(model, sae)
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)


def test_generate_is_erased(model, sae):
    def said():
        return model.generate(**model_inputs(4), max_new_tokens=6, do_sample=False)

    before = said()
    with ConceptEraser(model, sae, [range(D_SAE)], gamma=-2.0):
        assert not torch.equal(said(), before)
    assert torch.equal(said(), before)


def test_generate_in_another_thread_is_erased(model, sae):
    """The common streaming pattern: `generate` in a new thread, the caller in the `with`."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(logits(model)))
    with ConceptEraser(model, sae, ["red", "tiger"]):
        thread.start()
        thread.join()
    assert torch.equal(answers[0], erased(model, sae))


def test_no_weight_changes(model, sae):
    before = weights(model), weights(sae.sae)
    erased(model, sae)
    erased(model, sae, preserve_error=False)
    for old, module in zip(before, (model, sae.sae), strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in module.state_dict().items())


# Null edit. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("concepts", "gamma"), [(["red", "tiger"], 1.0), ([], None), ([[]], None)])
def test_a_null_edit_is_bit_identical(any_model, concepts, gamma):
    sae = make_vision_sae(any_model)
    before = logits(copy.deepcopy(any_model))
    assert torch.equal(erased(any_model, sae, concepts, gamma=gamma), before)


# Clean exit. ---------------------------------------------------------------------------------------------------------


def leave_normally(model, sae):
    erased(model, sae)


def leave_by_exception(model, sae):
    with pytest.raises(ZeroDivisionError), ConceptEraser(model, sae, ["red"]):
        logits(model)
        raise ZeroDivisionError


def leave_by_exception_in_the_model(model, sae):
    with pytest.raises(Exception, match=r"."), ConceptEraser(model, sae, ["red"]):
        logits(model, {**model_inputs(), "pixel_values": torch.zeros(2, 3, 7, 7)})


def detach(model, sae):
    eraser = ConceptEraser(model, sae, ["red"]).attach()
    logits(model)
    eraser.detach()


def fail_to_enter(model, sae):
    with ConceptEraser(model, sae, ["red"]), pytest.raises(EditError):
        ConceptEraser(model, sae, ["tiger"], preserve_error=False).attach()


def enter_and_run_nothing(model, sae):
    with ConceptEraser(model, sae, ["red"]):
        pass


def run_text_only(model, sae):
    with ConceptEraser(model, sae, ["red"]):
        logits(model, {"input_ids": torch.tensor([[1, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)})


def read_inside(model, sae):
    with ConceptEraser(model, sae, ["red", "tiger"]):
        inside = logits(model)
        list(read_activations(model, [model_inputs()], sae.hook_point))
        assert torch.equal(logits(model), inside)


def generate_inside(model, sae):
    with ConceptEraser(model, sae, ["red"]):
        model.generate(**model_inputs(), max_new_tokens=2, do_sample=False)


WAYS_OUT = [
    leave_normally, leave_by_exception, leave_by_exception_in_the_model, detach, fail_to_enter, enter_and_run_nothing,
    run_text_only, read_inside, generate_inside,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS_OUT, ids=lambda way: way.__name__)
def test_afterwards_the_model_is_exactly_as_it_was(model, sae, way):
    model.model.vision_tower.register_forward_hook(lambda *_: None)  # a user's own hooks stay too
    sae.hook_point.module(model).register_forward_hook(lambda *_: None)
    before, state = logits(model), snapshot(model)
    way(model, sae)
    assert snapshot(model) == state
    assert torch.equal(logits(model), before)


def test_a_model_that_never_ran_is_left_as_it_was(cold):
    state = snapshot(cold)
    enter_and_run_nothing(cold, make_vision_sae(cold))
    assert snapshot(cold) == state


def test_each_modules_own_mode_is_kept(model, sae):
    model.train()
    model.model.vision_tower.eval()
    model.model.vision_tower.encoder.layers[0].train()
    state = snapshot(model)
    erased(model, sae)
    assert snapshot(model) == state


def test_nothing_keeps_a_model_alive(cold):
    model = copy.deepcopy(cold)
    erased(model, make_vision_sae(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Never silent. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_a_block_that_is_not_read_raises_on_entering(any_model, times):
    eraser = ConceptEraser(any_model, make_sae(), [[1, 2]], hook_point=find_hook_point(any_model, -1))
    state = snapshot(any_model)
    for _ in range(times):
        with pytest.raises(IneffectiveEraserError, match="changes nothing"):
            eraser.attach()
    assert not eraser.attached
    assert snapshot(any_model) == state


class Deaf(torch.nn.Module):
    """A tower's block that nobody listens to: its output is the same whatever goes in."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.register_forward_hook(lambda module, args, output: torch.ones_like(args[0]))

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def test_a_block_whose_output_is_thrown_away_raises_in_the_first_forward(model, sae):
    """The config says that the block is read; that is proven, not believed."""
    layers = model.model.vision_tower.encoder.layers
    layers[2] = Deaf(layers[2]).eval()
    logits(model)
    state = snapshot(model)
    with pytest.raises(IneffectiveEraserError, match="does not reach"), ConceptEraser(model, sae, ["red"]):
        logits(model)
    assert snapshot(model) == state


def test_a_failure_that_nobody_heard_is_told_on_leaving(model, sae):
    layers = model.model.vision_tower.encoder.layers
    layers[2] = Deaf(layers[2]).eval()
    eraser = ConceptEraser(model, sae, ["red"]).attach()
    with pytest.raises(IneffectiveEraserError):
        logits(model)
    with pytest.raises(IneffectiveEraserError, match="does not reach"):
        eraser.detach()


def test_replacing_the_block_inside_raises_on_leaving(model, sae):
    layers = model.model.vision_tower.encoder.layers
    spare = copy.deepcopy(layers[2])
    with pytest.raises(IneffectiveEraserError, match="has been replaced"), ConceptEraser(model, sae, ["red"]):
        layers[2] = spare
        logits(model)


def test_replacing_the_block_between_two_forwards_raises_on_leaving(model, sae):
    layers = model.model.vision_tower.encoder.layers
    spare = copy.deepcopy(layers[2])
    with pytest.raises(IneffectiveEraserError), ConceptEraser(model, sae, ["red"]):
        logits(model)
        layers[2] = spare
        logits(model)


def test_an_error_inside_is_not_hidden_behind_ours(model, sae):
    layers = model.model.vision_tower.encoder.layers
    spare = copy.deepcopy(layers[2])
    with pytest.raises(ZeroDivisionError), ConceptEraser(model, sae, ["red"]):
        layers[2] = spare
        with pytest.raises(IneffectiveEraserError):
            logits(model)
        raise ZeroDivisionError


def test_an_eraser_attached_while_another_thread_reads_is_in_effect(model, sae):
    expected = erased(model, sae, ["red"])
    reading, attached = threading.Event(), threading.Event()
    model.model.vision_tower.embeddings.register_forward_pre_hook(lambda *_: (reading.set(), attached.wait(1), None)[-1])
    thread = threading.Thread(target=lambda: list(read_activations(model, [model_inputs()], sae.hook_point)))
    thread.start()
    reading.wait()
    with ConceptEraser(model, sae, ["red"]):
        attached.set()
        thread.join()
        assert torch.equal(logits(model), expected)


# Union. --------------------------------------------------------------------------------------------------------------


def one_list(model, sae):
    return erased(model, sae, ["red", "tiger"])


def reordered_and_repeated(model, sae):
    return erased(model, sae, ["tiger", "red", "tiger", "red"])


def as_concepts(model, sae):
    return erased(model, sae, [sae.concepts["tiger"], "red"])


def as_features(model, sae):
    return erased(model, sae, [[5, 4, 3], (1, 2), [3, 3]])


def nested(model, sae):
    with ConceptEraser(model, sae, ["red"]), ConceptEraser(model, sae, ["tiger"]):
        return logits(model)


def nested_the_other_way(model, sae):
    with ConceptEraser(model, sae, "tiger"), ConceptEraser(model, sae, "red"):
        return logits(model)


def nested_thrice(model, sae):
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(ConceptEraser(model, sae, ["red", "tiger"]))
        return logits(model)


def merged(model, sae):
    with ConceptEraser(model, sae, ["red"]) | ConceptEraser(model, sae, ["tiger"]):
        return logits(model)


def merged_many(model, sae):
    with merge(ConceptEraser(model, sae, [name]) for name in ("tiger", "red", "tiger")):
        return logits(model)


def reentered(model, sae):
    eraser = ConceptEraser(model, sae, ["red", "tiger"])
    with eraser, eraser:
        pass
    with eraser:
        with eraser:
            pass
        return logits(model)


def decorated(model, sae):
    answer = ConceptEraser(model, sae, ["red", "tiger"])(logits)
    answer(model)
    return answer(model)


def attached(model, sae):
    erasers = [ConceptEraser(model, sae, [name]).attach() for name in ("red", "tiger")]
    answer = logits(model)
    for eraser in erasers:  # first in, first out
        eraser.detach()
    return answer


def from_two_threads(model, sae):
    ready, done = threading.Barrier(2), threading.Event()

    def hold():
        with ConceptEraser(model, sae, ["tiger"]):
            ready.wait()
            done.wait()

    thread = threading.Thread(target=hold)
    with ConceptEraser(model, sae, ["red"]):
        thread.start()
        ready.wait()
        answer = logits(model)
    done.set()
    thread.join()
    return answer


WAYS = [
    one_list, reordered_and_repeated, as_concepts, as_features, nested, nested_the_other_way, nested_thrice, merged,
    merged_many, reentered, decorated, attached, from_two_threads,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_erase_the_same_concepts_gives_one_result(model, sae, way):
    state, expected = snapshot(model), erased(model, sae, [(1, 2, 3, 4, 5)])
    assert torch.equal(way(model, sae), expected)
    assert snapshot(model) == state


@given(turns=st.lists(st.integers(0, 2), max_size=12))
def test_whatever_the_order_of_attaching_and_detaching_the_active_ones_count(_llava, turns):
    model = copy.deepcopy(_llava)
    sae = make_vision_sae(model)
    logits(model)
    state = snapshot(model)
    erasers = [ConceptEraser(model, sae, [name]) for name in sae.concepts]
    for i in turns:
        (erasers[i].detach if erasers[i].attached else erasers[i].attach)()
    on = [eraser for eraser in erasers if eraser.attached]
    answer = logits(model)
    for eraser in on:
        eraser.detach()
    assert snapshot(model) == state
    with merge(on) if on else ExitStack():
        assert torch.equal(answer, logits(model))


def test_a_merged_eraser_knows_its_concepts_and_features(model, sae):
    both = ConceptEraser(model, sae, ["red"]) | ConceptEraser(model, sae, ["tiger", "red"])
    assert [concept.name for concept in both.concepts] == ["red", "tiger"]
    assert sorted(both.features) == [1, 2, 3, 4, 5]
    assert "red, tiger" in repr(both)
    assert "off" in repr(both)


def test_erasers_that_disagree_do_not_merge(model, sae):
    red = ConceptEraser(model, sae, ["red"])
    with pytest.raises(EditError, match="error"):
        _ = red | ConceptEraser(model, sae, ["tiger"], preserve_error=False)


# What γ is used. -----------------------------------------------------------------------------------------------------


def test_gamma_is_the_erasers_else_the_concepts_else_the_papers(model, sae):
    def gammas(*concepts, **options):
        return ConceptEraser(model, sae, concepts, **options).edit.gammas

    assert gammas("red") == dict.fromkeys((1, 2, 3), PAPER_GAMMA)
    assert gammas("red", gamma=0.25) == dict.fromkeys((1, 2, 3), 0.25)
    assert gammas("blue") == {6: -2.0, 7: -2.0}
    assert gammas("blue", gamma=0.25) == {6: 0.25, 7: 0.25}


def test_of_concepts_that_share_a_feature_the_strongest_factor_holds(model, sae):
    weak, strong = Concept("weak", (1, 2), gamma=0.0), Concept("strong", (2, 3), gamma=-1.0)
    expected = {1: 0.0, 2: -1.0, 3: -1.0}
    assert ConceptEraser(model, sae, [weak, strong]).edit.gammas == expected
    both = ConceptEraser(model, sae, [strong]) | ConceptEraser(model, sae, [weak])
    assert both.edit.gammas == expected
    with ConceptEraser(model, sae, [strong]), ConceptEraser(model, sae, [weak]):
        nested = logits(model)
    with both:
        assert torch.equal(logits(model), nested)


# Bad input. ----------------------------------------------------------------------------------------------------------


def test_an_unknown_concept_lists_the_known_ones_and_the_nearest(model, sae):
    with pytest.raises(UnknownConceptError) as caught:
        ConceptEraser(model, sae, ["red", "tigre"])
    assert str(caught.value) == "unknown concept 'tigre'. Did you mean 'tiger'? Known concepts: red, tiger, blue."
    assert isinstance(caught.value, KeyError)


def test_an_empty_bank_says_how_to_learn_a_concept(model):
    with pytest.raises(UnknownConceptError, match="learn_concept"):
        ConceptEraser(model, make_sae(), ["red"], hook_point=find_hook_point(model))


@pytest.mark.parametrize("features", [[D_SAE], [0, D_SAE + 7], [-1]])
def test_a_feature_that_the_sae_lacks_is_an_error(model, sae, features):
    with pytest.raises(EditError):
        ConceptEraser(model, sae, [features])


def test_an_sae_of_another_width_is_an_error(model, sae):
    with pytest.raises(SAEMismatchError, match=r"16.*32"):
        VisionSAE.wrap(make_sae(d_in=16), sae.hook_point)
    with pytest.raises(SAEMismatchError, match=r"16.*32"):
        ConceptEraser(model, make_sae(d_in=16), [[1]], hook_point=sae.hook_point)
    with pytest.raises(SAEMismatchError, match=r"32.*64"):
        ConceptEraser(build_llava(width=64), sae, ["red"])


def test_a_bare_sae_without_a_place_is_an_error(model):
    with pytest.raises(SAEMismatchError, match="hook_point"):
        ConceptEraser(model, make_sae(), [[1]])


def test_a_place_that_contradicts_the_sae_is_an_error(model, sae):
    with pytest.raises(SAEMismatchError, match=r"layers\.2.*layers\.1"):
        ConceptEraser(model, sae, ["red"], hook_point=find_hook_point(model, -3))


def test_the_same_tower_in_another_model_is_known_by_its_record_alone(model, sae):
    tower = model.model.vision_tower
    with pytest.raises(SAEMismatchError, match="no record of its tower"):
        ConceptEraser(tower, sae, ["red"])
    recorded = VisionSAE.wrap(sae.sae, sae.hook_point, model=model)
    recorded.concepts = sae.concepts
    assert ConceptEraser(tower, recorded, ["red"]).hook_point.module(tower) is sae.hook_point.module(model)
    with pytest.raises(SAEMismatchError, match="weights"):
        ConceptEraser(build_llava(seed=1), recorded, ["red"])
    assert ConceptEraser(build_llava(seed=1), recorded, ["red"], allow_mismatch=True).features == (1, 2, 3)


def test_a_model_without_a_tower_is_an_error(model, sae):
    with pytest.raises(HookPointError, match="vision tower"):
        ConceptEraser(model.model.language_model, sae, ["red"])


def test_an_unknown_edit_is_an_error(model, sae):
    with pytest.raises(Exception, match="edit"):
        ConceptEraser(model, sae, ["red"], edit="delete")


def test_leaving_what_was_not_entered_is_an_error(model, sae):
    eraser = ConceptEraser(model, sae, ["red"])
    with pytest.raises(EraserStateError, match="not attached"):
        eraser.detach()
    with eraser:
        assert eraser.attached
    with pytest.raises(EraserStateError):
        eraser.detach()


# A bare SAE. ---------------------------------------------------------------------------------------------------------


def test_a_bare_sae_with_a_place_erases_the_same(model, sae):
    place, bank = sae.hook_point, ConceptBank([Concept("crimson", (1, 2, 3))])
    assert torch.equal(erased(model, sae.sae, [[1, 2, 3]], hook_point=place), erased(model, sae, ["red"]))
    assert torch.equal(erased(model, sae.sae, ["crimson"], hook_point=place, bank=bank), erased(model, sae, ["red"]))


def test_a_given_bank_goes_before_the_saes_own(model, sae):
    bank = ConceptBank([Concept("red", (9,))])
    assert ConceptEraser(model, sae, ["red"], bank=bank).features == (9,)
    assert ConceptEraser(model, sae, ["tiger"], bank=bank).features == (3, 4, 5)


def test_a_given_bank_of_another_sae_is_refused(model, sae):
    other = VisionSAE(make_sae(seed=1), sae.hook_point, sae.tokens)
    other.concepts.add(Concept("green", (8,)), sae=other.record())
    for ours in (sae, sae.sae):
        with pytest.raises(SAEMismatchError, match="another SAE"):
            ConceptEraser(model, ours, ["green"], hook_point=sae.hook_point, bank=other.concepts)
