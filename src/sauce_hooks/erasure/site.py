"""The one place that touches a model: what is hooked while an eraser is on, and the account of it. See docs/effect.md.

The hook on a block goes before all others (`prepend=True`): transformers 5 records `hidden_states` with permanent hooks of
its own, LLaVA reads what they recorded, and a hook behind them would change nothing at all.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary, ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sauce_hooks.erasure.apply import edit_tokens, edited_positions
from sauce_hooks.erasure.attachment import Attachment, of_this_task
from sauce_hooks.erasure.compiled import opaque, uncompiled
from sauce_hooks.erasure.effect import Again, Probe, Reader, disturbed, finite, tensors
from sauce_hooks.erasure.merging import Edit, MergedEdit
from sauce_hooks.erasure.rows import Batch
from sauce_hooks.errors import IneffectiveEraserError
from sauce_hooks.hookpoint import (
    FEATURES,
    HANDED_IN,
    HOW_IT_READS,
    PIXELS,
    VIDEOS,
    HookPoint,
    TowerPlace,
    as_output,
    as_tokens,
    find_towers,
    reads_of,
    submodule,
    unwrap,
)

_CALL = getattr(nn.Module, "_call_impl").__code__  # noqa: B009 - torch's own name for it
"""What every call of a module runs in."""

_ENCODERS = ("get_image_features", "get_video_features")
"""Methods that `generate` encodes images with, before it calls the model."""


class Proof(NamedTuple):
    """What was seen to read a block's output."""

    path: str
    who: Literal["language side", "tower"]
    """"tower": only that the tower's own output depends on it; what is behind did not show itself."""
    how: tuple[str, ...] = ()
    """The values of `HOW_IT_READS` it was seen with."""


@dataclass(eq=False)
class _Call:
    """A call that images may come in by, while it runs; one inside another counts as part of that."""

    name: str
    batch: Batch
    active: tuple[Attachment, ...]
    """What was on when it began."""
    saw_images: tuple[Attachment, ...]
    """The same, if it had images."""
    unproven: Sequence[HookPoint] = ()
    how: tuple[str, ...] = ()
    ran: dict[str, Again] = field(default_factory=dict[str, Again])
    """The towers that have run in it; kept only while something is unproven."""
    towers: set[str] = field(default_factory=set[str])
    """Every tower that has run in it."""
    edited: set[Attachment] = field(default_factory=set[Attachment])
    """What was edited in it behind the towers."""
    is_model: bool = True
    """Whether the language model runs in it, and not only what encodes images."""
    readers: list[Reader] = field(default_factory=list[Reader])
    """What was called beside the towers, in order; kept only while something is unproven."""
    frame: FrameType | None = None
    """Where it runs. An interrupt is no `Exception`, so torch calls no hook when it ends a forward."""

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        frame: FrameType | None = inspect.currentframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return self.frame is None or frame is not None


@dataclass(eq=False)
class _Run:
    """One forward of a tower."""

    tower: str
    expected: tuple[Attachment, ...]
    """What must be edited in it."""
    edited: set[Attachment] = field(default_factory=set[Attachment])


class _Here(threading.local):
    """What one thread is doing."""

    generate: _Call | None = None
    call: _Call | None = None
    run: _Run | None = None
    probe: Probe | None = None


class _Hook:
    """A function as a hook that copies and pickles as nothing: a copy of the model is a model without the eraser."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = opaque(function)  # inside: a function made opaque would copy as itself

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert:
    """What remains of a hook in a copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs


class _Method:
    """A method of a module with something around it; in a copy of the module it is that one's plain method."""

    is_of_an_eraser = True

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.__wrapped__ = getattr(module, name)  # what `inspect.signature` shows
        self.__name__ = name
        self.former = vars(module).get(name)
        """What was in its place: somebody else's wrapping, say, or what is left of ours in a copy."""
        self.module, self._around = module, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        return getattr, (self.module, self.__name__)


