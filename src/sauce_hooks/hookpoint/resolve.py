"""Where in a model: the tower, the block, how its tokens lie, and which blocks the language side reads."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any, get_args

import torch
from torch import nn

from sauce_hooks.errors import HookPointError, UnlistedFamilyWarning
from sauce_hooks.hookpoint.behind import Place, find_behind, listing_behind
from sauce_hooks.hookpoint.families import FAMILIES, PIXELS, TOWERS, Family, TokenLayout, Tower, TowerPlace
from sauce_hooks.hookpoint.fingerprint import TowerRecord, record_tower
from sauce_hooks.hookpoint.wrappers import block_of_name, submodule, unwrap

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_embedding")
_REGISTERS = ("register_tokens", "reg_token")
_NO_TOKENS = ("mask_token",)
"""Parameters that are called a token and are none of the sequence."""


@dataclass(frozen=True)
class HookPoint:
    """One block of a vision tower, or a place behind it, and what must be known to read and edit its output."""

    path: str
    """Dotted path of the block from the Hugging Face model, whatever that is wrapped in."""
    layer: int
    """Index of the block, 0 to n_layers−1. `hidden_states[layer + 1]` is its output."""
    n_layers: int
    """Blocks of the tower, or layers of the language model; 1 for a projector."""
    d_in: int
    """Width of the residual stream."""
    family: str
    """The model's `config.model_type`."""
    tower: str
    """Dotted path of the tower; `""` where the model is one, and behind the tower, where the whole model leads to."""
    layout: TokenLayout
    """How the tokens of an image lie; at a language layer, how the rows of text do."""
    reads: tuple[int, ...]
    """Indices of the blocks whose output the language side reads, ascending; behind the tower, of the last layer."""
    place: Place = "tower"
    """A block of the vision tower, the projector behind it, or a decoder layer of the language model."""

    @property
    def last_read(self) -> int:
        """An edit behind this block changes nothing."""
        return self.reads[-1]

    @property
    def first_read(self) -> int:
        """What is read here goes by any edit behind this block."""
        return self.reads[0]

    def module(self, model: Any) -> nn.Module:
        """The block in `model`; `HookPointError` if this model has no such place."""
        return _walk(model, self.path)

    def tower_module(self, model: Any) -> nn.Module:
        """The tower in `model`."""
        return _walk(model, self.tower)

    def record(self, model: Any) -> TowerRecord:
        """What is remembered of the tower up to this block, to know it again; behind the tower, of the model up to there."""
        tower, block = self.tower_module(model), self.module(model)
        if self.place != "tower":  # the tower decides what comes here too, so the record begins with it
            size_of = find_towers(tower)[0].module
            return record_tower(tower, block, layer=self.layer, n_layers=self.n_layers, d_in=self.d_in, size_of=size_of)
        if "modules_to_save" in dict(tower.named_children()):  # PEFT runs a trained copy of the tower, and that one counts
            copies = (m for m in tower.modules() if m is not tower and hasattr(m, "config"))
            tower = next(copy for copy in copies if block in set(copy.modules()))
        return record_tower(tower, block, layer=self.layer, n_layers=self.n_layers, d_in=self.d_in)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a block of a tower is written as it was before there were other places."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("place", "tower")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HookPoint:
        """Inverse of `to_dict`; `ValueError` if it names a place that there is none of."""
        fields = dict(data)
        if fields.get("place", "tower") not in get_args(Place):
            raise ValueError(f"unknown place {fields['place']!r}; known: {', '.join(get_args(Place))}")
        layout = dict(fields["layout"])
        layout["tiles_in_row"] = layout["tiles_in_row"] and tuple(layout["tiles_in_row"])
        fields["layout"], fields["reads"] = TokenLayout(**layout), tuple(fields["reads"])
        return cls(**fields)


@dataclass(frozen=True)
class _Found:
    """A vision tower found in a model."""

    path: str
    module: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...]
    layout: TokenLayout
    reads: tuple[int, ...]
    place: TowerPlace


