"""Statistics as files: one safetensors file each, with its facts as JSON in the header and a SHA-256 of everything."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sauce_hooks.bank import SAERecord
from sauce_hooks.bank.kinds import NUMBER, TEXT, WHOLE, optional, record, several
from sauce_hooks.errors import ContrastError, SAEFileError

FORMAT = 1


@dataclass(frozen=True)
class Source:
    """What activations are summed: statistics of other ones do not add up."""

    tokens: str
    """Which tokens of an image were read."""
    pool: str
    """How they became one activation a feature."""
    sae: SAERecord
    """Whose features they are."""

    def difference(self, other: Source) -> str | None:
        """In what another source differs from this one, as words; None if in nothing that is known."""
        for name in ("tokens", "pool"):
            if getattr(self, name) != getattr(other, name):
                return f"{name}={getattr(other, name)!r}, not {getattr(self, name)!r}"
        difference = self.sae.difference(other.sae)
        return difference and f"another SAE: {difference}"


@dataclass(frozen=True)
class Facts:
    """What a file says besides its tensors."""

    n: int
    """Images."""
    source: Source | None = None
    concepts: tuple[str, ...] | None = None
    """The concepts, for statistics of labelled images."""
    counts: tuple[int, ...] | None = None
    """Images that show each."""

    def __post_init__(self) -> None:
        names, counts = self.concepts or (), self.counts or ()
        if (self.concepts is None) != (self.counts is None) or len(set(names)) != len(names) or len(names) != len(counts):
            raise ValueError(f"{len(names)} concepts, {len(set(names))} of them different, and {len(counts)} counts")
        if any(count > self.n for count in counts):
            raise ValueError(f"more images show a concept than the {self.n} that there are")


_SAE = record(
    SAERecord, architecture=TEXT, hook_point=TEXT, tower=optional(TEXT), d_in=WHOLE, d_sae=WHOLE, values=several(NUMBER)
)
_SOURCE = record(Source, tokens=TEXT, pool=TEXT, sae=_SAE)
_FACTS = record(Facts, n=WHOLE, source=optional(_SOURCE), concepts=optional(several(TEXT)), counts=optional(several(WHOLE)))


def write_statistics(path: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all.

    Raises:
        ContrastError: a concept's name is no Unicode text.
        OSError: the disk is full, say; what was there before is still there.
    """
    try:
        written = cast(dict[str, Any], _FACTS.write(facts, []))
    except ValueError as problem:
        raise ContrastError(f"these statistics cannot be saved: {problem}") from problem
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.dumps({"format": FORMAT, "facts": written, "sha256": _checksum(written, own)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(own, temporary, {"statistics": header})
        temporary.chmod(0o644)  # safetensors' are for their owner alone
        os.replace(temporary, path)
    except SafetensorError as problem:  # which hides what error the disk had
        raise OSError(f"{path} cannot be written: {problem}") from problem
    finally:
        temporary.unlink(missing_ok=True)


def read_statistics(path: Path, shapes: Mapping[str, tuple[str, ...]]) -> tuple[Facts, dict[str, Tensor]]:
    """What was written.

    Args:
        path: of the file.
        shapes: the tensors that there may be, and the names of their axes; those of "features" and "bins" say how long
            these are in all of them, "concepts" is as long as the list of them. Histograms may be missing.

    Raises:
        SAEFileError: there is no such file, or it is another kind of file, of another version, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = cast(dict[str, Any], json.loads(file.metadata()["statistics"]))
            if header["format"] != FORMAT:
                raise SAEFileError(f"{path} is of format {header['format']!r:.99}; this version reads {FORMAT}")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = cast(Facts, _FACTS.read(header["facts"], []))
        _check(facts, tensors, shapes)
        if _checksum(header["facts"], tensors) != header["sha256"]:
            raise ValueError("its content is not what was written")
        return facts, tensors
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as problem:
        if isinstance(problem, SAEFileError):
            raise
        raise SAEFileError(f"{path} is no such file of statistics, or a damaged one: {problem!r:.500}") from problem


def _check(facts: Facts, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[str, ...]]) -> None:
    lengths: dict[str, int] = {} if facts.concepts is None else {"concepts": len(facts.concepts)}
    expected = {name for name in shapes if not name.endswith("histogram_bf")}
    if not expected <= tensors.keys() <= shapes.keys():
        raise ValueError(f"it holds {sorted(tensors)}, not {sorted(expected)}")
    for name, tensor in tensors.items():
        dtype = torch.int32 if name.endswith("histogram_bf") else torch.float64
        sizes = dict(zip(shapes[name], tensor.shape, strict=True))
        if tensor.dtype != dtype or any(lengths.setdefault(axis, size) != size for axis, size in sizes.items()):
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")


def _checksum(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(json.dumps([name, list(tensors[name].shape)]).encode())
        sha.update(memoryview(cast(Any, tensors[name].reshape(-1).view(torch.uint8).numpy())))
    return sha.hexdigest()
