"""The files of a concept bank, as docs/bank.md describes them: JSON, and a safetensors file where there are tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sauce_hooks.bank.files import read_regular, write_atomically
from sauce_hooks.bank.kinds import (
    ANYTHING,
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    named,
    optional,
    record,
    several,
    tensor,
    with_place,
)
from sauce_hooks.bank.records import Concept, CurvePoint, Effect, Projection, Rate, SAERecord, Subspace
from sauce_hooks.errors import EditError, SAEFileError

FORMAT = 2
BANK_FILE = "concepts.json"
TENSORS_FILES = "concepts-*.safetensors"
"""What the files of tensors are called, as a pattern."""
LARGEST_JSON = 1 << 28
"""Bytes: about 300,000 concepts of 32 features."""
ORTHONORMAL = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far products of directions may be from the identity, by what the directions are stored in."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_SHARE = optional(NUMBER, math.nan)
_RATE = record(Rate, value=_SHARE, n=WHOLE, low=_SHARE, high=_SHARE)
_POINT = record(CurvePoint, k=WHOLE, gamma=NUMBER, edit=TEXT, figures=named(_RATE), chosen=FLAG)
_EFFECT = record(Effect, images=TEXT, figures=named(_RATE), original=named(_RATE), curve=several(_POINT))
_SUBSPACE = record(Subspace, basis_rd=tensor(2), inside=FLAG, read_rd=optional(tensor(2)))
_PROJECTION = record(Projection, left_rd=tensor(2), right_rd=tensor(2), center_d=tensor(1))
_GROUPS = named(several(TEXT))
SAE_RECORD = record(
    SAERecord, architecture=TEXT, hook_point=TEXT, tower=optional(TEXT), d_in=WHOLE, d_sae=WHOLE, values=several(NUMBER)
)
_CONCEPT = record(
    Concept,
    name=TEXT,
    features=several(WHOLE),
    scores=several(NUMBER),
    gamma=optional(NUMBER),
    edit=optional(TEXT),
    means=several(NUMBER),
    gates=several(NUMBER),
    share=NUMBER,
    keep_norm=FLAG,
    subspace=optional(_SUBSPACE),
    projection=optional(_PROJECTION),
    provenance=named(ANYTHING),
    effect=optional(_EFFECT),
)


class Content(NamedTuple):
    """What the files of a bank hold."""

    concepts: tuple[Concept, ...]
    sae: SAERecord | None
    """The SAE that the features are of; None if nobody said."""
    groups: Mapping[str, tuple[str, ...]]
    """Names that stand for several concepts."""


# Paths. ---------------------------------------------------------------------------------------------------------------


def bank_path(path: str | Path) -> Path:
    """The JSON file of a bank: the path itself if it ends in .json, else `concepts.json` in that folder."""
    path = Path(path)
    return path if path.suffix == ".json" else path / BANK_FILE


def tensors_path(path: Path, sha256: str) -> Path:
    """Beside the JSON, named by what is in it: so neither file is ever replaced by one that the other does not fit."""
    return path.with_name(f"{path.stem}-{sha256[:16]}.safetensors")


def is_tensors_file(name: str) -> bool:
    """Whether a file name is that of the tensors of `concepts.json`."""
    return re.fullmatch(r"concepts-[0-9a-f]{16}\.safetensors", name) is not None


# Writing. -------------------------------------------------------------------------------------------------------------


def write_bank(path: Path, content: Content) -> None:
    """Put a bank in the place of the one before.

    The JSON names the tensors by their hash, and comes last: until then the old bank is whole, from then on the new one.

    Raises:
        EditError: a concept cannot be written, or could not be read again; nothing is changed.
        OSError: the disk is full, say; the old bank is still there.
    """
    tensors: list[Tensor] = []
    sae = content.sae
    lines = [_concept_lines(concept, tensors, sae) for concept in content.concepts]
    data = safetensors.torch.save({str(i): t.contiguous().clone() for i, t in enumerate(tensors)}) if tensors else b""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "library": f"sauce_hooks {library_version()}",
        "sae": None if sae is None else SAE_RECORD.write(sae, []),
        "tensors": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} if tensors else None,
    }
    if content.groups:
        facts["groups"] = _GROUPS.write(content.groups, [])
    text = "".join(f" {_json(name)}: {_json(value)},\n" for name, value in facts.items())
    text = "{\n" + text + ' "concepts": [' + ",".join(lines) + ("\n ]" if lines else "]") + "\n}\n"
    encoded = text.encode()
    if len(encoded) > LARGEST_JSON:
        raise EditError(f"a bank of {len(encoded):,} bytes of JSON is too large ({LARGEST_JSON:,}): save it in parts")
    old, new = _named_tensors(path), tensors_path(path, facts["tensors"]["sha256"]) if tensors else None
    fresh = new is not None and not new.exists()
    if new is not None:
        write_atomically(new, data)
    try:
        write_atomically(path, encoded)
    except BaseException:
        if new is not None and fresh:
            new.unlink(missing_ok=True)
        raise
    if old is not None and old != new:
        with suppress(OSError):  # only in the way
            old.unlink()


def _concept_lines(concept: Concept, tensors: list[Tensor], sae: SAERecord | None) -> str:
    """A line for each field, so that a diff shows which fields of which concepts have changed."""
    try:
        fields = cast(dict[str, Any], _CONCEPT.write(concept, tensors))
        check(concept, sae)
        lines = [f"   {_json(name)}: {_json(value)}" for name, value in fields.items()]
    except (TypeError, ValueError, RecursionError) as problem:
        raise EditError(f"the concept {concept.name!r:.99} cannot be saved: {problem}") from problem
    return "\n  {\n" + ",\n".join(lines) + "\n  }"


def written_field(concept: Concept, name: str) -> Any:
    """A field that holds no tensors, as it is saved; absent ones are None."""
    return cast(dict[str, Any], _CONCEPT.write(replace(concept, subspace=None, projection=None), [])).get(name)


def _json(value: Any) -> str:
    return _ENCODER.encode(value)


def _named_tensors(path: Path) -> Path | None:
    """The tensors of the bank that lies there, if one does."""
    try:
        return tensors_path(path, _sha256(_parsed(path)["tensors"]["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def library_version() -> str:
    """Of this library, as it is installed."""
    try:
        return version("sauce-hooks")
    except PackageNotFoundError:
        return "unknown"


# Reading. -------------------------------------------------------------------------------------------------------------


def read_bank(path: Path) -> Content:
    """What `write_bank` wrote, or an earlier version of this library.

    Raises:
        SAEFileError: it is missing, damaged or of no known format; says what is wrong.
    """
    try:
        for last in (False, False, True):
            data = _parsed(path)
            number = data["format"]
            if type(number) is not int or number not in _READERS:
                raise SAEFileError(
                    f"{path} is a bank of format {number!r:.99}; this version reads {', '.join(map(str, _READERS))}. "
                    f"It was written by {data.get('library', 'an unknown library')!r:.99}: read it with that, or update."
                )
            try:
                return _READERS[number](path, data)
            except FileNotFoundError:  # perhaps replaced by a newer bank between the two files
                if last:
                    raise
        raise AssertionError
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as problem:
        if isinstance(problem, SAEFileError):
            raise
        raise SAEFileError(f"{path} is no concept bank, or a damaged one: {_said(problem)}") from problem


def _said(problem: Exception) -> str:
    return f"it has no {problem}" if isinstance(problem, KeyError) else f"{type(problem).__name__}: {problem}"


def _read_1(path: Path, data: dict[str, Any]) -> Content:
    """Format 1: JSON alone, five fields a concept."""
    names = ("name", "features", "scores", "gamma", "provenance")
    return Content(_concepts([{name: c[name] for name in names} for c in data["concepts"]], []), None, {})


def _read_2(path: Path, data: dict[str, Any]) -> Content:
    unknown = data.keys() - {"format", "library", "sae", "tensors", "groups", "concepts"}
    if unknown:
        raise ValueError(f"{sorted(unknown)!r:.99} is nothing that this version knows")
    if data.pop(_NOT_JSON, None):
        raise ValueError("NaN and Infinity are no JSON")
    tensors = [] if data["tensors"] is None else _read_tensors(path, data["tensors"])
    sae = None if data["sae"] is None else with_place("sae", lambda: SAE_RECORD.read(data["sae"], []))
    groups = cast(dict[str, tuple[str, ...]], with_place("groups", lambda: _GROUPS.read(data.get("groups", {}), [])))
    return Content(_concepts(data["concepts"], tensors, sae), sae, groups)


_READERS: dict[int, Callable[[Path, dict[str, Any]], Content]] = {1: _read_1, 2: _read_2}


def _concepts(entries: Any, tensors: Sequence[Tensor], sae: SAERecord | None = None) -> tuple[Concept, ...]:
    if not isinstance(entries, list):
        raise TypeError("the concepts are no list")
    concepts: dict[str, Concept] = {}
    for i, entry in enumerate(cast(list[Any], entries)):
        concept = cast(Concept, with_place(f"concept {i}", lambda entry=entry: _CONCEPT.read(entry, tensors)))
        if concept.name in concepts:
            raise ValueError(f"concept {i}: there is another {concept.name!r:.99}")
        with_place(f"concept {i}", lambda concept=concept: check(concept, sae))
        concepts[concept.name] = concept
    return tuple(concepts.values())


def _read_tensors(path: Path, facts: dict[str, Any]) -> list[Tensor]:
    sha256, size = _sha256(facts["sha256"]), WHOLE.read(facts["bytes"], [])
    data = read_regular(tensors_path(path, sha256), size)
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{tensors_path(path, sha256).name} is not what was written with this bank")
    found = safetensors.torch.load(data)
    if found.keys() != {str(i) for i in range(len(found))}:
        raise ValueError(f"tensors must be numbered from 0, and are {sorted(found)!r:.99}")
    return [found[str(i)] for i in range(len(found))]


def _sha256(text: Any) -> str:
    """So that what is made of it is the name of a file in this folder."""
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{text!r:.99} is no SHA-256")
    return text


_NOT_JSON = "\0"


def _parsed(path: Path) -> dict[str, Any]:
    """The JSON, with NaN and Infinity noted, which format 1 could hold."""
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    text = read_regular(path, LARGEST_JSON).decode("utf-8")
    data = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=constant)
    if not isinstance(data, dict):
        raise TypeError("the JSON is no object")
    return cast(dict[str, Any], data) | ({_NOT_JSON: True} if constants else {})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands there twice, among {sorted(found)!r:.99}")
    return found


# What a concept must be. ----------------------------------------------------------------------------------------------


def check(concept: Concept, sae: SAERecord | None) -> None:
    """What no single field can tell.

    Raises:
        ValueError: features that the SAE does not have, or directions that are none.
    """
    if sae is not None and max(concept.features, default=-1) >= sae.d_sae:
        raise ValueError(f"feature {max(concept.features)} is none of the SAE's {sae.d_sae}")
    if concept.subspace is not None:
        basis_rd, reader_rd = concept.subspace.basis_rd, concept.subspace.reader_rd
        if basis_rd.shape != reader_rd.shape:
            raise ValueError(f"a subspace is written as {tuple(basis_rd.shape)} and read as {tuple(reader_rd.shape)}")
        _check_products("R Bᵀ of a subspace", reader_rd, basis_rd)
        _check_width("a subspace", basis_rd, sae)
    if concept.projection is not None:
        left_rd, right_rd, center_d = (getattr(concept.projection, name) for name in ("left_rd", "right_rd", "center_d"))
        if left_rd.shape != right_rd.shape or left_rd.shape[1:] != center_d.shape:
            shapes = ", ".join(str(tuple(t.shape)) for t in (left_rd, right_rd, center_d))
            raise ValueError(f"the shapes of a projection do not belong together: {shapes}")
        _check_products("R Lᵀ of a projection", right_rd, left_rd)
        _check_width("a projection", left_rd, sae)


def _check_width(what: str, rows_rd: Tensor, sae: SAERecord | None) -> None:
    if sae is not None and rows_rd.shape[1] != sae.d_in:
        raise ValueError(f"{what} is {rows_rd.shape[1]} wide, and the SAE {sae.d_in}")


def _check_products(what: str, one_rd: Tensor, other_rd: Tensor) -> None:
    """One · otherᵀ = 1, but for rounding, which grows with the lengths of the rows."""
    r, d = one_rd.shape
    if r > d:
        raise ValueError(f"{what}: {r} directions cannot be independent in {d} dimensions")
    tolerance = max(ORTHONORMAL[t.dtype] for t in (one_rd, other_rd))
    one_rd, other_rd = one_rd.detach().cpu().double(), other_rd.detach().cpu().double()
    error_rr = (one_rd @ other_rd.T).sub_(torch.eye(r, dtype=torch.float64)).abs_()
    allowed_rr = tolerance * (one_rd.norm(dim=1)[:, None] * other_rd.norm(dim=1)).clamp(min=1)
    if bool((error_rr > allowed_rr).any()):
        raise ValueError(f"{what} must be orthonormal: a product is {float(error_rr.max()):.3g} off")