def find_hook_point(model: Any, layer: int | str | None = None) -> HookPoint:
    """Find the block whose output is to be read and edited.

    Args:
        model: a Hugging Face model that sees: a vision-language model, a dual encoder or a vision tower, bare or wrapped by
            PEFT, nnsight, a `TransformerBridge`, `torch.compile`, `DataParallel` or DDP. Families that
            `hookpoint.families` does not list are found by structure where that is unambiguous.
        layer: as Hugging Face's `hidden_states` counts: −1 is the last block of the tower, −2 the penultimate one, 1 the
            first; or the dotted path of a block, of the projector ("model.multi_modal_projector") or of a decoder layer
            ("model.language_model.layers.2"); or a TransformerLens name. None: the penultimate block (the paper's
            choice, and what LLaVA reads), or the first one that the language side reads, if that comes earlier: an edit
            behind it would be gone by.

    Raises:
        HookPointError: no vision tower or several candidates for one, or no such block; lists what was found.
    """
    root = unwrap(model)
    towers = find_towers(root)
    tower = towers[0]
    if isinstance(layer, str):
        behind = find_behind(root, _family_name(root), tower.layout, layer)
        if behind is not None:
            last = (behind.n_layers - 1,)
            return HookPoint(**behind._asdict(), family=_family_name(root), tower="", reads=last)
        tower, index = _named(model, towers, layer)
    else:
        n = len(tower.blocks)
        index = min(max(n - 2, 0), tower.reads[0]) if layer is None else _counted(layer, n)
    path, block = tower.blocks[index]
    return HookPoint(
        path=path,
        layer=index,
        n_layers=len(tower.blocks),
        d_in=_width(block, tower),
        family=_family_name(root),
        tower=tower.path,
        layout=tower.layout,
        reads=tower.reads,
    )


def find_towers(root: nn.Module) -> tuple[_Found, ...]:
    """Every vision tower of a Hugging Face model (unwrapped), the one images go through first in front.

    Raises:
        HookPointError: a family without a tower; says why.
    """
    name = _family_name(root)
    family = FAMILIES.get(name)
    if family is not None and family.refused:
        raise HookPointError(f"there is nothing to hook in {type(root).__name__}. {family.refused}")
    if family is not None:
        found = [(place, _submodule(root, place.path)) for place in family.towers]
        if found and all(module is not None for _, module in found):
            return tuple(_found(root, place, *module, family) for place, module in found if module is not None)
    if name in TOWERS and _glob(root, TOWERS[name].blocks, ""):
        return (_found(root, TowerPlace(""), "", root, Family()),)
    return (_by_structure(root),)


def _family_name(root: nn.Module) -> str:
    return getattr(getattr(root, "config", None), "model_type", type(root).__name__)