class Site:
    """A model with erasers on."""

    def __init__(self, root: nn.Module, proofs: set[Proof]) -> None:
        self.attachments: tuple[Attachment, ...] = ()
        """Replaced, never changed: other threads go through it meanwhile."""
        self._root = ref(root)
        self._proofs = proofs
        self._blocks: dict[str, tuple[ref[nn.Module], RemovableHandle]] = {}
        self._towers: dict[str, tuple[ref[nn.Module], TowerPlace, int]] = {}
        self._handles: list[RemovableHandle] = []
        self._methods: list[tuple[ref[nn.Module], str, ref[_Method]]] = []
        self._merged: dict[Any, MergedEdit] = {}
        self._made: WeakValueDictionary[tuple[int, Attachment], Tensor] = WeakValueDictionary()
        """What towers and `get_image_features` gave while an edit was on, by the address of its storage and the edit."""
        self._counting = threading.Lock()
        self._here = _Here()

    # In and out. ------------------------------------------------------------------------------------------------------

    def hooks(self, block: nn.Module) -> bool:
        """Whether a block is edited here."""
        return any(hooked() is block for hooked, _ in self._blocks.values())

    def add(self, root: nn.Module, attachment: Attachment) -> None:
        """Put one more edit on; `EditError` if it contradicts those that are on."""
        path, mine = attachment.hook_point.path, of_this_task.get()
        for other in self.attachments:  # edits of different tasks never meet
            if other.hook_point.path == path and ("model" in (other.scope, attachment.scope) or other in mine):
                MergedEdit([edit for a in (other, attachment) for edit in (a.edit, *(a.rows or ()))])
        if not self.attachments:
            self._hook_model(root)
        if path not in self._blocks:
            block = attachment.hook_point.module(root)
            handle = block.register_forward_hook(_Hook(partial(self._on_block, path)), prepend=True)
            self._blocks[path] = (ref(block), handle)
        attachment.site = self
        self.attachments, self._merged = (*self.attachments, attachment), {}

    def remove(self, attachment: Attachment) -> bool:
        """Take one edit off; True if it was the last one."""
        if not attachment.problem and not self._in_place():
            attachment.problem = self._displaced()
        self.attachments = tuple(a for a in self.attachments if a is not attachment)
        self._merged = {}
        paths = {a.hook_point.path for a in self.attachments}
        for path in [path for path in self._blocks if path not in paths]:
            self._blocks.pop(path)[1].remove()
        if not self.attachments:
            for handle in self._handles:
                handle.remove()
            for module, name, method in self._methods:
                holder = module()
                if holder is not None and (mine := vars(holder).get(name)) is not None and mine is method():
                    del vars(holder)[name]
                    if mine.former is not None:
                        vars(holder)[name] = mine.former
            self._handles, self._methods = [], []
        return not self.attachments

    def _hook_model(self, root: nn.Module) -> None:
        towers = find_towers(root)
        paths = [tower.path for tower in towers]
        self._towers = {tower.path: (ref(tower.module), tower.place, len(tower.blocks)) for tower in towers}
        for tower in towers:
            before, after = _Hook(partial(self._before_tower, tower.path)), _Hook(partial(self._after_tower, tower.path))
            self._handles += [
                tower.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                tower.module.register_forward_hook(after, prepend=True, with_kwargs=True),
            ]
        for name, module in _beside(root, paths):
            reader = _Hook(partial(self._on_reader, name))
            self._handles.append(module.register_forward_pre_hook(reader, with_kwargs=True))
        holders = [(path, submodule(root, path)) for path in sorted(_on_the_way(paths) - set(paths) | {""})]
        for path, holder in holders:
            before, after = _Hook(partial(self._before_call, path)), _Hook(partial(self._after_call, path))
            self._handles += [
                holder.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                holder.register_forward_hook(after, with_kwargs=True, always_call=True),
            ]
            for name in _ENCODERS:
                self._wrap(holder, name, partial(self._around_features, f"{path}.{name}"))
        self._wrap(root, "generate", self._around_generate)

    def _wrap(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        if callable(getattr(type(module), name, None)):
            method = _Method(module, name, around)
            vars(module)[name] = method
            self._methods.append((ref(module), name, ref(method)))  # it knows its module, which must not live on here

    # Calls that images come in by. ------------------------------------------------------------------------------------

    def _active(self) -> tuple[Attachment, ...]:
        """What is in effect for this thread or task."""
        mine = of_this_task.get()
        return tuple(a for a in self.attachments if a.scope == "model" or a in mine)

    def _open(self, name: str, arguments: Mapping[str, Any], *, outermost: bool) -> _Call:
        """Look at what comes in, before anything runs."""
        active = self._active()
        if not self._in_place():
            self._fail(active, self._displaced())
        has_images = any(tensors(arguments.get(pixels)) for pixels in (*PIXELS, *VIDEOS))
        if outermost and not has_images:
            strict = [a for a in active if not a.is_null and not a.allow_bypass and a.hook_point.place != "language"]
            self._refuse_what_goes_round(strict, arguments)
        root, around = self._root(), self._here.generate
        config = getattr(root, "config", None)
        by_batch = any(a.rows or a.looks_for_images for a in active)
        batch = Batch.of(config, arguments, around and around.batch) if by_batch else Batch()
        how = tuple(str(arguments.get(option, getattr(config, option, None))) for option in HOW_IT_READS)
        points = {a.hook_point.path: a.hook_point for a in active if not a.is_null}
        if any(p.place == "language" for p in points.values()) and _is_filled(arguments.get("past_key_values")):
            # Run again it goes without the cache, and would end elsewhere for that.
            points = {path: point for path, point in points.items() if point.place != "language"}
        unproven = [p for p in points.values() if Proof(p.path, "language side", how) not in self._proofs]
        return _Call(name, batch, active, active if has_images and outermost else (), unproven, how)

    def _refuse_what_goes_round(self, strict: Sequence[Attachment], arguments: Mapping[str, Any]) -> None:
        """Features that are handed in must have been made with every edit on, as far as that can be told."""
        for name in HANDED_IN:
            handed = tensors(arguments.get(name))
            unedited = [a for a in strict if not a.edits_run or (name in FEATURES and not self._made_with(a, handed))]
            if handed and unedited:
                self._fail(
                    unedited,
                    f"the model was given {name!r}, which goes round the vision tower and was not made with the edit of "
                    f"{unedited[0].hook_point.path} on: an image in it is not erased. Compute it inside the eraser and hand "
                    "in the very tensors, or give pixel_values; allow_bypass=True if there is no image in it.",
                )

    def _around_generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._active():
            return generate(*args, **kwargs)
        around = self._here.generate
        with ExitStack() as stack:
            stack.callback(setattr, self._here, "generate", around)
            if not self._inside():
                self._here.call = None
            self._here.generate = call = self._open("generate", _by_name(generate, args, kwargs), outermost=around is None)
            output = generate(*args, **kwargs)
            self._count_images(call)
        return output

    def _around_features(self, name: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside() or self._here.probe or not self._active():
            return encode(*args, **kwargs)
        with ExitStack() as stack:
            stack.callback(setattr, self._here, "call", None)
            around = self._here.generate
            self._here.call = call = self._open(name, _by_name(encode, args, kwargs), outermost=around is None)
            call.is_model = False
            if around is not None:
                call.batch = around.batch
            output = encode(*args, **kwargs)
        self._close(call, encode, args, kwargs, output)
        return output

    def _inside(self, path: str | None = None) -> bool:
        """Whether another call is running; one of the same name is a new one, the old one was interrupted."""
        call = self._here.call
        return call is not None and call.name != path and call.running

    def _before_call(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for name in _ENCODERS:  # a replica, or a shallow copy, has them of the original
            if isinstance(method := vars(module).get(name), _Method) and method.module is not module:
                del vars(module)[name]
        if self._here.probe or not self._active() or self._inside(path):
            return
        arguments = _by_name(module.forward, args, kwargs)
        self._here.call = call = self._open(path, arguments, outermost=self._here.generate is None)
        call.frame = _frame_of_call()

    def _after_call(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._here.call
        if self._here.probe or call is None or call.name != path:
            return
        self._here.call = None
        if output is not None:  # an exception is on its way, or nnsight has read what it wanted and stopped
            self._close(call, module.forward, args, kwargs, output)

    def _count_images(self, call: _Call) -> None:
        """Those whose tower had nothing to do, because the images went through another that is edited, saw none."""
        at_towers = [a for a in call.saw_images if a.hook_point.place == "tower"]
        edited = call.towers & {a.hook_point.tower for a in at_towers if not a.is_null}
        idle = [a for a in at_towers if edited and a.hook_point.tower not in call.towers]
        self._count([a for a in call.saw_images if a not in idle], "images_seen")

    def _close(self, call: _Call, function: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> None:
        self._count_images(call)
        missed = [a for a in self._expected_behind(call) if a not in call.edited and a.active]
        if missed:
            self._fail(missed, f"the model ran, but not the edit of {missed[0].hook_point.path}. Was it replaced meanwhile?")
        self._remember(output)
        for point in call.unproven:
            if point.place == "tower" and point.tower in call.ran:
                again = Again(function, args, kwargs, output, call.readers, of_the_tower=not point.tower)
                self._prove(point, call, again, call.ran[point.tower])
            elif point.place == "projector" and point.path in _paths(call.edited):
                self._prove(point, call, Again(function, args, kwargs, output, call.readers))
            elif point.place == "language" and (here := [a for a in call.edited if a.hook_point.path == point.path]):
                # The head reads the very tokens that are disturbed, but it is the other ones that are to feel it.
                own_rt = call.batch.images_rt if here[0].looks_for_images else None
                self._prove(point, call, Again(function, args, kwargs, output, leave_out_rt=own_rt))

    def _expected_behind(self, call: _Call) -> list[Attachment]:
        """What must have been edited behind the towers in a call."""
        images_rt = call.batch.images_rt
        in_text = call.is_model and images_rt is not None and bool(images_rt.any())
        return [
            a
            for a in call.active
            if (a.hook_point.place == "projector" and call.towers)
            or (a.hook_point.place == "language" and (in_text if a.looks_for_images else call.is_model))
        ]

    # The tower, what stands beside it, and the block. -----------------------------------------------------------------

    def _before_tower(self, path: str, tower: nn.Module, args: Any, kwargs: Any) -> None:
        del tower, args, kwargs
        self._here.run = None
        active, root = self._active(), self._root()
        if self._here.probe or not active or root is None:
            return
        live = [a for a in active if not a.is_null]
        reads = reads_of(root, *self._towers[path][1:])
        here = [a for a in active if a.hook_point.place == "tower" and a.hook_point.tower == path]
        stale = [a for a in here if not a.is_null and a.hook_point.reads != reads]
        if stale:
            self._fail(
                stale,
                f"the model's config has changed: the language side reads the blocks {', '.join(str(i + 1) for i in reads)} "
                f"now, and {stale[0].hook_point.path} was found when it read others. Make a new eraser.",
            )
        if live and not any(a in here or a.allow_bypass or a.hook_point.place != "tower" for a in live):
            self._fail(
                live,
                f"images go through {path or 'the model'} too, which no eraser edits: the concept gets by that way. Erase "
                "there as well (find_hook_point takes the path of a block there), or allow_bypass=True.",
            )
        self._here.run = _Run(path, tuple(here))

    def _after_tower(self, path: str, tower: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run, call = self._here.run, self._here.call
        if self._here.probe or run is None or run.tower != path:
            return
        self._here.run = None
        self._count(run.expected, "tower_runs")
        missed = [a for a in run.expected if a not in run.edited and a.active]
        if missed:
            self._fail(
                missed,
                f"the vision tower ran {missed[0].tower_runs} times, but the edit of {missed[0].hook_point.path} "
                f"{missed[0].edits_run} times: images went by unedited. Was the block replaced meanwhile?",
            )
        self._remember(output, within=path)
        for open_call in filter(None, (call, self._here.generate)):
            open_call.towers.add(path)
        alone = Again(tower.forward, args, kwargs, output, of_the_tower=True)
        if call is not None and call.unproven:
            call.ran[path] = alone
        elif call is None:
            for point in {a.hook_point.path: a.hook_point for a in run.expected if not a.is_null}.values():
                if not self.is_proven(point) and Proof(point.path, "tower") not in self._proofs:
                    self._prove(point, None, alone)

    def _on_reader(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Something beside the tower is called, perhaps with what the tower gave."""
        del module
        call, probe = self._here.call, self._here.probe
        if probe:
            probe.reached(name, args, kwargs)
        elif call is not None and call.unproven:
            call.readers.append((name, tensors((args, kwargs))))

    def _on_block(self, path: str, block: nn.Module, args: Any, output: Any) -> Any:
        del block, args
        probe, here = self._here.probe, [a for a in self._active() if a.hook_point.path == path]
        if not here:
            return None
        point = here[0].hook_point
        acts_utd = as_tokens(output, point)
        call = self._here.call or self._here.generate
        batch = probe.batch if probe else call.batch if call else Batch.of(getattr(self._root(), "config", None), {})
        if probe and probe.path == path:
            probe.disturbed = True
            return as_output(disturbed(acts_utd, edited_positions(here[0], acts_utd, batch)), output, point)
        if here[0].looks_for_images and batch.images_rt is not None and not batch.images_rt.any():
            return None  # words alone: a step of `generate`, say
        edited = edit_tokens(here, acts_utd, batch, self._merge)
        if not probe:
            self._count(here, "edits_run")
            if point.place == "tower" and self._here.run is not None:
                self._here.run.edited.update(here)
            if point.place != "tower" and self._here.call is not None:
                self._here.call.edited.update(here)
        return None if edited is None else as_output(edited, output, point)

    def _remember(self, output: Any, within: str | None = None) -> None:
        """What a call, or a tower, gave was made with every edit on that is not behind it."""
        on = [
            a
            for a in self._active()
            if within is None or a.hook_point.place == "tower" or a.hook_point.path.startswith(f"{within}.")
        ]
        for tensor in tensors(output, detached=False):
            for attachment in on:
                self._made[tensor.untyped_storage().data_ptr(), attachment] = tensor

    def _made_with(self, edit: Attachment, handed: Sequence[Tensor]) -> bool:
        """Whether tensors were made, or are parts of what was made, while an edit was on."""
        return all((tensor.untyped_storage().data_ptr(), edit) in self._made for tensor in handed)

    def _merge(self, key: Any, edits: Sequence[Edit]) -> MergedEdit:
        merged = self._merged
        if key not in merged:
            merged[key] = MergedEdit(edits)
        return merged[key]

    # Whether it is true. ----------------------------------------------------------------------------------------------

    def is_proven(self, point: HookPoint) -> bool:
        """Whether the language side was seen to get something else because of the block's output."""
        return any(proof.path == point.path and proof.who == "language side" for proof in self._proofs)

    def _prove(self, point: HookPoint, call: _Call | None, *attempts: Again) -> None:
        """Run again with the block's output disturbed: somebody must get something else than in the real run."""
        root = self._root()
        if root is None or root.training or not finite(attempts[0].output):
            return  # dropout, or NaN, would look like an effect: wait for a call that can tell
        reached, how = False, () if call is None else call.how
        batch = Batch.of(getattr(root, "config", None), {}) if call is None else call.batch
        for attempt in attempts:
            probe = self._here.probe = Probe(point.path, attempt.readers, batch)
            try:
                with uncompiled():
                    seen = attempt.differs(root, probe)
            finally:
                self._here.probe = None
            if seen:
                alone = attempt.of_the_tower and point.tower
                self._proofs.add(Proof(point.path, "tower") if alone else Proof(point.path, "language side", how))
                return
            reached = reached or probe.disturbed
            if probe.disturbed:  # and nobody noticed; otherwise it cannot be run again like this, and says nothing
                break
        if point.place != "tower" and not reached:
            return  # the call cannot be run again: another one will tell
        self._fail(
            [a for a in self.attachments if a.hook_point.path == point.path],
            f"an edit of {point.path} does not reach the language side: "
            + ("with its output disturbed, nothing behind it changed" if reached else "run again, the tower went round it")
            + ". Is this the block that is read?",
        )

    def _in_place(self) -> bool:
        """Whether the hooks are still in the modules that the model runs."""
        root = self._root()
        hooked = [(path, module, handle) for path, (module, handle) in self._blocks.items()]
        try:
            return all(
                submodule(root, path) is module() and handle.id in (handle.hooks_dict_ref() or ())
                for path, module, handle in hooked
            ) and all(submodule(root, path) is module() for path, (module, *_) in self._towers.items())
        except AttributeError:
            return False

    def _displaced(self) -> str:
        paths = ", ".join(self._blocks)
        return (
            f"the eraser's hook on {paths} is gone, or the block has been replaced, since it was put on: nothing is erased. "
            "Leave the eraser before the model is changed, and enter it again."
        )

    def _count(self, counted: Sequence[Attachment], what: Literal["images_seen", "tower_runs", "edits_run"]) -> None:
        with self._counting:
            for attachment in counted:
                setattr(attachment, what, getattr(attachment, what) + 1)

    def _fail(self, failed: Sequence[Attachment], problem: str) -> None:
        for attachment in failed:
            attachment.problem = problem  # leaving the eraser says it again, should nobody hear it now
        raise IneffectiveEraserError(problem)


def _by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments by name, as far as the function names them."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def _paths(attachments: Iterable[Attachment]) -> set[str]:
    return {attachment.hook_point.path for attachment in attachments}


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds something already; one that does not tell may."""
    length = getattr(cache, "get_seq_length", None)
    return cache is not None and (length is None or bool(length()))


def _on_the_way(towers: Sequence[str]) -> set[str]:
    """The paths of everything that holds a tower, and of the towers."""
    return {"", *(".".join(parts[:i]) for parts in (tower.split(".") for tower in towers) for i in range(1, len(parts) + 1))}


def _beside(root: nn.Module, towers: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """What stands beside the towers and might read them: the neighbours of every module on the way to one."""
    on_the_way = _on_the_way(towers)
    for parent in sorted(on_the_way - set(towers)):
        for name, child in submodule(root, parent).named_children():
            path = f"{parent}.{name}".lstrip(".")
            if path not in on_the_way:
                yield from _callable_parts(path, unwrap(child))


def _callable_parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # never called itself
        for name, child in module.named_children():
            yield from _callable_parts(f"{path}.{name}", child)
    else:
        yield path, module


def _frame_of_call() -> FrameType | None:
    """The frame of torch that the innermost call of a module runs in."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame
