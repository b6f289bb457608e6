"""The files of a cache of activations, as docs/cache.md describes them: a manifest in JSON and shards in safetensors.

What a folder holds is what its manifest lists. Every file is put in its place as a whole, and checked when it is read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import BFloat16, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sauce_hooks.errors import ActivationCacheError
from sauce_hooks.hookpoint import TowerRecord, difference

FORMAT, VERSION = "sauce_hooks activations", 1
MANIFEST, LOCK, PARTIAL = "manifest.json", "filling.lock", ".partial"
_LEFTOVER = re.compile(r"rows-\d{5,}\.safetensors(\.partial)?|manifest\.json\.partial")
"""What an interrupted write can leave, unless the manifest lists it."""
_BLOCK = 1 << 24


@dataclass(frozen=True)
class CacheRecord:
    """Everything that decides what the rows of a cache are. Holds what JSON can: tuples become lists."""

    hook_point: dict[str, Any]
    """`HookPoint.to_dict()`."""
    tower: dict[str, Any] | None
    """`TowerRecord.to_dict()` of the tower the rows were read from; None if there is no record of it."""
    tokens: dict[str, Any]
    """Which tokens of an image were read; if random ones, how many and from which seed."""
    data: str
    """Fingerprint of the images: which they are, in the order that `Chunk.images_n` counts them in."""
    n_images: int | None
    """How many images there are; None where only the end of the stream tells."""
    processor: str | None
    """Hash of the preprocessing; None if the data were model inputs already."""
    dtype: str
    """What the tower computed in, such as `"torch.bfloat16"`. The rows are kept in bfloat16 all the same."""
    order: dict[str, Any] = field(default_factory=dict[str, Any])
    """How the images were shuffled, batched and shared out. Decides how filling goes on; a complete cache serves any."""

    def __post_init__(self) -> None:
        for name in ("hook_point", "tower", "tokens", "order"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name), allow_nan=False)))

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return _whole(self.hook_point["d_in"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CacheRecord:
        """Inverse of `to_dict`; also takes what JSON made of it.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        record = cls(**data)
        if record.tower is not None:
            TowerRecord.from_dict(record.tower)
        _whole(record.hook_point["d_in"])
        return record

    def differences(self, asked: CacheRecord, *, order: bool = True) -> tuple[str, ...]:
        """In what the record asked for differs from this stored one, a line each.

        Args:
            asked: the other record.
            order: whether the order of the images matters too.
        """
        lines: list[str] = []
        for name in (f.name for f in fields(self) if f.name != "order" or order):
            stored, wanted = getattr(self, name), getattr(asked, name)
            if name == "tower" and stored is not None and wanted is not None:
                other = difference(TowerRecord.from_dict(stored), TowerRecord.from_dict(wanted))
                lines += [f"tower: {other}"] if other else []
            else:
                found = differing(stored, wanted, name)
                lines += [f"{where}: stored is {then!r}, asked for is {now!r}" for where, then, now in found]
        return tuple(lines)


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest lists it."""

    file: str
    rows: int
    chunks: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds."""

    record: CacheRecord
    shards: tuple[Shard, ...] = ()
    filling_state: dict[str, Any] | None = None
    complete: bool = False


class ShardContent(NamedTuple):
    """The tensors of a shard, views of the file."""

    rows_nd: BFloat16[Tensor, "n d"]
    images_n: Int64[Tensor, " n"]
    chunk_sizes_m: Int64[Tensor, " m"]


# The manifest. --------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path, record: CacheRecord) -> Manifest | None:
    """What the folder holds; None if it has no manifest.

    Its files are there and as long as they should be. What is in them is checked by `read_shard`.

    Raises:
        ActivationCacheError: it holds activations of something else than `record` says, or is damaged.
    """
    manifest = _parsed(folder / MANIFEST)
    if manifest is None:
        return None
    lines = manifest.record.differences(record, order=not manifest.complete)
    if lines:
        raise ActivationCacheError(
            f"{folder} holds activations of something else:\n  " + "\n  ".join(lines) + "\n"
            "Give another folder, or remove this one if it is no longer needed."
        )
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file():
            raise damaged(path, "the file is missing")
        if path.stat().st_size != shard.bytes:
            raise damaged(path, f"it has {path.stat().st_size} bytes and not {shard.bytes}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put it in the place of the one before."""
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    data["sha256"] = _digest(data)
    with writing(folder):
        _write_whole(folder / MANIFEST, [memoryview(json.dumps(data, indent=1).encode() + b"\n")])


def _parsed(path: Path) -> Manifest | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as problem:
        raise damaged(path, str(problem)) from problem
    try:
        data = cast(dict[str, Any], json.loads(text))
        if data["format"] != FORMAT:
            raise ActivationCacheError(f"{path} is of the format {data['format']!r}, not {FORMAT!r}: give another folder")
        if data["version"] != VERSION:
            raise ActivationCacheError(
                f"{path} is of format version {data['version']!r}; this library reads version {VERSION}. Read it with the "
                "library that wrote it, or give another folder."
            )
        if data.pop("sha256") != _digest(data):
            raise ValueError("its content is not what was written")
        if type(data["complete"]) is not bool or not isinstance(data["filling_state"], dict | None):
            raise TypeError("complete or filling_state is of a wrong type")
        shards = tuple(Shard(**shard) for shard in data["shards"])
        for i, shard in enumerate(shards):
            if shard.file != shard_name(i):  # so no name leads out of the folder, and none is there twice
                raise ValueError(f"shard {i} is {shard.file!r} and not {shard_name(i)!r}")
            for number in (shard.rows, shard.chunks, shard.bytes):
                _whole(number)
        return Manifest(CacheRecord.from_dict(data["record"]), shards, data["filling_state"], data["complete"])
    except (KeyError, TypeError, ValueError, RecursionError) as problem:
        if isinstance(problem, ActivationCacheError):
            raise
        raise damaged(path, f"{type(problem).__name__}: {problem}") from problem


def _digest(data: dict[str, Any]) -> str:
    """Of the JSON without spaces, keys in order, other letters than ASCII's escaped."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differing(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every entry in which two nested mappings differ, at the deepest level: its dotted name, and both values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        old, new = cast(Mapping[str, Any], then), cast(Mapping[str, Any], now)
        for key in {**old, **new}:
            yield from differing(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield name, then, now


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r} is no whole number")
    return number


# Shards. --------------------------------------------------------------------------------------------------------------


def shard_name(i: int) -> str:
    """Of the shard at place `i` of the manifest's list."""
    return f"rows-{i:05d}.safetensors"


def write_shard(folder: Path, i: int, content: ShardContent) -> Shard:
    """Put a shard in its place. It counts once a manifest lists it."""
    # Whole numbers first, so that every tensor is aligned.
    tensors = {"chunk_sizes": content.chunk_sizes_m, "images": content.images_n, "rows": content.rows_nd}
    parts = _safetensors(tensors)
    with writing(folder), ThreadPoolExecutor(1) as beside:
        digest = beside.submit(_sha256, parts)  # takes as long as the disk: so not after it
        _write_whole(folder / shard_name(i), parts)
    size = sum(len(part) for part in parts)
    return Shard(shard_name(i), len(content.rows_nd), len(content.chunk_sizes_m), size, digest.result())


def read_shard(folder: Path, shard: Shard, d_in: int, *, check: bool) -> ShardContent:
    """A shard, mapped into memory. Writing to its tensors does not change the file.

    Args:
        folder: the cache's.
        shard: which.
        d_in: width of its rows.
        check: read all of it and compare its hash, too.

    Raises:
        ActivationCacheError: it is missing, or not what the manifest says.
    """
    path = folder / shard.file
    try:
        if check:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise damaged(path, "its content is not what was written")
        with safe_open(path, framework="pt") as file:
            rows_nd, images_n, chunk_sizes_m = (file.get_tensor(name) for name in ("rows", "images", "chunk_sizes"))
    except (OSError, SafetensorError) as problem:
        raise damaged(path, str(problem)) from problem
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in (rows_nd, images_n, chunk_sizes_m)]
    stated = [((shard.rows, d_in), torch.bfloat16), ((shard.rows,), torch.int64), ((shard.chunks,), torch.int64)]
    if found != stated or int(chunk_sizes_m.sum()) != shard.rows or bool((chunk_sizes_m < 0).any()):
        raise damaged(path, f"it holds {found} in chunks of {int(chunk_sizes_m.sum())} rows, and should hold {stated}")
    return ShardContent(rows_nd, images_n, chunk_sizes_m)


def _safetensors(tensors: dict[str, Tensor]) -> list[memoryview]:
    """A safetensors file in parts that are no copies.

    The library's own writer hides which error the disk had, and older versions of it copy the whole shard.
    """
    names = {torch.bfloat16: "BF16", torch.int64: "I64"}
    parts = [memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy())) for tensor in tensors.values()]
    ends = itertools.accumulate(len(part) for part in parts)
    header = {
        name: {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end - len(part), end]}
        for (name, tensor), part, end in zip(tensors.items(), parts, ends, strict=True)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


# Files. ---------------------------------------------------------------------------------------------------------------


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove what a process wrote that did not come to list it. Only for the one that has the right to write."""
    listed = {shard.file for shard in manifest.shards}
    with writing(folder):
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name) and path.name not in listed and path.is_file():
                path.unlink()


def refuse_strangers(folder: Path) -> None:
    """A folder without manifest must be empty, but for what a process leaves that is killed before it writes one."""
    if folder.exists() and not folder.is_dir():
        raise ActivationCacheError(f"{folder} is a file: a cache of activations needs a folder")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    strangers = sorted(names - {LOCK, MANIFEST + PARTIAL})
    if any(_LEFTOVER.fullmatch(name) for name in strangers):
        raise damaged(folder / MANIFEST, "the file is missing, though there are shards")
    if strangers:
        listing = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise ActivationCacheError(f"{folder} is no cache of activations and not empty ({listing}): give another folder")


def damaged(path: Path, problem: str) -> ActivationCacheError:
    """What to say of a damaged file."""
    return ActivationCacheError(
        f"{path} is damaged: {problem}. Restore the file, or remove the folder to have the cache made again."
    )


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """What goes wrong with the disk says where."""
    try:
        yield
    except OSError as problem:
        text = f"{problem.strerror or problem} while writing the cache of activations; what it lists already is safe"
        raise OSError(problem.errno, text, str(folder)) from problem


def _write_whole(path: Path, parts: Sequence[memoryview]) -> None:
    """A file that is there as a whole, on the disk and not only on its way to it, or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb", buffering=0) as file:
            for block in _blocks(parts):
                while block:
                    block = block[file.write(block) :]
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _blocks(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        yield from (part[i : i + _BLOCK] for i in range(0, len(part), _BLOCK))


def _sha256(parts: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """So that a new name survives a power cut; where a folder cannot be opened, the system sees to that."""
    flag: int | None = getattr(os, "O_DIRECTORY", None)
    if flag is not None:
        descriptor = os.open(folder, os.O_RDONLY | flag)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
