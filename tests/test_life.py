"""The life of an eraser: threads, tasks, generators, gradients, precision, copies, pipelines; and what it says of itself."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import io
import math
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
from sauce_hooks import Concept, ConceptBank, ConceptEraser, VisionSAE, find_hook_point
from sauce_hooks.errors import EditError, EraserStateError, IneffectiveEraserError
from tiny import D_SAE, build_llava, logits, make_sae, make_vision_sae, model_inputs, snapshot

SCOPES = ("model", "task")


def erased(model: Any, sae: Any, concepts: Sequence[Any] = ("red",), inputs: Any = None, **options: Any) -> Tensor:
    with ConceptEraser(model, sae, list(concepts), **options):
        return logits(model, inputs)


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function gives in a thread of its own, with a context of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def text(*ids: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, *ids]]), "attention_mask": torch.ones(1, 1 + len(ids), dtype=torch.long)}


@pytest.fixture
def state(model: Any) -> Any:
    """Afterwards nothing may be left in the model."""
    before = snapshot(model)
    yield before
    assert snapshot(model) == before


# Threads. ------------------------------------------------------------------------------------------------------------

TIMES = 200


@torch.no_grad()
def said(model: Any, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences[0, -2:].tolist(), torch.cat(out.logits)


@pytest.mark.slow
def test_eight_threads_of_200_generations_never_hear_of_one_anothers_concepts(model, sae, state):
    """Each thread has concepts of its own, one has none; every generation is what it is with no other thread about."""
    sets = [None, [(1, 2, 3)], [(3, 4, 5)], *([range(6 * i, 6 * i + 9)] for i in range(1, 5)), [range(D_SAE)]]
    images = [model_inputs(1, seed=i) for i in range(4)]

    def eraser(concepts: Any) -> ExitStack | ConceptEraser:
        return ExitStack() if concepts is None else ConceptEraser(model, sae, concepts, gamma=-3.0, scope="task")

    def expected(concepts: Any) -> list[tuple[list[int], Tensor]]:
        with eraser(concepts):
            return [said(model, inputs) for inputs in images]

    all_expected = [expected(concepts) for concepts in sets]
    for i, a in enumerate(all_expected):  # a leak would be seen
        assert all(not torch.allclose(a[0][1], b[0][1], atol=1e-3) for b in all_expected[:i])
    start = threading.Barrier(len(sets))

    def work(i: int) -> int:
        torch.set_num_threads(1)
        start.wait()
        wrong = 0
        for n in range(TIMES):
            with eraser(sets[i]):
                tokens, scores = said(model, images[n % 4])
            right = all_expected[i][n % 4]
            wrong += tokens != right[0] or not torch.allclose(scores, right[1], atol=1e-4)
        return wrong

    with ThreadPoolExecutor(len(sets)) as pool:
        assert list(pool.map(work, range(len(sets)))) == [0] * len(sets)


def test_one_eraser_entered_by_many_threads_at_once_is_each_ones_own(model, sae, state):
    """Whichever of them leaves first takes off its own, and no other's."""
    eraser, bare, expected = ConceptEraser(model, sae, ["red"], scope="task"), logits(model), erased(model, sae)
    n = 6
    inside, left = threading.Barrier(n), [threading.Event() for _ in range(n)]

    def work(i: int) -> tuple[bool, bool]:
        with eraser:
            inside.wait()
            if i:
                left[i - 1].wait()
            during = torch.equal(logits(model), expected)
        after = torch.equal(logits(model), bare)
        left[i].set()
        return during, after

    with ThreadPoolExecutor(n) as pool:
        assert list(pool.map(work, reversed(range(n)))) == [(True, True)] * n
    assert not eraser.attached


def test_scope_task_reaches_no_other_thread_and_scope_model_every_one(model, sae, state):
    bare, expected = logits(model), erased(model, sae)
    for scope, elsewhere in (("model", expected), ("task", bare)):
        with ConceptEraser(model, sae, ["red"], scope=scope):
            assert torch.equal(logits(model), expected)
            assert torch.equal(in_thread(lambda: logits(model)), elsewhere)


def test_scopes_mixed_on_one_model_add_up_where_both_are_on(model, sae, state):
    union, red, tiger = (erased(model, sae, names) for names in (["red", "tiger"], ["red"], ["tiger"]))

    def other() -> tuple[Tensor, Tensor, Tensor]:
        with ConceptEraser(model, sae, ["tiger"], scope="task"):
            both, main = logits(model), in_thread(lambda: logits(model))
        return both, main, logits(model)

    with ConceptEraser(model, sae, ["red"], scope="model"):
        both, main, after = in_thread(other)
        assert torch.equal(both, union)
        assert torch.equal(main, red)
        assert torch.equal(after, red)
    with ConceptEraser(model, sae, ["tiger"], scope="task"), ConceptEraser(model, sae, ["red"], scope="model"):
        assert torch.equal(logits(model), union)
        assert torch.equal(in_thread(lambda: logits(model)), red)
    assert torch.equal(erased(model, sae, ["tiger"], scope="task"), tiger)


@pytest.mark.parametrize("options", [({"gamma": -0.5}, {"gamma": -2.0}), ({}, {"preserve_error": False})], ids=str)
def test_what_another_task_states_contradicts_nothing(model, sae, options):
    mine, theirs = ({"scope": "task", **o} for o in options)
    expected = erased(model, sae, **theirs)
    with ConceptEraser(model, sae, ["red"], **mine):
        inside = logits(model)
        assert torch.equal(in_thread(lambda: erased(model, sae, **theirs)), expected)
        assert torch.equal(logits(model), inside)


