"""Baking: a model that carries an erasure as a part of itself, with no eraser attached.

A wrapper around the block would be a silent no-op in LLaVA: transformers records hidden states with hooks on the modules
that are *instances of the block's class*, which inside a wrapper would be the unedited block. So the block is replaced by
an instance of a subclass of its own class, around the same parameters and submodules, which has one submodule more.
"""

from __future__ import annotations

import copy as copying
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.erasure.attach import attachments, check_read
from sauce_hooks.erasure.attachment import Attachment
from sauce_hooks.erasure.edit_data import EditData, put_beside, shared_features, take_apart
from sauce_hooks.erasure.effect import tensors
from sauce_hooks.erasure.merging import Edit, MergedEdit
from sauce_hooks.errors import EditError, EraserStateError, IneffectiveEraserError
from sauce_hooks.hookpoint import HookPoint, as_output, as_tokens, evaluating, positions, unwrap

if TYPE_CHECKING:
    from sauce_hooks.erasure.eraser import ConceptEraser
    from sauce_hooks.erasure.several import Erasers


class Erasure(nn.Module):
    """The edits of one block's output; everything they need is in buffers, which keep their dtype whatever the model's."""

    def __init__(self, hook_point: HookPoint, data: EditData, concepts: Sequence[str] = ()) -> None:
        super().__init__()
        self.hook_point = hook_point
        self.plan = data.plan
        """The edits but for their tensors, as JSON would have it."""
        self.concepts = tuple(concepts)
        """The names of what is erased, for people."""
        for name, tensor in data.tensors.items():
            self.register_buffer(name, tensor.detach().clone())
        self._merged: MergedEdit | None = None
        data.edits()  # what cannot be put together again is refused now and not in the first forward

    @property
    def data(self) -> EditData:
        """The edits, taken apart."""
        return EditData(self.plan, dict(self.named_buffers(recurse=False)))

    def forward(self, output: Any) -> Any:
        """What the block gave, edited on the tokens that the edits are for."""
        acts_utd = as_tokens(output, self.hook_point)
        return as_output(self.edited(acts_utd), output, self.hook_point)

    def edited(self, acts_utd: Float[Tensor, "units tokens d"]) -> Float[Tensor, "units tokens d"]:
        """The block's tokens, edited."""
        merged: MergedEdit = self._merged or cast(Any, self)._merge()  # torch types its decorator as a function's
        n = acts_utd.shape[1]
        chosen = positions(self.hook_point.layout, merged.tokens, n)
        return merged(acts_utd, None if chosen == range(n) else chosen)

    @torch.compiler.disable  # once, and then the graph holds what came of it
    def _merge(self) -> MergedEdit:
        self._merged = merged = MergedEdit(self.data.edits())  # two threads may both make it: they make the same
        return merged

    def _apply(self, fn: Any, recurse: bool = True) -> Erasure:
        """A move to another device is followed; a cast is not: the edit follows each activation's dtype by itself."""
        del recurse
        for name, tensor in self.named_buffers(recurse=False):
            moved = fn(tensor)
            self.register_buffer(name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        self._merged = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(*args, **kwargs)
        self._merged = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_merged": None}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{', '.join(self.concepts)}; {len(self.plan['edits'])} edits of {self.hook_point.path}"


class Erased(nn.Module):
    """Mixed into a block's class: the block, and then the edits of what it gave."""

    erasure: Erasure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own class has it, edited."""
        return self.erasure(super().forward(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickles and copies: the class is made on the fly, and so it is made again."""
        del protocol
        return _blank, (_plain_class(self),), self.__getstate__()


def _plain_class(block: nn.Module) -> type[nn.Module]:
    """The class that a block had before."""
    return type(block).__bases__[1]


@functools.cache
def _erased_class(plain: type[nn.Module]) -> type[nn.Module]:
    # Named as the block is: accelerate and FSDP know by name which modules must not be split.
    return type(plain.__name__, (Erased, plain), {"__module__": plain.__module__, "__doc__": plain.__doc__})


def _blank(plain: type[nn.Module]) -> nn.Module:
    kind = _erased_class(plain)
    return kind.__new__(kind)


def bake(eraser: ConceptEraser | Erasers, *, copy: bool = True, verify: Mapping[str, Any] | None = None) -> Any:
    """A model that carries an eraser's erasure as a part of itself: no hook, no context, nothing to leave.

    Its outputs are, bit for bit, those of the model with the eraser on. `deepcopy`, `pickle`, `.to(...)`,
    `torch.compile`, gradient checkpointing and `state_dict` take it along; `model.save_pretrained(folder)` and
    `sauce_hooks.erasure.from_pretrained(folder)` keep it on disk. What it no longer does is watch: an image that goes
    round the tower is not noticed (docs/lasting.md).

    Baking again adds to what is baked: a feature that is named twice is edited once, as in one eraser for both.

    Args:
        eraser: one, or several joined; on or off; not for rows.
        copy: True gives a second model; the first one stays what it is. They share the memory of the weights, so a second
            model costs next to nothing, and training one of them in place would train both. False changes the eraser's own
            model.
        verify: inputs of the model (`model(**inputs)`). It is run with the eraser, without, and baked, and what was
            baked must give what the eraser gives.

    Raises:
        EditError: an eraser for rows, one that changes nothing, or a model that cannot be copied or taken apart.
        EraserStateError: `copy=False` while an eraser is on.
        IneffectiveEraserError: nobody reads what would be edited; or, with `verify`, it made no difference, or another one.
    """
    each = cast("tuple[ConceptEraser, ...]", getattr(eraser, "erasers", (eraser,)))  # several joined, or one
    if any(one.rows is not None for one in each):
        raise EditError("an eraser for rows cannot be baked: a model does not know whose rows it will be given")
    places = [(one.hook_point, one.edit) for one in each]
    expected = None if verify is None else _expected(eraser, verify)
    names = list(dict.fromkeys(concept.name for one in each for concept in one.concepts))
    bypass = any(one.allow_bypass for one in each)
    baked = bake_edits(eraser.model, places, names, copy=copy, allow_bypass=bypass)
    if verify is not None and not _same(expected or [], _run(baked, verify)):
        raise IneffectiveEraserError("the baked model does not give what the eraser gives on these inputs: do not use it")
    return baked


def bake_edits(
    model: Any,
    places: Sequence[tuple[HookPoint, Edit]],
    concepts: Sequence[str] = (),
    *,
    copy: bool = True,
    allow_bypass: bool = False,
) -> Any:
    """`bake`, of edits at any number of places.

    Args:
        model: the Hugging Face model, bare or in PEFT's wrapper.
        places: where, and what; several edits of one place are merged.
        concepts: the names of what is erased, for people.
        copy: as in `bake`.
        allow_bypass: as in `ConceptEraser`.

    Raises as `bake` does.
    """
    root = unwrap(model)
    if model is not root and type(model).__module__.partition(".")[0] != "peft":
        raise EditError(f"bake the model itself, and put it into its {type(model).__name__} afterwards")
    if attachments(model) and not copy:
        raise EraserStateError("an eraser is on: leave it before the model is changed in place, or bake a copy")
    by_path: dict[str, tuple[HookPoint, list[Edit]]] = {}
    for point, edit in places:
        attachment = Attachment(point, edit, allow_bypass=allow_bypass)
        check_read(attachment)
        if attachment.looks_for_images:
            raise EditError(
                f"{point.path} is a language layer, which does not know where in a text the images are: what edits only "
                "those cannot be baked. Wrap the SAE with tokens=TokenPolicy(edit='all')"
            )
        by_path.setdefault(point.path, (point, []))[1].append(edit)
    edited = {path: (point, edits) for path, (point, edits) in by_path.items() if not MergedEdit(edits).is_null}
    if not edited:
        raise EditError("nothing to bake: these edits change nothing")
    for point, _ in edited.values():
        _check_replaceable(point.module(root), point)
    if copy:
        model = shared_copy(model)
        root = unwrap(model)
    elif "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # a graph compiled before would go on without the erasure
    for point, edits in edited.values():
        place_in(root, point, edits, concepts)
    return model


def place_in(root: nn.Module, point: HookPoint, edits: Sequence[Edit], concepts: Sequence[str]) -> None:
    """Put edits into a block of a bare model, besides those that it has."""
    block: Any = point.module(root)
    if isinstance(block, Erased):
        edits = put_beside(block.erasure.data, edits)
        concepts = tuple(dict.fromkeys((*block.erasure.concepts, *concepts)))
    MergedEdit(edits)  # what contradicts itself is refused before anything has changed
    put_in(root, Erasure(point, take_apart(edits), concepts))


def put_in(root: nn.Module, erasure: Erasure) -> None:
    """Put an erasure into the block of a bare model that it is for, in the place of one that is there."""
    from sauce_hooks.erasure.baked_files import SavesErased

    block = erasure.hook_point.module(root)
    device = next((p.device for p in block.parameters() if p.device.type != "meta"), torch.device("cpu"))
    erasure.to(device).train(block.training)
    if isinstance(block, Erased):
        block.erasure = erasure
    else:
        _replace(root, block, _erased(block, erasure))
    if hasattr(root, "save_pretrained"):
        # transformers' own would write a folder that loads as the model without the erasure.
        vars(root)["save_pretrained"] = SavesErased(root)


def erasures(model: Any) -> tuple[Erasure, ...]:
    """What is baked into a model, in the order of its modules."""
    return tuple(module for module in unwrap(model).modules() if isinstance(module, Erasure))


def check_not_baked(block: Any, edit: Edit) -> None:
    """`EditError` if a block carries an erasure of some of these features: they would be edited once more on top of it."""
    shared = shared_features(block.erasure.data, edit) if isinstance(block, Erased) else ()
    if shared:
        raise EditError(
            f"{len(shared)} of these features ({', '.join(map(str, shared[:5]))}) are erased in this model already: "
            f"{', '.join(block.erasure.concepts)} is baked in, and an eraser on top would edit them once more. "
            "Erase with the original model, or bake both: bake(eraser) adds to what is baked."
        )


def shared_copy(model: Any) -> Any:
    """A second model that shares the memory of the weights; moves and casts of one leave the other alone."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    fresh = {
        key: nn.Parameter(t.detach(), requires_grad=t.requires_grad) if type(t) is nn.Parameter else t
        for key, t in held.items()
    }
    return copying.deepcopy(model, fresh)


def _erased(block: nn.Module, erasure: Erasure) -> nn.Module:
    new = _blank(type(block))
    # The hook tables are the very same: what transformers has hung in stays, and handles still remove theirs.
    vars(new).update(vars(block))
    vars(new)["_modules"] = {**vars(block)["_modules"], "erasure": erasure}
    if "_hf_hook" in vars(block):  # accelerate's: it has bound the block's forward
        from accelerate.hooks import add_hook_to_module

        hook = vars(new)["_hf_hook"]
        for name in ("forward", "_old_forward", "_hf_hook"):
            vars(new).pop(name, None)
        add_hook_to_module(new, hook)
    return new


def _check_replaceable(block: nn.Module, point: HookPoint) -> None:
    if "forward" in vars(block) and "_hf_hook" not in vars(block):
        raise EditError(
            f"the forward of {point.path} has been replaced by {vars(block)['forward']!r}, which would go round what is "
            "baked in. (nnsight leaves such behind.) Bake a freshly loaded model"
        )
    if "erasure" in vars(block)["_modules"] and not isinstance(block, Erased):
        raise EditError(f"{point.path} has a part of its own called 'erasure'")


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    holders = [(m, name) for m in root.modules() for name, child in vars(m)["_modules"].items() if child is old]
    if not holders:
        raise EditError(f"{type(old).__name__} is the whole model, and not a part of one: nothing can be put in its place")
    for holder, name in holders:
        setattr(holder, name, new)


def _expected(eraser: ConceptEraser | Erasers, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What the eraser gives; `IneffectiveEraserError` if that is what the model gives without it."""
    bare = _run(eraser.model, inputs)
    if eraser.attached:
        raise EraserStateError("verify compares the model with and without the eraser: take it off first")
    with eraser:
        erased = _run(eraser.model, inputs)
    if _same(bare, erased):
        raise IneffectiveEraserError(
            "the eraser makes no difference on the inputs given to verify: no feature of its concepts fires on them. Give "
            "images that hold the concept"
        )
    return erased


@torch.no_grad()
def _run(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    with evaluating(model):
        return tensors(model(**inputs))


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(some, others, strict=True)
    )
