"""Where in a model: the tower, the block, how its tokens lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sauce_hooks.errors import HookPointError
from sauce_hooks.hookpoint.families import FAMILIES, TOWER_LAYOUTS, TokenLayout


@dataclass(frozen=True)
class HookPoint:
    """One block of a vision tower, and what must be known to read and edit its output."""

    path: str
    """Dotted path of the block from the model; `""` is the model itself."""
    layer: int
    """Index of the block, 0 to n_layers−1. `hidden_states[layer + 1]` is its output."""
    n_layers: int
    """Blocks of the tower."""
    d_in: int
    """Width of the residual stream."""
    family: str
    """The model's `config.model_type`."""
    tower: str
    """Dotted path of the tower from the model."""
    tower_inputs: tuple[str, ...]
    """What of a batch the tower takes."""
    layout: TokenLayout
    """How the tokens of one image lie."""
    last_read: int
    """Index of the last block whose output the language side reads; later blocks cannot take effect."""

    def module(self, model: nn.Module) -> nn.Module:
        """The block in `model`; `HookPointError` if this model has no such place."""
        return _walk(model, self.path)

    def tower_module(self, model: nn.Module) -> nn.Module:
        """The tower in `model`."""
        return _walk(model, self.tower)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HookPoint:
        """Inverse of `to_dict`."""
        fields = dict(data)
        fields["tower_inputs"] = tuple(fields["tower_inputs"])
        fields["layout"] = TokenLayout(**fields["layout"])
        return cls(**fields)


def _walk(model: nn.Module, path: str) -> nn.Module:
    if not path:
        return model
    try:
        return model.get_submodule(path)
    except AttributeError as missing:
        raise HookPointError(
            f"{type(model).__name__} has no module {path!r} ({missing}). "
            "This hook point belongs to another model: find the right one with sauce_hooks.find_hook_point(model)."
        ) from None


def _candidates(model: nn.Module) -> list[str]:
    """Every list of at least two modules: the places blocks could be."""
    lists = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1)
    return [f"{name} ({len(m)} × {type(m[0]).__name__})" for name, m in lists]


def find_hook_point(model: nn.Module, layer: int | str = -2) -> HookPoint:
    """Find the block whose output is to be read and edited.

    Args:
        model: a Hugging Face vision-language model of a known family (`hookpoint.families.FAMILIES`).
        layer: as Hugging Face's `hidden_states` counts: −1 is the last block of the tower, −2 the penultimate one (the
            paper's choice, and what LLaVA reads), 1 the first; or the dotted path of a block.

    Raises:
        HookPointError: the family is unknown, or the model has no such block; lists the candidates found.
    """
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = FAMILIES.get(name)
    if family is None:
        found = "; ".join(_candidates(model)) or "no list of blocks at all"
        raise HookPointError(
            f"no family {name!r} is known (known: {', '.join(FAMILIES)}). Found in {type(model).__name__}: {found}. "
            "Add its row to sauce_hooks.hookpoint.families.FAMILIES."
        )
    tower = _walk(model, family.tower)
    blocks_path = ".".join(part for part in (family.tower, family.blocks) if part)
    blocks = _walk(model, blocks_path)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise HookPointError(f"{blocks_path!r} of {type(model).__name__} is no list of blocks but {type(blocks).__name__}")
    n_layers = len(blocks)
    index = _index(layer, n_layers, blocks_path)
    tower_config: Any = tower.config
    return HookPoint(
        path=f"{blocks_path}.{index}",
        layer=index,
        n_layers=n_layers,
        d_in=int(tower_config.hidden_size),
        family=name,
        tower=family.tower,
        tower_inputs=family.inputs,
        layout=TOWER_LAYOUTS.get(tower_config.model_type, family.layout),
        last_read=_last_read(model.config, family.reads, n_layers),
    )


def _index(layer: int | str, n_layers: int, blocks_path: str) -> int:
    if isinstance(layer, str):
        stem, _, last = layer.rpartition(".")
        if stem == blocks_path and last.isdecimal() and int(last) < n_layers:
            return int(last)
        raise HookPointError(
            f"{layer!r} is no block of the vision tower. Its {n_layers} blocks are {blocks_path}.0 to "
            f"{blocks_path}.{n_layers - 1}."
        )
    index = n_layers + layer if layer < 0 else layer - 1
    if not 0 <= index < n_layers:
        raise HookPointError(
            f"layer {layer} does not exist: the tower has {n_layers} blocks, counted 1 to {n_layers} from the first or "
            f"-1 to -{n_layers} from the last."
        )
    return index


def _last_read(config: Any, attribute: str | None, n_layers: int) -> int:
    read = getattr(config, attribute) if attribute else -1
    reads = read if isinstance(read, list | tuple) else [read]
    return max(n_layers + r if r < 0 else r - 1 for r in reads)