def test_a_thread_with_the_callers_context_is_of_its_task(model, sae, state):
    with ConceptEraser(model, sae, ["red"], scope="task"):
        context = contextvars.copy_context()
        inside = in_thread(lambda: context.run(logits, model))
    assert torch.equal(inside, erased(model, sae))
    assert torch.equal(context.run(logits, model), logits(model))  # and off for it too, once it is left


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_attached_in_one_thread_can_be_detached_in_another(model, sae, state, scope):
    eraser, bare = ConceptEraser(model, sae, ["red"], scope=scope), logits(model)
    in_thread(eraser.attach)
    assert eraser.attached
    eraser.detach()
    assert torch.equal(logits(model), bare)


# asyncio. ------------------------------------------------------------------------------------------------------------


def test_interleaved_tasks_each_forget_their_own(model, sae, state):
    sets = [["red"], ["tiger"], ["blue"], ["red", "blue"], None]
    expected = [logits(model) if names is None else erased(model, sae, names) for names in sets]

    async def work(i: int) -> bool:
        with ExitStack() as stack:
            for name in sets[i] or ():
                stack.enter_context(ConceptEraser(model, sae, [name], scope="task"))
                await asyncio.sleep(0)
            right = []
            for _ in range(5):
                right.append(torch.equal(logits(model), expected[i]))
                await asyncio.sleep(0)
                right.append(torch.equal(await asyncio.to_thread(logits, model), expected[i]))
        await asyncio.sleep(0)
        return all(right) and torch.equal(logits(model), expected[-1])

    async def main() -> list[bool]:
        return await asyncio.gather(*(work(i) for i in range(len(sets))))

    assert asyncio.run(main()) == [True] * len(sets)


def test_a_task_started_inside_is_erased_until_it_is_left_outside(model, sae, state):
    bare, expected = logits(model), erased(model, sae)

    async def look(leave: asyncio.Event) -> tuple[Tensor, Tensor]:
        inside = logits(model)
        await leave.wait()
        return inside, logits(model)

    async def main() -> tuple[Tensor, Tensor]:
        leave = asyncio.Event()
        with ConceptEraser(model, sae, ["red"], scope="task"):
            task = asyncio.create_task(look(leave))
            await asyncio.sleep(0)
        leave.set()
        return await task

    inside, after = asyncio.run(main())
    assert torch.equal(inside, expected)
    assert torch.equal(after, bare)


def test_scope_model_is_on_for_every_task(model, sae, state):
    expected = erased(model, sae)

    async def main() -> Tensor:
        entered, seen = asyncio.Event(), asyncio.Event()

        async def other() -> Tensor:
            await entered.wait()
            answer = logits(model)
            seen.set()
            return answer

        task = asyncio.create_task(other())
        with ConceptEraser(model, sae, ["red"]):
            entered.set()
            await seen.wait()
        return await task

    assert torch.equal(asyncio.run(main()), expected)


def test_a_cancelled_task_leaves_nothing(model, sae, state):
    async def work() -> None:
        with ConceptEraser(model, sae, ["red"], scope="task"):
            logits(model)
            await asyncio.sleep(3600)

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


# Entered here, left there. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_generator_that_is_forgotten_leaves_its_eraser(model, sae, state, scope, elsewhere):
    """Closed by the garbage collector: wherever that runs."""

    def talk() -> Any:
        with ConceptEraser(model, sae, ["red"], scope=scope):
            yield logits(model)

    holder, expected = [talk()], erased(model, sae)
    assert torch.equal(next(holder[0]), expected)
    assert snapshot(model) != state

    def forget() -> None:
        holder.clear()
        gc.collect()

    in_thread(forget) if elsewhere else forget()
    assert snapshot(model) == state


@pytest.mark.parametrize("scope", SCOPES)
def test_an_async_generator_that_is_forgotten_leaves_its_eraser(model, sae, state, scope):
    expected = erased(model, sae)

    async def talk() -> Any:
        with ConceptEraser(model, sae, ["red"], scope=scope):
            yield logits(model)

    async def main() -> None:
        talking = talk()
        async for answer in talking:
            assert torch.equal(answer, expected)
            break
        assert snapshot(model) != state  # until the loop finalises it, in a task of its own

    asyncio.run(main())


def test_an_eraser_left_in_a_foreign_context_takes_off_no_other_tasks(model, sae):
    eraser, expected = ConceptEraser(model, sae, ["red"], scope="task"), erased(model, sae)

    async def talk() -> Any:
        with eraser:
            yield

    async def main() -> Tensor:
        talking, go_on = talk(), asyncio.Event()

        async def hold() -> Tensor:
            with eraser:
                await go_on.wait()
                return logits(model)

        await asyncio.create_task(_first(talking))
        holding = asyncio.create_task(hold())
        await asyncio.sleep(0)
        await asyncio.create_task(_close(talking))
        go_on.set()
        return await holding

    assert torch.equal(asyncio.run(main()), expected)


async def _first(generator: Any) -> Any:
    return await anext(generator)


async def _close(generator: Any) -> None:
    await generator.aclose()


# Decorators. ---------------------------------------------------------------------------------------------------------


def by_function(eraser: ConceptEraser, model: Any) -> list[Tensor]:
    return [eraser(lambda: logits(model))()]


def by_method(eraser: ConceptEraser, model: Any) -> list[Tensor]:
    class Asker:
        @eraser
        def ask(self) -> Tensor:
            return logits(model)

    return [Asker().ask()]


def by_generator(eraser: ConceptEraser, model: Any) -> list[Tensor]:
    @eraser
    def talk() -> Any:
        yield logits(model)
        yield logits(model)

    return list(talk())


def by_coroutine(eraser: ConceptEraser, model: Any) -> list[Tensor]:
    @eraser
    async def ask() -> list[Tensor]:
        first = logits(model)
        await asyncio.sleep(0)
        return [first, logits(model), await asyncio.to_thread(logits, model)]

    return asyncio.run(ask())


def by_async_generator(eraser: ConceptEraser, model: Any) -> list[Tensor]:
    @eraser
    async def talk() -> Any:
        yield logits(model)
        await asyncio.sleep(0)
        yield logits(model)

    async def collect() -> list[Tensor]:
        return [answer async for answer in talk()]

    return asyncio.run(collect())


BY = [by_function, by_method, by_generator, by_coroutine, by_async_generator]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("by", BY, ids=lambda by: by.__name__)
def test_the_body_of_what_is_decorated_is_erased(model, sae, state, by, scope):
    expected, bare = erased(model, sae), logits(model)
    eraser = ConceptEraser(model, sae, ["red"], scope=scope)
    for _ in range(2):
        assert all(torch.equal(answer, expected) for answer in by(eraser, model))
        assert torch.equal(logits(model), bare)
        assert snapshot(model) == state


def test_a_decorated_function_keeps_its_name_and_a_generator_its_protocol(model, sae, state):
    @ConceptEraser(model, sae, ["red"])
    def talk(first: int) -> Any:
        """Doc."""
        got = yield first
        try:
            yield got
        except KeyError:
            yield "caught"
        return "returned"

    assert (talk.__name__, talk.__doc__) == ("talk", "Doc.")
    talking = talk(1)
    assert snapshot(model) == state  # the body has not begun
    assert next(talking) == 1
    assert talking.send("sent") == "sent"
    assert talking.throw(KeyError()) == "caught"
    with pytest.raises(StopIteration) as stopped:
        next(talking)
    assert stopped.value.value == "returned"


def test_an_exception_in_what_is_decorated_leaves_nothing(model, sae, state):
    @ConceptEraser(model, sae, ["red"])
    def fail() -> None:
        logits(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_a_decorated_async_generator_keeps_its_protocol(model, sae):
    @ConceptEraser(model, sae, ["red"])
    async def talk() -> Any:
        got = yield 1
        try:
            yield got
        except KeyError:
            yield "caught"

    async def main() -> None:
        talking = talk()
        assert await anext(talking) == 1
        assert await talking.asend("sent") == "sent"
        assert await talking.athrow(KeyError()) == "caught"

    asyncio.run(main())


def test_a_decorated_async_generator_that_is_closed_ends_erased(model, sae):
    expected, answers = erased(model, sae), []

    @ConceptEraser(model, sae, ["red"])
    async def talk() -> Any:
        try:
            yield
        finally:
            answers.append(logits(model))

    async def main() -> None:
        talking = talk()
        await anext(talking)
        await talking.aclose()
        assert len(answers) == 1

    asyncio.run(main())
    assert torch.equal(answers[0], expected)


def test_a_decorated_generator_is_erased_whatever_context_advances_it(model, sae):
    expected = erased(model, sae)

    @ConceptEraser(model, sae, ["red"], scope="task")
    def talk() -> Any:
        for _ in range(3):
            yield logits(model)

    talking = talk()
    answers = [contextvars.copy_context().run(next, talking) for _ in range(3)]
    assert all(torch.equal(answer, expected) for answer in answers)


@pytest.mark.parametrize("kind", ["callable object", "wrapped coroutine function", "wrapped generator function"])
def test_what_only_makes_its_body_is_erased_or_refused(model, sae, kind):
    expected = erased(model, sae)

    async def ask() -> Tensor:
        return logits(model)

    def talk() -> Any:
        yield logits(model)

    class Asker:
        async def __call__(self) -> Tensor:
            return logits(model)

    made: Any = {
        "callable object": Asker(),
        "wrapped coroutine function": lambda: ask(),
        "wrapped generator function": lambda: talk(),
    }[kind]
    try:
        if kind == "callable object":
            made.__name__ = "asker"
        body = ConceptEraser(model, sae, ["red"])(made)()
        answer = next(body) if "generator" in kind else asyncio.run(body)
    except (EraserStateError, TypeError):
        return
    assert torch.equal(answer, expected)


# Streaming. ----------------------------------------------------------------------------------------------------------


def streamed(model: Any, processor: Any, context: contextvars.Context | None = None) -> str:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(processor.tokenizer, timeout=30)
    options = {**model_inputs(1), "streamer": streamer, "max_new_tokens": 6, "do_sample": False}
    run = (lambda: context.run(model.generate, **options)) if context else (lambda: model.generate(**options))
    thread = threading.Thread(target=run)
    thread.start()
    words = "".join(streamer)
    thread.join()
    return words


def test_a_streamer_streams_what_is_erased(model, sae, processor, state):
    def whole() -> str:
        return processor.tokenizer.decode(model.generate(**model_inputs(1), max_new_tokens=6, do_sample=False)[0])

    strong = {"gamma": -3.0}
    with ConceptEraser(model, sae, [range(D_SAE)], **strong):
        expected = whole()
        assert streamed(model, processor) == expected
    assert expected != whole() == streamed(model, processor)
    bare = whole()
    with ConceptEraser(model, sae, [range(D_SAE)], scope="task", **strong):
        assert streamed(model, processor, contextvars.copy_context()) == expected
        assert streamed(model, processor) == bare  # a bare thread is not of this task


# Gradients. ----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, sae: Any, features: Sequence[int], gamma: float) -> Any:
    """Eq. 6 in plain torch, as a hook of the user's own."""
    inner, chosen = sae.sae, list(features)

    def edit(x: Tensor) -> Tensor:
        pre = (x - (inner.b_dec if inner.cfg.apply_b_dec_to_input else 0)) @ inner.W_enc + inner.b_enc
        z = pre.relu() if inner.cfg.architecture() == "standard" else pre * (pre > inner.threshold)
        return x + ((gamma - 1) * z[..., chosen]) @ inner.W_dec[chosen]

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], edit(output[:, 1:])], dim=1)  # not the class token

    return sae.hook_point.module(model).register_forward_hook(hook, prepend=True)