def _submodule(root: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """A family's tower, also in its base model, where the leading `model.` is missing."""
    for candidate in (path, path.removeprefix("model."), f"model.{path}"):
        try:
            return candidate, submodule(root, candidate)
        except AttributeError:
            continue
    return None


def _found(root: nn.Module, place: TowerPlace, path: str, module: nn.Module, family: Family) -> _Found:
    config: Any = getattr(module, "config", None)
    row = place.tower or TOWERS.get(getattr(config, "model_type", "")) or _tower_by_structure(root, path, module)
    blocks = _glob(module, row.blocks, path)
    if not blocks:
        raise HookPointError(
            f"{path or 'the model'} of {type(root).__name__} has no blocks at {row.blocks!r}; found {_listing(root)}. "
            "Name the block: find_hook_point(model, 'path.to.block')."
        )
    drops, outer = place.drops_class, getattr(root, "config", None)
    dropped = drops if isinstance(drops, bool) else getattr(outer, drops[0], None) == drops[1]
    if row.class_parameter is not None and attrgetter(row.class_parameter)(module) is None:
        row = replace(row, class_token="none")
    fixed = row.fixed and family.fixed and place.fixed
    layout = _layout(row, config, class_read=row.class_token != "none" and not dropped, fixed=fixed, even=family.even)
    return _Found(path, module, blocks, layout, reads_of(root, place, len(blocks)), place)


def _glob(module: nn.Module, pattern: str, path: str) -> tuple[tuple[str, nn.Module], ...]:
    """The modules in the list (or lists, with `*`) that a pattern names, with their paths from the model."""
    level = [(path, module)]
    for part in pattern.split("."):
        level = [child for parent in level for child in (_children(*parent) if part == "*" else _child(*parent, part))]
    return tuple(level if pattern.endswith("*") else [child for parent in level for child in _children(*parent)])


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{path}.{name}".lstrip("."), unwrap(child)) for name, child in module.named_children()]


def _child(path: str, module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The child of that name, if there is one; by attribute, as a wrapper hands on what it wraps."""
    try:
        return [(f"{path}.{name}".lstrip("."), submodule(module, name))]
    except AttributeError:
        return []


def _layout(row: Tower, config: Any, *, class_read: bool, fixed: bool, even: bool) -> TokenLayout:
    tiles = None
    if row.tile_padding is not None:
        tokens = (config.image_size // config.patch_size) ** 2 + (row.class_token != "none")
        tiles = (tokens, -(-tokens // row.tile_padding) * row.tile_padding)
    registers = int(getattr(config, row.registers)) if isinstance(row.registers, str) else row.registers
    return TokenLayout(
        class_token=row.class_token,
        registers=registers,
        shape=row.shape,
        tiles_in_row=tiles,
        fixed=fixed,
        class_read=class_read,
        even=even,
    )


def reads_of(root: nn.Module, place: TowerPlace, n_layers: int) -> tuple[int, ...]:
    """The blocks that the language side reads, as the model's config has it now."""
    reads = place.reads
    indices: set[int] = set(range(n_layers - reads.last, n_layers)) if reads.and_last or reads.attribute is None else set()
    for attribute in filter(None, (reads.attribute, reads.also)):
        value: Any = root.config
        for part in attribute.split("."):
            value = getattr(value, part)
        for item in value if isinstance(value, list | tuple) else [value]:
            i = int(item[0] if isinstance(item, list | tuple) else item)
            # hidden_states[0] is what the first block gets: no block's output.
            indices.add(n_layers + i if i < 0 else i if reads.counts == "blocks" else max(i - 1, 0))
    return tuple(sorted(indices))


def _width(block: nn.Module, tower: _Found) -> int:
    """The width of the residual stream: the first norm a block has of its own is as wide, whatever the config calls it."""
    if tower.layout.shape == "maps":  # a stage of a CNN: as wide as its last norm
        return _norm_widths(block.modules())[-1]
    norms = _norm_widths(block.children())
    config: Any = getattr(tower.module, "config", None)
    width = norms[0] if norms else getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise HookPointError(
            f"the width of {tower.blocks[0][0]} cannot be told: it has no norm of its own, and the config no "
            "hidden_size. A tower whose width changes from stage to stage has no residual stream to edit."
        )
    return width


def _norm_widths(modules: Iterable[nn.Module]) -> list[int]:
    weights = (getattr(module, "weight", None) for module in modules)
    return [weight.numel() for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 1]


def _walk(model: Any, path: str) -> nn.Module:
    try:
        return submodule(model, path)
    except AttributeError as missing:
        raise HookPointError(
            f"{type(model).__name__} has no module {path!r} ({missing}). "
            "This hook point belongs to another model: find the right one with sauce_hooks.find_hook_point(model)."
        ) from None


def _named(model: Any, towers: tuple[_Found, ...], name: str) -> tuple[_Found, int]:
    for tower in towers:
        for index, (path, _) in enumerate(tower.blocks):
            if path == name:
                return tower, index
    index = block_of_name(name, model)
    if index is not None and index < len(towers[0].blocks):
        return towers[0], index
    listing = "; ".join(f"{len(t.blocks)} blocks {t.blocks[0][0]} to {t.blocks[-1][0]}" for t in towers)
    behind = listing_behind(unwrap(model), _family_name(unwrap(model)))
    raise HookPointError(f"{name!r} is no block of a vision tower of this model, which has {listing}. {behind}")


def _counted(layer: int, n: int) -> int:
    index = n + layer if layer < 0 else layer - 1
    if not 0 <= index < n:
        raise HookPointError(
            f"layer {layer} does not exist: the tower has {n} blocks, counted 1 to {n} from the first or -1 to -{n} from "
            "the last."
        )
    return index


# Families nobody has listed. ------------------------------------------------------------------------------------------


def _by_structure(root: nn.Module) -> _Found:
    """The one vision tower of a model of unknown family: what takes pixels and has one stack of like blocks."""
    if isinstance(root, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise HookPointError(
            f"{type(root).__name__} is an exported or traced program: it has no blocks to hook. Erase in the model it was "
            "made from, and run that."
        )
    seers = [(path, m) for path, m in root.named_modules() if _takes_pixels(m)]
    outermost = [(p, m) for p, m in seers if not any(p != q and (not q or p.startswith(f"{q}.")) for q, _ in seers)]
    inner = [(path, m) for path, m in seers if path and type(m) is not type(root)]
    if outermost and outermost[0][0] == "" and inner:  # the model takes pixels too: its tower is inside
        outermost = [(p, m) for p, m in inner if not any(p != q and p.startswith(f"{q}.") for q, _ in inner)]
    if len(outermost) != 1:
        problem = "no vision tower" if not outermost else "several vision towers: " + ", ".join(p for p, _ in outermost)
        raise HookPointError(
            f"{type(root).__name__} (family {_family_name(root)!r}) is in no table and has {problem}. Blocks in it: "
            f"{_listing(root)}. Add a row to sauce_hooks.hookpoint.families.FAMILIES."
        )
    found = _found(root, TowerPlace(outermost[0][0]), *outermost[0], Family(fixed=False, even=False))
    if found.path:
        warnings.warn(
            f"the family {_family_name(root)!r} is in no table: {found.path} was found by structure. Whether the "
            "language side reads it before its last block is not known.",
            UnlistedFamilyWarning,
            stacklevel=2,
        )
    return found


def _takes_pixels(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model (it has a config of its own) whose main input is an image."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", "") in TOWERS:
        return True
    return hasattr(module, "get_input_embeddings") and _first_argument(module) in PIXELS


def _first_argument(module: nn.Module) -> str | None:
    return next(iter(inspect.signature(module.forward).parameters), None)


def _tower_by_structure(root: nn.Module, path: str, tower: nn.Module) -> Tower:
    """The row an unknown tower would have: one stack of like blocks, the class token by the name of its parameter."""
    stacks = [name for name, m in tower.named_modules() if _is_stack(m)]
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outermost) != 1:
        raise HookPointError(
            f"the blocks of {path or type(root).__name__} cannot be told: found {_listing(tower)}. Add a row to "
            f"sauce_hooks.hookpoint.families.TOWERS for {getattr(getattr(tower, 'config', None), 'model_type', path)!r}."
        )
    names = {name.rpartition(".")[2]: p for name, p in tower.named_parameters() if not name.startswith(f"{outermost[0]}.")}
    known = (*_CLASS_TOKENS, *_REGISTERS, *_NO_TOKENS)
    unexplained = [name for name in names if "token" in name and name not in known]
    class_tokens = sum(p.numel() // p.shape[-1] for name, p in names.items() if name in _CLASS_TOKENS)
    registers = sum(p.numel() // p.shape[-1] for name, p in names.items() if name in _REGISTERS)
    if unexplained:
        raise HookPointError(
            f"the tokens of {path or type(root).__name__} cannot be told: what is {', '.join(unexplained)}? Add a row to "
            "sauce_hooks.hookpoint.families.TOWERS."
        )
    # Several class tokens stand where one and registers would.
    return Tower(outermost[0], "first" if class_tokens else "none", max(class_tokens - 1, 0) + registers, fixed=False)


def _is_stack(module: nn.Module) -> bool:
    # By name: a block that an erasure is baked into is of a class of its own, of the same name.
    return isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block).__name__ for block in module}) == 1


def _listing(model: nn.Module) -> str:
    """Every list of at least two modules: the places blocks could be."""
    lists = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1)
    return "; ".join(f"{name} ({len(m)} × {type(m[0]).__name__})" for name, m in lists) or "no list of blocks at all"
