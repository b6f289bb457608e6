"""A baked model on disk: a folder that only `from_pretrained` here reads, so that nobody gets the concept back by accident.

Any other loader must fail on it. So `config.json` names a model type that transformers does not know, which stops its
`Auto...` classes, and the weights are in files that it does not look for, which stops the others. See docs/lasting.md.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sauce_hooks.bank.format import library_version
from sauce_hooks.erasure.bake import Erasure, erasures, put_in
from sauce_hooks.erasure.edit_data import EditData
from sauce_hooks.errors import EditError, HookPointError, SAEFileError
from sauce_hooks.hookpoint import HookPoint, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
MODEL_TYPE = "sauce_hooks_erased"
"""What `config.json` says the model is."""
VARIANT = "erased"
"""What stands in the names of the weights' files: `model.erased.safetensors`."""
_CONFIG, _RECORD, _TENSORS = "config.json", "sauce_hooks_erasure.json", "sauce_hooks_erasure.safetensors"
_LOADS_CODE = ("auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "use_kernels")
"""Settings by which a config could have code fetched and run."""


class SavesErased:
    """`save_pretrained` of a baked model: transformers' own would leave the erasure behind."""

    __name__ = "save_pretrained"

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that `sauce_hooks.erasure.from_pretrained` reads."""
        save_pretrained(self._model, folder, **options)

    def __reduce__(self) -> tuple[type[SavesErased], tuple[nn.Module]]:
        return SavesErased, (self._model,)  # a copy of the model gets one of its own


def save_pretrained(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write a baked model; whole or not at all.

    Args:
        model: what `bake` gave.
        folder: a new folder, or one without another model's weights; what else lies there (a processor) stays.
        options: transformers' own, such as `max_shard_size`.

    Raises:
        EditError: nothing is baked into it, it is in a wrapper (PEFT's would save the adapter alone), or its class is not
            one of transformers'.
        SAEFileError: another model's weights lie in the folder.
    """
    root: Any = unwrap(model)
    held = erasures(root)
    if not held:
        raise EditError("nothing is baked into this model: it has save_pretrained of its own. First: bake(eraser)")
    if root is not model or getattr(root, "_hf_peft_config_loaded", False):
        raise EditError(
            "merge the adapters into the model before it is saved (merge_and_unload()): alone they hold no erasure"
        )
    kind = type(root)
    if _transformers_class(kind.__name__) is not kind:
        raise EditError(f"{kind.__name__} is not a class of transformers', so that nothing could load what is saved")
    folder = Path(folder).resolve()
    foreign = _weights_of_others(folder)
    if foreign:
        raise SAEFileError(f"{folder} holds another model's weights ({foreign[0]}): save to a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        inside = [f"{name}." for name, module in root.named_modules() if isinstance(module, Erasure)]
        weights = {name: t for name, t in root.state_dict().items() if not name.startswith(tuple(inside))}
        kind.save_pretrained(root, building, **{**options, "state_dict": weights, "variant": VARIANT, "push_to_hub": False})
        _hide(building)
        tensors = {f"{i}/{name}": t for i, erasure in enumerate(held) for name, t in erasure.data.tensors.items()}
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, building / _TENSORS)
        places = [{"hook_point": e.hook_point.to_dict(), "concepts": list(e.concepts), "edits": e.plan} for e in held]
        record = {"format": FORMAT, "library": library_version(), "architecture": kind.__name__, "places": places}
        (building / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        for file in building.iterdir():
            file.chmod(0o644)
        _replace_folder(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def from_pretrained(source: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """The baked model of a folder that `save_pretrained` wrote, or of such a repository on the Hugging Face hub.

    Nothing in it is run as code: weights are safetensors, edits are data, and the classes are transformers' and ours.

    Args:
        source: the folder, or the repository's id.
        options: of transformers' `from_pretrained`: `dtype`, `device_map`, ...

    Raises:
        SAEFileError: it is no such folder, or a damaged one, or what is in it does not fit together.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source))
    try:
        record = cast(dict[str, Any], json.loads((folder / _RECORD).read_text(encoding="utf-8")))
        if record["format"] != FORMAT:
            raise SAEFileError(f"{folder} is of format {record['format']}; this version reads {FORMAT}")
        held = _read_erasures(record["places"], folder)
        config = cast(dict[str, Any], json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        kind: Any = _transformers_class(str(record["architecture"]))
        if config["model_type"] != MODEL_TYPE or kind is None:
            raise SAEFileError(f"{folder} holds {record['architecture']!r}, which is no class of transformers'")
        settings = kind.config_class.from_dict(_harmless(config["erased"]))
        _check_index(folder)
        fixed: dict[str, Any] = {
            "config": settings,
            "variant": VARIANT,
            "use_safetensors": True,
            "output_loading_info": True,
        }
        model, found = kind.from_pretrained(folder, **{"local_files_only": True, **options, **fixed})
        missing = sorted(found["missing_keys"])
        if missing:
            raise SAEFileError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them")
        for erasure in held:
            put_in(model, erasure)
    except SAEFileError:
        raise
    except (SafetensorError, HookPointError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise SAEFileError(f"{folder} is no baked model, or a damaged one: {e!r}") from e
    return model.eval()


def _read_erasures(places: list[dict[str, Any]], folder: Path) -> list[Erasure]:
    if not places:
        raise SAEFileError(f"{folder} says that nothing is erased: that is no baked model")
    tensors = load_file(folder / _TENSORS)
    held: list[Erasure] = []
    for i, place in enumerate(places):
        own = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{i}/")}
        point = HookPoint.from_dict(place["hook_point"])
        held.append(Erasure(point, EditData(place["edits"], own), [str(name) for name in place["concepts"]]))
    return held


def _hide(folder: Path) -> None:
    """Have transformers' own loaders refuse the folder."""
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    hidden = {
        "model_type": MODEL_TYPE,
        "architectures": ["SauceHooksErased"],
        "load_with": "sauce_hooks.erasure.from_pretrained",
        "erased": config,
    }
    (folder / _CONFIG).write_text(json.dumps(hidden, indent=1) + "\n", encoding="utf-8")


def _harmless(config: Any) -> Any:
    """A config without what would fetch code, at any depth."""
    if isinstance(config, dict):
        return {k: _harmless(v) for k, v in cast(dict[str, Any], config).items() if k not in _LOADS_CODE}
    return [_harmless(item) for item in cast(list[Any], config)] if isinstance(config, list) else config


def _transformers_class(name: str) -> type[PreTrainedModel] | None:
    import transformers

    kind: Any = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _check_index(folder: Path) -> None:
    """The shards that an index names must lie in the folder."""
    index = folder / f"model.safetensors.index.{VARIANT}.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise SAEFileError(f"{index} names a file outside its folder: {outside[0]!r}")


def _weights_of_others(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5"))
    return [name for name in names if not _is_ours(name)]


def _is_ours(name: str) -> bool:
    return name in (_CONFIG, _RECORD, _TENSORS, "generation_config.json") or (
        name.startswith("model") and f".{VARIANT}" in name
    )


def _replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an old one; what else lay there is taken along."""
    new.chmod(0o755)
    if target.exists():
        for item in target.iterdir():
            if not _is_ours(item.name) and not (new / item.name).exists():
                (shutil.copytree if item.is_dir() else shutil.copy2)(item, new / item.name)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        os.rename(target, aside / target.name)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(aside / target.name, target)
            raise
        finally:
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(new, target)


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as problem:
        raise SAEFileError(f"{source!r} is neither a folder here nor a repository on the hub: {problem}") from problem