def gradients(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A number from the logits, and what it changes with: the pixels, and a weight before the edit."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in model_inputs().items()}
    pixels = inputs["pixel_values"].requires_grad_()
    model.zero_grad()
    loss = model(**inputs).logits.square().mean()
    loss.backward()
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad
    return loss.detach(), pixels.grad, weight.clone()


@pytest.mark.parametrize("preserve_error", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_the_gradient_goes_through_the_edit(architecture, preserve_error):
    model = build_llava().double()
    sae = make_vision_sae(model, architecture, dtype="float64")
    bare = gradients(model)
    eraser = ConceptEraser(model, sae, ["red", "tiger"], preserve_error=preserve_error)
    if preserve_error:
        handle = by_hand(model, sae, (1, 2, 3, 4, 5), -0.5)
        for got, expected, before in zip(_within(eraser, handle, model), gradients(model), bare, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
            assert not torch.allclose(got, before, rtol=1e-3)
        handle.remove()
    with eraser:  # against finite differences; the language side computes its norms in float32, the tower does not
        pixels = model_inputs()["pixel_values"].double().requires_grad_()
        direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        step = 1e-6

        def read(pixels: Tensor) -> Tensor:
            return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[3].square().mean()

        (slope,) = torch.autograd.grad(read(pixels), pixels)
        with torch.no_grad():
            rise = (read(pixels + step * direction) - read(pixels - step * direction)) / (2 * step)
    assert math.isclose(rise, (slope * direction).sum(), rel_tol=1e-5)


def _within(eraser: ConceptEraser, other: Any, model: Any) -> tuple[Tensor, ...]:
    """The gradients under the eraser, with the hook written by hand out of the way meanwhile."""
    table = other.hooks_dict_ref()
    hook = table.pop(other.id)
    with eraser:
        got = gradients(model)
    table[other.id] = hook
    table.move_to_end(other.id, last=False)
    return got


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_gradient_checkpointing_changes_no_gradient(reentrant, backward):
    """Nor does it matter whether the eraser is still on when blocks run again in the backward."""
    model = build_llava().double().train()
    sae = make_vision_sae(model, dtype="float64")

    def slopes() -> tuple[Tensor, Tensor]:
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in model_inputs().items()}
        pixels = inputs["pixel_values"].requires_grad_()
        model.zero_grad()
        with ConceptEraser(model, sae, [range(D_SAE)]):
            loss = model(**inputs).logits.square().mean()
            if backward == "inside":
                loss.backward()
        if backward == "outside":
            loss.backward()
        return pixels.grad, model.model.vision_tower.encoder.layers[2].mlp.fc1.weight.grad.clone()

    expected = slopes()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for got, wanted in zip(slopes(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_training_mode_is_kept_and_erased(model, sae):
    expected = erased(model, sae)  # no dropout in this model
    model.train()
    assert torch.equal(erased(model, sae), expected)
    assert all(module.training for module in model.modules())


def test_the_sae_gets_no_gradient_and_the_models_weights_do(model, sae):
    with ConceptEraser(model, sae, ["red"]):
        model(**model_inputs()).logits.sum().backward()
    assert all(p.grad is None for p in sae.sae.parameters())
    assert all(p.grad is not None for p in model.model.vision_tower.encoder.layers[0].parameters())


# Precision. ----------------------------------------------------------------------------------------------------------


def block_output(model: Any, sae: Any, inputs: dict[str, Tensor], *erasers: ConceptEraser) -> Tensor:
    """What goes on from the block, edited or not; a hook put in first runs after ours."""
    seen: list[Tensor] = []
    handle = sae.hook_point.module(model).register_forward_hook(lambda *args: seen.append(args[2]))
    with ExitStack() as stack:
        for eraser in erasers:
            stack.enter_context(eraser)
        logits(model, inputs)
    handle.remove()
    return seen[0]


PRECISIONS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("preserve_error", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_every_precision_the_edit_is_that_of_float32(precision, autocast, preserve_error):
    if autocast and precision == "float64":
        pytest.skip("autocast is for lower precision")
    dtype = PRECISIONS[precision]
    model = build_llava()
    sae = make_vision_sae(model)
    inputs = model_inputs()
    if not autocast:
        model = model.to(dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    eraser = ConceptEraser(model, sae, ["red", "tiger"], preserve_error=preserve_error)
    with torch.autocast("cpu", dtype, enabled=autocast):
        bare = block_output(model, sae, inputs)
        state = snapshot(model)
        edited = block_output(model, sae, inputs, eraser)
        assert not torch.equal(erased(model, sae, ["red", "tiger"], inputs), logits(model, inputs))
    assert edited.dtype == bare.dtype
    assert torch.equal(edited[:, 0], bare[:, 0])
    from sauce_hooks.erasure import MergedEdit

    expected = MergedEdit([eraser.edit])(bare[:, 1:].float())
    scale = expected.abs().amax().item()
    torch.testing.assert_close(
        edited[:, 1:].float(), expected, rtol=0, atol=scale * (1e-5 if precision == "float64" else 2e-2)
    )
    assert (edited - bare).abs().max() > 0.05 * scale
    assert snapshot(model) == state


def dynamic_int8(part: str) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
        target = model.get_submodule(part)
        for name, child in list(target.named_children()):
            setattr(target, name, quantize(child, {nn.Linear}, dtype=torch.qint8))
        return model

    return quantise


def torchao(config: str, **options: Any) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(model, getattr(library, config)(**options))
        return model

    return quantise


def quanto(weights: str) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        library = pytest.importorskip("optimum.quanto")
        library.quantize(model, weights=getattr(library, weights))
        library.freeze(model)
        return model

    return quantise


def bitsandbytes(kind: str) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        library = pytest.importorskip("bitsandbytes")
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _bnb_linear(library, kind, module))
        return model

    return quantise


def _bnb_linear(library: Any, kind: str, linear: nn.Linear) -> nn.Module:
    has_bias = linear.bias is not None
    if kind == "8-bit":
        new = library.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
    else:
        new = library.nn.Linear4bit(
            linear.in_features, linear.out_features, has_bias, compute_dtype=torch.float32, quant_type="nf4"
        )
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


QUANTISED = {
    "dynamic int8, language": dynamic_int8("model.language_model"),
    "dynamic int8, tower": dynamic_int8("model.vision_tower"),
    "dynamic int8": dynamic_int8(""),
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto 8-bit": quanto("qint8"),
    "quanto 4-bit": quanto("qint4"),
    "bitsandbytes 8-bit": bitsandbytes("8-bit"),
    "bitsandbytes 4-bit": bitsandbytes("4-bit"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantised", QUANTISED)
def test_a_quantised_model_is_erased(quantised):
    """The same edit of what its own block gives."""
    model = QUANTISED[quantised](build_llava())
    sae, inputs = make_vision_sae(model), model_inputs()
    before, _ = block_output(model, sae, inputs), logits(model, inputs)
    state, answer = snapshot(model), logits(model)
    eraser = ConceptEraser(model, sae, ["red", "tiger"])
    after = block_output(model, sae, inputs, eraser)
    from sauce_hooks.erasure import MergedEdit

    expected = before.clone()
    expected[:, 1:] = MergedEdit([eraser.edit])(before[:, 1:])
    torch.testing.assert_close(after, expected)
    with eraser:
        assert not torch.allclose(logits(model), answer, atol=1e-3)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert eraser.status().proven
    torch.testing.assert_close(logits(model), answer)
    assert snapshot(model) == state


# accelerate: hooks that replace forward. -----------------------------------------------------------------------------


def dispatched(model: Any, folder: Any) -> None:
    pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model: Any, folder: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def to_disk(model: Any, folder: Any) -> None:
    pytest.importorskip("accelerate").disk_offload(model, folder, torch.device("cpu"))


def spread(model: Any, folder: Any) -> None:
    places = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    pytest.importorskip("accelerate").dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("when", ["before", "after", "inside"])
@pytest.mark.parametrize("dispatch", [dispatched, offloaded, to_disk, spread], ids=lambda d: d.__name__)
def test_a_dispatched_model_is_erased_whenever_that_was_done(cold, tmp_path, dispatch, when):
    model, sae = cold, make_vision_sae(cold)
    twin = copy.deepcopy(cold)
    bare, expected = logits(twin), erased(twin, make_vision_sae(twin))
    if when == "before":
        dispatch(model, tmp_path)
    eraser = ConceptEraser(model, sae, ["red"])
    if when == "after":
        dispatch(model, tmp_path)
    with eraser:
        if when == "inside":
            dispatch(model, tmp_path)
        assert torch.equal(logits(model), expected)
        assert eraser.status().proven
    assert torch.equal(logits(model), bare)


def test_a_dispatch_undone_inside_changes_nothing(model, sae, tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    expected, bare = erased(model, sae), logits(model)
    dispatched(model, tmp_path)
    with ConceptEraser(model, sae, ["red"]):
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), bare)


# Copies. -------------------------------------------------------------------------------------------------------------


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(model: Any) -> Any:
    other = build_llava(model.config.text_config.vocab_size, seed=1)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "through", [copy.deepcopy, through_pickle, through_torch, through_state_dict], ids=lambda f: f.__name__
)
def test_the_copy_of_a_model_with_an_eraser_on_is_a_model_without(cold, through, scope):
    """A cold model: what transformers installs at the first forward cannot be pickled, eraser or none."""
    sae, bare = make_vision_sae(cold), logits(copy.deepcopy(cold))
    expected = erased(copy.deepcopy(cold), make_vision_sae(cold))
    with ConceptEraser(cold, sae, ["red"], scope=scope):
        twin = through(cold)
        assert torch.equal(logits(twin), bare)
        assert torch.equal(logits(cold), expected)
    assert torch.equal(logits(cold), bare)
    assert torch.equal(erased(twin, make_vision_sae(twin)), expected)  # which can be erased like any other
    assert torch.equal(logits(twin), bare)


def test_a_model_saved_with_an_eraser_on_is_saved_without(cold, sae, tmp_path):
    sae, bare = make_vision_sae(cold), logits(copy.deepcopy(cold))
    with ConceptEraser(cold, sae, ["red"]):
        cold.save_pretrained(tmp_path)
    assert torch.equal(logits(type(cold).from_pretrained(tmp_path).eval()), bare)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_copy_of_an_eraser_is_off_and_erases_the_same(model, sae, state, make, scope):
    eraser, expected, bare = ConceptEraser(model, sae, ["red"], scope=scope), erased(model, sae), logits(model)
    with eraser:
        twin = make(eraser)
        assert not twin.attached
        assert twin.status().attached == 0
    assert torch.equal(logits(twin.model), bare)
    with twin:
        assert torch.equal(logits(twin.model), expected)
        assert not eraser.attached
    with pytest.raises(EraserStateError):
        twin.detach()


def test_a_pickled_eraser_is_off_and_erases_the_same(cold):
    eraser = ConceptEraser(cold, make_vision_sae(cold), ["red"])
    with eraser:
        twin = pickle.loads(pickle.dumps(eraser))
    assert not twin.attached
    with twin:
        answer = logits(twin.model)
    with eraser:
        assert torch.equal(logits(cold), answer)


# pipeline("image-text-to-text"). --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_pipeline() -> tuple[Any, Any]:
    from transformers import pipeline

    from sauce_hooks import scenes

    model, processor, sae = scenes.load()
    # The bundled processor has no chat template: the prompt comes with its <image>.
    return pipeline("image-text-to-text", model=model, processor=processor, device="cpu"), sae


def answer(pipe: Any, image: Any, prompt: str) -> str:
    (out,) = pipe(
        images=[image], text=prompt, max_new_tokens=3, generate_kwargs={"do_sample": False}, return_full_text=False
    )
    return (out[0] if isinstance(out, list) else out)["generated_text"].strip()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_pipeline_forgets(scenes_pipeline, scope):
    from sauce_hooks import scenes

    pipe, sae = scenes_pipeline
    (scene,) = scenes.sample(1, seed=3, contains="tiger")
    prompt = scenes.yes_no_prompt("tiger")
    assert answer(pipe, scene.image, prompt) == "yes"
    with ConceptEraser(pipe.model, sae, ["tiger"], scope=scope) as eraser:
        assert answer(pipe, scene.image, prompt) == "no"
        assert eraser.status().proven
    assert answer(pipe, scene.image, prompt) == "yes"


def test_a_pipeline_with_a_chat_template_forgets(scenes_pipeline):
    from sauce_hooks import scenes

    pipe, sae = scenes_pipeline
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    (scene,) = scenes.sample(1, seed=3, contains="tiger")
    question = scenes.yes_no_prompt("tiger").replace("<image>", "")
    chat = [{"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": question}]}]

    def chatted() -> str:
        out = pipe(text=chat, max_new_tokens=3, generate_kwargs={"do_sample": False}, return_full_text=False)
        return out[0]["generated_text"].strip()

    pipe.processor.chat_template = template
    try:
        assert chatted() == "yes"
        with ConceptEraser(pipe.model, sae, ["tiger"]):
            assert chatted() == "no"
    finally:
        pipe.processor.chat_template = None


# What it says of itself. ---------------------------------------------------------------------------------------------


def test_status_before_inside_and_after(cold):
    sae = make_vision_sae(cold)
    eraser = ConceptEraser(cold, sae, ["red", "blue"], scope="task")
    status = eraser.status()
    assert (status.attached, status.scope, status.others, status.proven, status.problem) == (0, "task", 0, False, None)
    assert (status.path, status.block, status.n_blocks, status.reads) == (sae.hook_point.path, 2, 4, (2,))
    assert status.concepts == {"red": (1, 2, 3), "blue": (6, 7)}
    assert status.gammas == {1: -0.5, 2: -0.5, 3: -0.5, 6: -2.0, 7: -2.0}
    assert status.preserve_error
    assert status.rows is None
    assert "off" in str(status)
    with eraser:
        assert eraser.status().attached == 1
        assert "not yet seen: no image so far" in str(eraser.status())
        logits(cold, text(7, 8))
        assert not eraser.status().proven  # there was no image in it
        assert eraser.status().edits_run == 0
        logits(cold)
        logits(cold)
        inside = eraser.status()
        assert (inside.images_seen, inside.tower_runs, inside.edits_run, inside.proven) == (2, 2, 2, True)
        for words in ("on, scope 'task', 0 other", sae.hook_point.path, "3 of 4; read: 3", "γ = -2", "kept", "proven"):
            assert words in str(inside)
    assert eraser.status() == status
    assert inside.attached == 1  # a snapshot


def test_status_of_nested_erasers_counts_the_others(model, sae, state):
    red, tiger = ConceptEraser(model, sae, ["red"]), ConceptEraser(model, sae, ["tiger"], gamma=0.0)
    with red, red, tiger:
        assert (red.status().attached, red.status().others) == (2, 1)
        assert (tiger.status().attached, tiger.status().others) == (1, 2)
        assert "on 2 times" in str(red.status())
        assert tiger.status().gammas == {3: 0.0, 4: 0.0, 5: 0.0}


def test_an_eraser_that_is_on_twice_counts_a_run_once(model, sae):
    eraser = ConceptEraser(model, sae, ["red"])
    with eraser, eraser:
        logits(model)
        status = eraser.status()
    assert (status.images_seen, status.tower_runs, status.edits_run) == (1, 1, 1)


def test_generate_counts_as_a_call_with_images(model, sae):
    with ConceptEraser(model, sae, ["red"]) as eraser:
        model.generate(**model_inputs(1), max_new_tokens=2, do_sample=False)
        assert eraser.status().images_seen == 1


def test_status_tells_the_problem(model, sae, state):
    layers = model.model.vision_tower.encoder.layers
    spare, own = copy.deepcopy(layers[2]), layers[2]
    eraser = ConceptEraser(model, sae, ["red"])
    with pytest.raises(IneffectiveEraserError), eraser:
        layers[2] = spare
        with pytest.raises(IneffectiveEraserError) as told:
            logits(model)
        assert eraser.status().problem == str(told.value)
        assert str(told.value) in str(eraser.status())
    assert eraser.status().problem is None
    layers[2] = own


# Never silent, and never a false alarm. ------------------------------------------------------------------------------


def erasing(name: str) -> tuple[Any, dict[str, Any], ConceptEraser]:
    model, inputs = families.build(name)
    point = find_hook_point(model)
    sae = VisionSAE.wrap(make_sae(d_in=point.d_in), point)
    sae.concepts = ConceptBank([Concept("red", tuple(range(D_SAE)))])
    return model, inputs, ConceptEraser(model, sae, ["red"])


@torch.no_grad()
def round_the_tower(name: str, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, the image in them as the tower has encoded it before."""
    inputs = dict(inputs)
    if name in ("llava", "qwen2_vl"):
        extra = {k: inputs[k] for k in ("image_grid_thw",) if k in inputs}
        features = model.get_image_features(inputs.pop("pixel_values"), **extra, return_dict=True)
        return {**inputs, "mm_encoder_outputs": {"image": features}}
    if name == "mllama":
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        vision = model.model.vision_model(**{k: inputs.pop(k) for k in names}).last_hidden_state
        states = model.model.multi_modal_projector(vision).reshape(-1, vision.shape[-2], 32)
        return {**inputs, "cross_attention_states": states}
    if name == "idefics":
        vision = model.model.vision_model(inputs.pop("pixel_values").flatten(0, 1)).last_hidden_state
        return {**inputs, "image_encoder_embeddings": vision[:, None]}
    pixels = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values", "flattened_patches")}
    rest = {k: v for k, v in inputs.items() if k.startswith("decoder")}
    return {**rest, "encoder_outputs": model.get_encoder()(**pixels)}


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "mllama", "idefics", "t5gemma2", "pix2struct", "vision-encoder-decoder"]
)
def test_an_image_that_goes_round_the_tower_raises(name):
    model, inputs, eraser = erasing(name)
    given = round_the_tower(name, model, inputs)
    with torch.no_grad():
        model(**given)  # fine without an eraser
    state = snapshot(model)
    with pytest.raises(IneffectiveEraserError, match="round the vision tower"), eraser, torch.no_grad():
        model(**given)
    assert snapshot(model) == state
    with pytest.raises(IneffectiveEraserError), eraser:  # and again on leaving, should nobody have listened
        assert eraser.attached
        with pytest.raises(IneffectiveEraserError), torch.no_grad():
            model(**given)
    assert not eraser.attached


def test_embeddings_with_an_image_in_them_raise(model, sae, state):
    """What LLaVA's own forward makes of image and text, given instead of both."""
    inputs = model_inputs()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    del inputs["pixel_values"]
    with pytest.raises(IneffectiveEraserError, match="inputs_embeds"), ConceptEraser(model, sae, ["red"]):
        model(inputs_embeds=embeds, **inputs)


def test_an_image_that_goes_round_the_tower_raises_after_another_that_did_not(model, sae):
    inputs = model_inputs(1)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
    with pytest.raises(IneffectiveEraserError), ConceptEraser(model, sae, ["red"]):
        logits(model)
        model(**inputs, mm_encoder_outputs={"image": features})


def test_what_was_encoded_inside_may_go_round_the_tower(model, sae, state):
    inputs = model_inputs(1)
    expected = erased(model, sae, inputs=inputs)
    with ConceptEraser(model, sae, ["red"]), torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"))
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "mllama", "t5gemma2", "florence2", "llava_next", "gemma3", "idefics2"]
)
def test_text_alone_is_no_alarm_in_forward(name):
    model, inputs, eraser = erasing(name)
    given = {**text(5, 6, 7), **{k: v[:1] for k, v in inputs.items() if k == "decoder_input_ids"}}
    with torch.no_grad():
        bare = model(**given).logits
        with eraser:
            assert torch.equal(model(**given).logits, bare)
            assert not eraser.status().proven


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "mllama", "t5gemma2", "florence2", "llava_next", "gemma3", "idefics2"]
)
def test_text_alone_is_no_alarm_in_generate(name):
    model, _, eraser = erasing(name)

    def generated() -> Tensor:
        return model.generate(**text(5, 6, 7), max_new_tokens=3, do_sample=False)

    bare = generated()
    with eraser:
        assert torch.equal(generated(), bare)


