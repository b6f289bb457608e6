"""Edits at several hook points at once, and at the places behind the tower: the projector and the language layers."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import families
from sauce_hooks import (
    Concept,
    ConceptBank,
    ConceptEraser,
    TokenPolicy,
    VisionSAE,
    find_hook_point,
    learn_concept,
    train_sae,
)
from sauce_hooks.activations import read_activations
from sauce_hooks.erasure import attachments
from sauce_hooks.erasure.several import Erasers
from sauce_hooks.errors import (
    EditError,
    HookPointError,
    ImagesError,
    IneffectiveEraserError,
    SAEMismatchError,
    TokenPolicyError,
    UnknownConceptError,
)
from sauce_hooks.hookpoint import BEHIND, HookPoint, find_towers
from tiny import build_llava, make_sae, model_inputs, snapshot

TOWER = "model.vision_tower.encoder.layers"
PROJECTOR = "model.multi_modal_projector"
LAYERS = "model.language_model.layers"
THREE = (f"{TOWER}.2", PROJECTOR, f"{LAYERS}.0")

USUAL = ("llava", "llava_onevision", "qwen2_vl", "paligemma", "smolvlm", "internvl")
"""Tried at every law; all families with such places are tried at the law that nothing goes by."""
ODD = ("pixtral", "aya_vision", "gemma4", "deepseek_vl_hybrid", "got_ocr2", "qwen2_5_vl")
PLACES = [(name, place) for name in (*USUAL, *ODD) for place in ("projector", "language")]


def path_of(model: Any, place: str) -> str:
    row = BEHIND[model.config.model_type]
    return row.projector if place == "projector" else f"{row.layers}.0"


def vision_sae(model: Any, layer: Any, tokens: Any = None, seed: int = 0) -> VisionSAE:
    point = find_hook_point(model, layer)
    sae = VisionSAE.wrap(make_sae("standard", d_in=point.d_in, seed=seed), point, tokens and TokenPolicy(edit=tokens))
    sae.concepts = ConceptBank(
        [Concept("red", tuple(range(12))), Concept("blue", tuple(range(8, 30))), Concept("tiger", tuple(range(30, 48)))]
    )
    return sae


def eraser(model: Any, layer: Any, concepts: Any = ("red", "blue"), tokens: Any = None, **options: Any) -> ConceptEraser:
    return ConceptEraser(model, vision_sae(model, layer, tokens), list(concepts), gamma=-4.0, **options)


@torch.no_grad()
def first_logits(model: Any, inputs: Any, **options: Any) -> Tensor:
    inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3, **options}
    return torch.stack(model.generate(**inputs, **how, min_new_tokens=3).logits)


def traces(model: Any) -> Any:
    """All that could be left in a model, but for what Qwen-VL itself notes of every batch."""
    return {name: {k: v for k, v in kept.items() if k != "rope_deltas"} for name, (_, kept) in snapshot(model).items()}


def far(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


# Several blocks of a tower. ---------------------------------------------------------------------------------------------


def test_edits_at_two_blocks_both_take_effect_in_any_order(any_model):
    inputs, before = model_inputs(), snapshot(any_model)
    a, b = (eraser(any_model, f"{TOWER}.{i}") for i in (1, 2))
    alone = [families.score(any_model, inputs)]
    for one in (a, b):
        with one:
            alone.append(families.score(any_model, inputs))
    together = []
    with a, b:
        together.append(families.score(any_model, inputs))
        assert a.status().proven
        assert b.status().proven
        assert (a.status().edits_run, b.status().edits_run) == (1, 1)
    with b, a:
        together.append(families.score(any_model, inputs))
    for both in (Erasers((a, b)), Erasers((b, a)), Erasers((Erasers((b,)), a, b))):
        with both:
            together.append(families.score(any_model, inputs))
    assert all(torch.equal(together[0], other) for other in together[1:])
    assert all(far(x, y) for x, y in itertools.combinations([*alone, together[0]], 2))
    after = snapshot(any_model)
    assert {name: kind for name, (kind, _) in after.items()} == {name: kind for name, (kind, _) in before.items()}
    assert torch.equal(families.score(any_model, inputs), alone[0])


def test_after_several_a_warm_model_is_the_very_same(model):
    before = snapshot(model)
    with Erasers(eraser(model, path) for path in (*THREE, f"{TOWER}.0")):
        families.score(model, model_inputs())
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), Erasers(eraser(model, path) for path in THREE):
        families.score(model, model_inputs())
        raise ZeroDivisionError
    assert snapshot(model) == before


@pytest.mark.parametrize("paths", [(f"{TOWER}.1", f"{TOWER}.2"), THREE])
def test_rows_forget_their_own_at_every_hook_point(model, paths):
    inputs = model_inputs(2)
    several = Erasers(eraser(model, path, ()) for path in paths)
    bare = families.score(model, inputs)
    with several.for_rows([["red"], []]) as on:
        rows = families.score(model, inputs)
        assert on.status().proven
    with Erasers(eraser(model, path, ["red"]) for path in paths):
        whole = families.score(model, inputs)
    torch.testing.assert_close(rows[0], whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], bare[1], rtol=1e-4, atol=1e-4)
    assert far(rows[0], bare[0])


# Erasers as one. --------------------------------------------------------------------------------------------------------


@cache
def _pool() -> tuple[list[ConceptEraser], Any]:
    model = build_llava()
    saes = [vision_sae(model, path) for path in THREE]
    return [ConceptEraser(model, sae, [name]) for sae in saes for name in ("red", "blue")], model


def _nested() -> Any:
    leaves = st.sampled_from(range(6))
    return st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8)


def _flat(tree: Any) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for part in tree for leaf in _flat(part)]


def _built(tree: Any) -> Any:
    return _pool()[0][tree] if isinstance(tree, int) else Erasers(map(_built, tree))


def _said(several: Erasers) -> dict[str, set[int]]:
    assert len({one.hook_point.path for one in several}) == len(several), "one of each SAE"
    return {one.hook_point.path: set(one.features) for one in several}


@given(st.lists(_nested(), min_size=1, max_size=4))
def test_nesting_order_and_repetition_play_no_part(tree):
    built, leaves = Erasers(map(_built, tree)), set(_flat(tree))
    assert _said(built) == _said(Erasers(_pool()[0][leaf] for leaf in sorted(leaves)))
    union: dict[str, set[int]] = {}
    for leaf in leaves:
        one = _pool()[0][leaf]
        union.setdefault(one.hook_point.path, set()).update(one.features)
    assert _said(built) == union


def test_the_bar_joins_erasers_of_different_saes(model):
    a, b, c = (eraser(model, path) for path in THREE)
    for joined in (a | b | c, a | (b | c), (c | b) | a, c | a | (a | b)):
        assert isinstance(joined, Erasers)
        assert _said(joined) == _said(Erasers((a, b, c)))
    assert isinstance(a | a, ConceptEraser)
    with pytest.raises(EditError, match="different models"):
        a | eraser(build_llava(seed=1), PROJECTOR)


def test_if_one_cannot_be_put_on_none_is(model):
    before = snapshot(model)
    inert = eraser(model, -1)  # the last block, which LLaVA does not read
    for several in (Erasers((eraser(model, PROJECTOR), inert)), Erasers((inert, eraser(model, PROJECTOR)))):
        with pytest.raises(IneffectiveEraserError, match="changes nothing"):
            several.attach()
        assert not several.attached
        assert not any(one.attached for one in several)
        assert snapshot(model) == before


def test_all_come_off_also_when_one_complains(model):
    inputs = model_inputs()
    several = Erasers(eraser(model, path) for path in THREE).attach()
    projector = model.get_submodule(PROJECTOR)
    hooks = dict(projector._forward_hooks)
    projector._forward_hooks.clear()
    with pytest.raises(IneffectiveEraserError, match="gone"):
        several.detach()
    assert not attachments(model)
    assert not any(one.attached for one in several)
    del hooks
    with Erasers(eraser(model, path) for path in THREE):
        families.score(model, inputs)


def test_they_decorate_functions_and_generators(model):
    inputs, several = model_inputs(), Erasers(eraser(model, path) for path in THREE)
    with several:
        expected = families.score(model, inputs)

    @several
    def ask() -> Tensor:
        return families.score(model, inputs)

    @several
    def ask_twice() -> Any:
        yield families.score(model, inputs)
        yield families.score(model, inputs)

    assert torch.equal(ask(), expected)
    assert all(torch.equal(answer, expected) for answer in ask_twice())
    assert not several.attached


def test_what_they_say_of_themselves(model):
    with Erasers(eraser(model, path) for path in THREE) as several:
        families.score(model, model_inputs())
        text = str(several.status())
    assert all(path in text and path in repr(several) for path in THREE)
    assert "the projector" in text
    assert "language layer 1 of 2" in text
    assert several.status().problem is None


def test_rows_of_several_are_named(model):
    several = Erasers(eraser(model, path) for path in THREE)
    with pytest.raises(EditError, match="is no name"):
        several.for_rows([[(1, 2)], []])
    with pytest.raises(UnknownConceptError):
        several.for_rows([["rde"]])
    with pytest.raises(EditError, match="at least one"):
        Erasers(())


# Tower, projector and language together. --------------------------------------------------------------------------------


def test_at_all_three_places_each_adds_its_part(any_model):
    inputs = model_inputs(2)
    ones = [eraser(any_model, path) for path in THREE]
    subsets = [c for n in range(4) for c in itertools.combinations(ones, n)]
    scores, generated = [], []
    for subset in subsets:
        results = []
        for order in (subset, subset[::-1]):
            if not subset:
                results.append((families.score(any_model, inputs), first_logits(any_model, inputs, num_beams=2)))
                continue
            with Erasers(order) as on:
                results.append((families.score(any_model, inputs), first_logits(any_model, inputs, num_beams=2)))
                assert on.status().proven
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        scores.append(results[0][0])
        generated.append(results[0][1][0])
    assert all(far(x, y) for x, y in itertools.combinations(scores, 2))
    assert all(far(x, y) for x, y in itertools.combinations(generated, 2))


def test_null_edits_at_all_three_places_change_no_bit(any_model):
    inputs = model_inputs()
    bare = families.score(any_model, inputs), first_logits(any_model, inputs)
    for options in ({"concepts": ()}, {"gamma": 1.0}):
        with Erasers(
            ConceptEraser(any_model, vision_sae(any_model, path), **{"concepts": ["red"], **options}) for path in THREE
        ):
            erased = families.score(any_model, inputs), first_logits(any_model, inputs)
        assert all(torch.equal(x, y) for x, y in zip(bare, erased, strict=True))


# Projectors and language layers in many families. -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_it_erases_behind_the_tower(name, place):
    """Takes effect cold, warm and in `generate`, by row too, with proof; and leaves no trace."""
    scores = {}
    for warm in (False, True):
        model, inputs = families.build(name)
        if warm:
            bare = families.score(model, inputs)
            before = traces(model)
        with eraser(model, path_of(model, place)) as on:
            scores[warm] = families.score(model, inputs)
            status = on.status()
        assert (status.proven, status.problem, status.images_seen, status.edits_run) == (True, None, 1, 1)
    assert torch.equal(scores[True], scores[False])
    assert far(bare, scores[True])
    assert traces(model) == before
    assert torch.equal(families.score(model, inputs), bare)

    nothing, whole = (eraser(model, path_of(model, place), concepts) for concepts in ((), ("red",)))
    with whole:
        red = families.score(model, inputs)
    with nothing:
        assert torch.equal(families.score(model, inputs), bare)
    with nothing.for_rows([["red"], []]):
        rows = families.score(model, inputs)
    torch.testing.assert_close(rows[0], red[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows[1], bare[1], rtol=1e-3, atol=1e-3)
    assert far(rows[0], bare[0])


@pytest.mark.parametrize(("name", "place"), [pair for pair in PLACES if pair[0] in USUAL])
def test_it_erases_behind_the_tower_in_generate(name, place):
    model, inputs = families.build(name)
    bare = first_logits(model, inputs)
    with eraser(model, path_of(model, place)) as on:
        erased, beams = first_logits(model, inputs), first_logits(model, inputs, num_beams=2)
        status = on.status()
    assert (status.proven, status.images_seen, status.problem) == (True, 2, None)
    assert status.edits_run == (2 if place == "projector" else 6), "once an image, or once a step"
    assert far(bare, erased)
    torch.testing.assert_close(beams[0][::2], erased[0], rtol=1e-3, atol=1e-3)
    nothing = eraser(model, path_of(model, place), ())
    with nothing.for_rows([["red", "blue"], []]):
        rows = first_logits(model, inputs, num_beams=2)
    torch.testing.assert_close(rows[0], torch.stack([erased[0][0]] * 2 + [bare[0][1]] * 2), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(BEHIND))
def test_nothing_goes_by_the_places_behind_the_tower(family):
    """With what a place gives held at one value, no image matters any more."""
    name = next((name for name, spec in families.FAMILIES.items() if name == family), None)
    if name is None:
        pytest.skip("no tiny model of this one; the table gives it the row of its twin")
    model, inputs = families.build(name)
    row = BEHIND[family]
    n = len(model.get_submodule(row.layers))
    for path in filter(None, (row.projector, f"{row.layers}.0", f"{row.layers}.{n - 1}")):
        point = find_hook_point(model, path)
        calls: list[Any] = []

        def constant(module: nn.Module, args: Any, output: Any, calls: list[Any] = calls) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            calls.append(first)
            blank = torch.linspace(-1, 1, first.numel()).view_as(first)
            return (blank, *output[1:]) if isinstance(output, tuple) else blank

        handle = point.module(model).register_forward_hook(constant, prepend=True)
        scores = [families.score(model, some) for some in (inputs, families.other_image(inputs))]
        handle.remove()
        assert torch.equal(*scores), path
        assert len(calls) == 2, "once a forward"
        assert calls[0].shape[-1] == point.d_in
        with eraser(model, path) as on:
            families.score(model, inputs)
            assert on.status().proven


def test_the_page_lists_the_families_with_places_behind_the_tower():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    lines = page.partition("## Behind the tower")[2].splitlines()
    for family, row in BEHIND.items():
        twin = family.removesuffix("_moe")
        (line,) = [line for line in lines if re.search(rf"^\|.*\b{twin}\b", line)]
        assert f"`{row.layers}`" in line
        assert row.projector is None or f"`{row.projector}`" in line


def test_what_has_no_place_behind_the_tower_says_so():
    for name in ("mllama", "qwen3_vl", "clip"):
        model, _ = families.build(name)
        with pytest.raises(HookPointError, match=r"Behind the tower .* no place is known"):
            find_hook_point(model, "model.language_model.layers.0")
    model, _ = families.build("lfm2_vl")
    with pytest.raises(HookPointError, match=r"language layers .* its projector cannot be edited"):
        find_hook_point(model, PROJECTOR)
    model, _ = families.build("llava")
    for path in (f"{LAYERS}.2", LAYERS, f"{LAYERS}.0.mlp", f"{PROJECTOR}.linear_1"):
        with pytest.raises(HookPointError, match=rf"{LAYERS}\.0 to {LAYERS}\.1 and the projector {PROJECTOR}"):
            find_hook_point(model, path)


# Never silent. ----------------------------------------------------------------------------------------------------------


def blind(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, output: torch.ones_like(output))


@pytest.mark.parametrize("path", [PROJECTOR, f"{LAYERS}.0"])
@pytest.mark.parametrize("run", [first_logits, families.score])
def test_an_edit_that_is_overwritten_raises(path, run):
    model, inputs = families.build("llava")
    blind(model.get_submodule(path))
    with pytest.raises(IneffectiveEraserError, match="does not reach"), eraser(model, path):
        run(model, inputs)


@pytest.mark.parametrize("path", [PROJECTOR, f"{LAYERS}.0"])
@pytest.mark.parametrize("seen_before", [False, True])
def test_a_place_that_is_not_called_raises(path, seen_before):
    model, inputs = families.build("llava")
    module = model.get_submodule(path)
    kind = type(module)

    class Sly(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    if seen_before:
        with eraser(model, path):
            families.score(model, inputs)
    on = eraser(model, path).attach()
    module.__class__ = Sly
    with pytest.raises(IneffectiveEraserError, match=path):
        families.score(model, inputs)
    with pytest.raises(IneffectiveEraserError, match=path):
        on.detach()


def test_features_made_before_the_projectors_edit_are_refused():
    model, inputs = families.build("llava")
    pixels = inputs.pop("pixel_values")
    made = torch.cat(list(model.get_image_features(pixel_values=pixels).pooler_output))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == families.IMG] = made
    handed = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with pytest.raises(IneffectiveEraserError, match="inputs_embeds"), eraser(model, PROJECTOR):
        families.score(model, handed)
    bare = families.score(model, handed)
    with eraser(model, f"{LAYERS}.0"):  # what it edits is behind them
        assert far(families.score(model, handed), bare)


# Which tokens of a language layer. --------------------------------------------------------------------------------------


def captured(model: Any, path: str, run: Any) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, output: seen.append(output))
    run()
    handle.remove()
    return seen[0]


def test_only_the_images_positions_are_edited_if_only_they_are_meant():
    model, inputs = families.build("llava")
    path, where = f"{LAYERS}.0", inputs["input_ids"] == families.IMG
    before = captured(model, path, lambda: families.score(model, inputs))
    with eraser(model, path, tokens="patches", allow_bypass=True) as on:
        after = captured(model, path, lambda: families.score(model, inputs))
        assert on.status().proven
    assert torch.equal(before[~where], after[~where])
    assert ((before - after).abs().amax(-1) > 1e-3)[where].all()
    with eraser(model, path):
        every = captured(model, path, lambda: families.score(model, inputs))
    torch.testing.assert_close(every[where], after[where])
    assert ((before - every).abs().amax(-1) > 1e-3).all()


def test_an_edit_of_the_images_positions_alone_is_one_in_part():
    model, inputs = families.build("llava")
    with pytest.raises(IneffectiveEraserError, match="words have looked at the image in 1 layers"):
        eraser(model, f"{LAYERS}.0", tokens="patches").attach()
    for allow in (False, True):
        with pytest.raises(IneffectiveEraserError, match="the last layer"):
            eraser(model, f"{LAYERS}.1", tokens="patches", allow_bypass=allow).attach()
    bare = families.score(model, inputs)
    with eraser(model, f"{LAYERS}.1") as on:  # every token: the last layer will do
        assert far(families.score(model, inputs), bare)
        assert on.status().proven


def test_words_alone_are_left_alone_if_only_the_image_is_meant():
    model, inputs = families.build("llava")
    ids = torch.tensor([[1, 5, 6]])
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bare = families.score(model, words), first_logits(model, words)
    on = eraser(model, f"{LAYERS}.0", tokens="patches", allow_bypass=True)
    with on:
        assert torch.equal(families.score(model, words), bare[0])
        assert torch.equal(first_logits(model, words), bare[1])
        assert on.status().edits_run == 0
        first_logits(model, inputs)
        assert on.status().edits_run == 1, "the steps behind the first have no image"
    with eraser(model, f"{LAYERS}.0"):
        assert far(families.score(model, words), bare[0])


def test_without_ids_the_images_positions_are_not_guessed():
    model, inputs = families.build("llava")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    on = eraser(model, f"{LAYERS}.0", tokens="patches", allow_bypass=True)
    with on, pytest.raises(EditError, match=r"input_ids.*edit='all'"):
        model(inputs_embeds=embeds)
    with on, pytest.raises(EditError, match="input_ids"):  # not through the model at all
        model.model.language_model(inputs_embeds=embeds)


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), min_size=2, max_size=3))
def test_rows_with_their_images_anywhere_are_as_if_alone(rows):
    """Words in front of the image, images, and whether the row forgets; padded on the left, as for `generate`."""
    model = _double()
    texts = [[1, *[7] * words, *[families.IMG] * (16 * images), 8, 9] for words, images, _ in rows]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    n = sum(images for _, images, _ in rows)
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def inputs(row: slice, images: Tensor) -> dict[str, Tensor]:
        mask = (ids[row] != 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        made = {"input_ids": ids[row], "attention_mask": mask, "position_ids": positions}
        return {**made, "pixel_values": images} if len(images) else made

    for tokens in ("patches", "all"):
        on = ConceptEraser(model, _double_sae(tokens), [], gamma=-4.0, allow_bypass=True)
        with on.for_rows([["red"] if forgets else [] for *_, forgets in rows]):
            together = families.score(model, inputs(slice(None), pixels))
        with ConceptEraser(model, on.sae, ["red"], gamma=-4.0, allow_bypass=True):
            all_forget = families.score(model, inputs(slice(None), pixels))
        spent = 0
        for r, (_, images, forgets) in enumerate(rows):
            alone = inputs(slice(r, r + 1), pixels[spent : spent + images])
            spent += images
            with ConceptEraser(model, on.sae, ["red"] if forgets else [], gamma=-4.0, allow_bypass=True):
                expected = families.score(model, alone)
            own = ids[r] != 0
            torch.testing.assert_close(together[r][own], expected[0][own], rtol=1e-4, atol=1e-4)
            if forgets:
                torch.testing.assert_close(all_forget[r][own], expected[0][own], rtol=1e-4, atol=1e-4)


@cache
def _double() -> Any:
    return families.build("llava")[0].double()


@cache
def _double_sae(tokens: str) -> VisionSAE:
    point = find_hook_point(_double(), f"{LAYERS}.0")
    sae = VisionSAE.wrap(make_sae("standard", dtype="float64"), point, TokenPolicy(edit=tokens))
    sae.concepts = ConceptBank([Concept("red", tuple(range(30)))])
    return sae


# Is it the right model? -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PROJECTOR, f"{LAYERS}.0"])
def test_an_sae_behind_the_tower_knows_its_model(path, tmp_path):
    model, other = build_llava(), build_llava(seed=1)
    point = find_hook_point(model, path)
    assert HookPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point
    sae = VisionSAE.wrap(make_sae(), point, model=model)
    sae.save(tmp_path / "sae")
    sae = VisionSAE.load(tmp_path / "sae")
    assert sae.locate(model) == point
    assert sae.locate(model.model).path == path.removeprefix("model."), "the same without its head"
    with pytest.raises(SAEMismatchError, match="weights are others"):
        sae.locate(other)
    same_tower = build_llava()
    with torch.no_grad():  # another tune of the same checkpoint, behind the tower only
        same_tower.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    with pytest.raises(SAEMismatchError, match="weights are others"):
        sae.locate(same_tower)
    assert sae.locate(other, allow_mismatch=True) == point


def test_a_language_layer_is_not_taken_for_another():
    model = build_llava()
    sae = VisionSAE.wrap(make_sae(), find_hook_point(model, f"{LAYERS}.0"), model=model)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(SAEMismatchError):
        sae.locate(model)


# Reading, training, learning. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*USUAL, "pixtral", "aya_vision", "llava_next", "qwen2_5_vl"])
def test_the_projector_is_read_as_the_model_computes_it(name):
    model, inputs = families.build(name)
    point = find_hook_point(model, path_of(model, "projector"))
    expected = captured(model, point.path, lambda: families.score(model, inputs)).reshape(-1, point.d_in)
    before = traces(model)
    words = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    images = {key: value for key, value in inputs.items() if key not in words}
    for given_inputs in (inputs, images):
        read = torch.cat(list(read_activations(model, [given_inputs], point)))
        torch.testing.assert_close(read, expected)
    assert traces(model) == before


@pytest.mark.parametrize("name", USUAL)
def test_language_layers_are_read_where_the_image_is(name):
    model, inputs = families.build(name)
    point = find_hook_point(model, path_of(model, "language"))
    expected = captured(model, point.path, lambda: families.score(model, inputs))
    where = inputs["input_ids"] == families.IMG
    torch.testing.assert_close(torch.cat(list(read_activations(model, [inputs], point))), expected[where])
    every = torch.cat(list(read_activations(model, [inputs], point, tokens="all")))
    torch.testing.assert_close(every, expected[inputs["attention_mask"].bool()])
    last = torch.cat(list(read_activations(model, [inputs], point, tokens="last")))
    rows = torch.arange(len(where))
    torch.testing.assert_close(last, expected[rows, [int(row.nonzero()[-1]) for row in where]])
    with pytest.raises(TokenPolicyError, match="no class token"):
        list(read_activations(model, [inputs], point, tokens="class"))
    with pytest.raises(ImagesError, match="input_ids"):
        list(read_activations(model, [{"pixel_values": inputs["pixel_values"]}], point))


@pytest.mark.parametrize("path", [PROJECTOR, f"{LAYERS}.0"])
@pytest.mark.parametrize("with_words", [True, False])
def test_a_concept_is_trained_learned_and_erased_behind_the_tower(model, path, with_words):
    if path != PROJECTOR and not with_words:
        pytest.skip("a language layer reads text")
    batches = [model_inputs(4, seed=seed) for seed in range(3)]
    if not with_words:
        batches = [{"pixel_values": batch["pixel_values"]} for batch in batches]
    point = find_hook_point(model, path)
    sae = train_sae(model, batches, hook_point=point, epochs=4, batch_size=4, expansion=2, progress=False)
    assert sae.hook_point == point
    assert sae.tokens.edit == ("patches" if path == PROJECTOR else "all")
    positives = [{**batch, "pixel_values": batch["pixel_values"] + 1.0} for batch in batches]
    concept = learn_concept(model, sae, "bright", positives, batches, k=8)
    assert concept.features
    bare = families.score(model, model_inputs())
    with ConceptEraser(model, sae, ["bright"], gamma=-50.0) as on:
        assert not torch.equal(families.score(model, model_inputs()), bare)
        assert on.status().proven


def test_towers_are_found_as_ever_beside_places_behind_them():
    model = build_llava()
    assert [tower.path for tower in find_towers(model)] == ["model.vision_tower"]
    assert "place" not in find_hook_point(model).to_dict(), "files of towers are as they were"
    with pytest.raises(ValueError, match="unknown place"):
        HookPoint.from_dict({**find_hook_point(model, PROJECTOR).to_dict(), "place": "attic"})