@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "mllama", "t5gemma2", "florence2", "blip-2", "idefics2", "pix2struct"]
)
def test_generate_with_an_image_is_erased_and_is_no_alarm(name):
    model, inputs, eraser = erasing(name)
    given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}

    @torch.no_grad()
    def first() -> Tensor:
        out = model.generate(**given, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return out.logits[0]

    bare = first()
    with eraser:
        assert not torch.allclose(first(), bare, atol=1e-3)
        assert eraser.status().edits_run == 1
        assert torch.equal(first(), first())
    assert torch.equal(first(), bare)


def test_a_tower_run_on_its_own_is_edited_and_later_calls_are_still_proven(cold):
    sae, twin = make_vision_sae(cold), copy.deepcopy(cold)
    pixels = model_inputs()["pixel_values"]
    with torch.no_grad():
        bare = twin.model.vision_tower(pixels, output_hidden_states=True).hidden_states[3]
        features = twin.get_image_features(pixels).pooler_output
        with ConceptEraser(cold, sae, ["red", "tiger"]) as eraser:
            edited = cold.model.vision_tower(pixels, output_hidden_states=True).hidden_states[3]
            assert torch.equal(edited[:, 0], bare[:, 0])
            assert not torch.allclose(edited, bare, atol=1e-3)
            assert eraser.status().edits_run == 1
            assert eraser.status().images_seen == 0
            inside = cold.get_image_features(pixels).pooler_output
            assert not torch.allclose(torch.stack(list(inside)), torch.stack(list(features)), atol=1e-3)
            answer = logits(cold)
            assert eraser.status().proven
        assert torch.equal(answer, erased(twin, make_vision_sae(twin), ["red", "tiger"]))


def test_a_tower_that_was_proven_alone_is_not_yet_a_language_side_that_listens(cold):
    """A call of the whole model is proven by itself, however often the tower ran before."""
    sae = make_vision_sae(cold)
    with pytest.raises(IneffectiveEraserError, match="config has changed"), ConceptEraser(cold, sae, ["red"]):
        with torch.no_grad():
            cold.model.vision_tower(model_inputs()["pixel_values"], output_hidden_states=True)
        cold.config.vision_feature_layer = -3  # the block before
        logits(cold)


# Bad input. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_scope", SCOPES)
@pytest.mark.parametrize("second_scope", SCOPES)
def test_erasers_that_state_contradicting_factors(model, sae, state, first_scope, second_scope):
    first = ConceptEraser(model, sae, ["red"], gamma=-0.5, scope=first_scope)
    second = ConceptEraser(model, sae, ["tiger"], gamma=-2.0, scope=second_scope)  # feature 3 is in both
    expected, alone = erased(model, sae, ["red"], gamma=-0.5), erased(model, sae, ["tiger"], gamma=-2.0)
    with first:
        inside = snapshot(model)
        with pytest.raises(EditError, match=r"feature 3: contradicting factors: γ = -0\.5 and γ = -2\.0"):
            second.attach()
        assert not second.attached
        assert second.status().attached == 0
        assert snapshot(model) == inside
        assert torch.equal(logits(model), expected)
    assert snapshot(model) == state
    with second:
        assert torch.equal(logits(model), alone)


def test_erasers_that_state_contradicting_factors_do_not_merge(model, sae):
    first, second = ConceptEraser(model, sae, ["red"], gamma=-0.5), ConceptEraser(model, sae, ["tiger"], gamma=-2.0)
    with pytest.raises(EditError, match=r"feature 3: contradicting factors: γ = -0\.5 and γ = -2\.0"):
        _ = first | second
    assert not first.attached
    assert (ConceptEraser(model, sae, ["tiger"], gamma=-0.5) | first).features == (3, 4, 5, 1, 2)


def test_a_stated_factor_and_a_concepts_own_do_not_contradict(model, sae, state):
    own = Concept("own", (3, 9), gamma=-4.0)
    with ConceptEraser(model, sae, [own]), ConceptEraser(model, sae, ["red"], gamma=-0.5):
        got = logits(model)
    as_one = [Concept("a", (3, 9), gamma=-4.0), Concept("b", (1, 2), gamma=-0.5)]
    assert torch.equal(got, erased(model, sae, as_one))


def test_an_eraser_left_while_others_are_on_leaves_them_on(model, sae, state):
    outer, inner = ConceptEraser(model, sae, ["red"]), ConceptEraser(model, sae, ["tiger"])
    tiger, bare = erased(model, sae, ["tiger"]), logits(model)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # while the inner is on
    assert torch.equal(logits(model), tiger)
    inner.__exit__(None, None, None)
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("scope", SCOPES)
def test_detaching_more_often_than_attaching_raises_and_breaks_nothing(model, sae, state, scope):
    eraser, other = ConceptEraser(model, sae, ["red"], scope=scope), ConceptEraser(model, sae, ["tiger"], scope=scope)
    tiger = erased(model, sae, ["tiger"])
    with other:
        eraser.attach().attach()
        eraser.detach()
        assert eraser.attached
        eraser.detach()
        for _ in range(2):
            with pytest.raises(EraserStateError, match="not attached"):
                eraser.detach()
        assert torch.equal(logits(model), tiger)


def test_a_keyboard_interrupt_in_the_model_leaves_nothing(model, sae, state):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), ConceptEraser(model, sae, ["red"]):
        logits(model)
    handle.remove()
    assert snapshot(model) == state
