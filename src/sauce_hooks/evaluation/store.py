"""What an evaluation has finished, on disk: one JSON file a method and concept, so that a run that was cut off goes on.

The folder holds `settings.json`, which says what was asked, and `scores/<method>/<concept>.json`. Names of methods and
concepts may be anything: files are called after them and a digest, and what a file is about stands in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from sauce_hooks.bank import Rate
from sauce_hooks.bank.files import write_text_atomically
from sauce_hooks.errors import ResumeError
from sauce_hooks.evaluation.probes import PROTOCOL_VERSION, Probe, ProbeSet, Wording
from sauce_hooks.evaluation.statistics import Counts
from sauce_hooks.hookpoint import unwrap


@dataclass(frozen=True)
class Finished:
    """What is known of one method and concept."""

    rates: Mapping[str, Rate]
    counts: Mapping[str, Counts]
    near: str | None
    """The sibling that IRA_near is of."""
    descriptions: Sequence[str]
    """What the model said of the concept's images, in their order."""
    notes: Sequence[str] = ()


class Store:
    """A folder of finished parts; without a folder, nothing is kept.

    Raises:
        ResumeError: the folder holds an evaluation with other settings, or a file that is none of ours.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        if folder is None:
            return
        path = folder / "settings.json"
        if path.is_file():
            known = _read(path)
            other = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
            if other:
                raise ResumeError(
                    f"{folder} holds an evaluation with other settings: {', '.join(other)} "
                    f"({'; '.join(f'{key}: {known.get(key)} there, {settings.get(key)} now' for key in other)}). "
                    "Give another folder, or remove this one to begin anew"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise ResumeError(f"{folder} is not empty and holds no evaluation (no settings.json): give an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(settings, indent=1))

    def load(self, method: str, concept: str, about: Any) -> Finished | None:
        """What is known; None if it is not finished.

        Raises:
            ResumeError: the method has other settings than it had then, or the file is damaged.
        """
        path = self._path(method, concept)
        if path is None or not path.is_file():
            return None
        found = _read(path)
        try:
            if found["about"] != about:
                raise ResumeError(
                    f"{path}: {method!r} had other settings ({found['about']}) than now ({about}). "
                    "Give the method another name, or the evaluation another folder"
                )
            return Finished(
                {metric: Rate(**_numbers(rate)) for metric, rate in found["rates"].items()},
                {metric: _counts(part) for metric, part in found["counts"].items()},
                found["near"],
                tuple(map(str, found["descriptions"])),
                tuple(map(str, found["notes"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            if isinstance(problem, ResumeError):
                raise
            raise ResumeError(
                f"{path} is no finished part of an evaluation ({problem!r}): remove it to have it anew"
            ) from problem

    def save(self, method: str, concept: str, about: Any, done: Finished) -> None:
        """Keep it. A crash leaves the old file or the new one."""
        path = self._path(method, concept)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "method": method,
            "concept": concept,
            "about": about,
            "near": done.near,
            "notes": list(done.notes),
            "descriptions": list(done.descriptions),
            "rates": {metric: asdict(rate) for metric, rate in done.rates.items()},
            "counts": {
                metric: {"num": c.num, "den": c.den, "image": c.image, "outcomes": dict(c.outcomes)}
                for metric, c in done.counts.items()
            },
        }
        write_text_atomically(path, json.dumps(content))

    def _path(self, method: str, concept: str) -> Path | None:
        return self._folder and self._folder / "scores" / slug(method) / f"{slug(concept)}.json"


def slug(name: str) -> str:
    """A file name that is safe anywhere and never the same for two names."""
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ResumeError(f"{path} cannot be read ({problem}): remove it to have it made anew") from problem
    if not isinstance(found, dict):
        raise ResumeError(f"{path} is no part of an evaluation: remove it to have it made anew")
    return found  # pyright: ignore[reportUnknownVariableType]


def _numbers(rate: Mapping[str, Any]) -> dict[str, Any]:
    return {"n": int(rate["n"]), **{key: float(rate[key]) for key in ("value", "low", "high")}}


def _counts(part: Mapping[str, Any]) -> Counts:
    num, den, image = tuple(map(float, part["num"])), tuple(map(float, part["den"])), tuple(map(int, part["image"]))
    if not len(num) == len(den) == len(image):
        raise ValueError("columns of unequal length")
    return Counts(num, den, image, MappingProxyType({str(k): int(v) for k, v in part["outcomes"].items()}))


# What must be the same for an evaluation to go on. -------------------------------------------------------------------


def settings_of(model: nn.Module, probes: ProbeSet, judge: str) -> dict[str, Any]:
    """The protocol's version and digests of the model, the images with their labels, and the words."""
    return {
        "protocol": PROTOCOL_VERSION,
        "model": fingerprint_of(model)[:16],
        "probes": _digest(_images(probes)),
        "wording": _digest(_words(probes.wording, probes.concepts)),
        "judge": judge,
    }


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint_of(model: nn.Module) -> str:
    """A digest of every weight's name, shape and some of its values: equal models have equal ones."""
    hashed = hashlib.sha256()
    for name, p in sorted(unwrap(model).named_parameters()):
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes() if not p.is_meta else b""
        hashed.update(f"{name}{tuple(p.shape)}".encode())
        hashed.update(some)
    return hashed.hexdigest()


def _images(probes: ProbeSet) -> Iterable[object]:
    yield {domain: list(names) for domain, names in probes.domains.items()}
    yield sorted(probes.nearest.items())
    names: dict[int, str] = {}

    def name(probe: Probe) -> str:
        if id(probe) not in names:
            names[id(probe)] = probe.name
        return names[id(probe)]

    for table in (probes.positives, probes.retained, probes.negatives):
        for concept, some in table.items():
            yield concept
            for probe in some:
                yield name(probe), sorted(probe.concepts), None if probe.known is None else sorted(probe.known)


def _words(wording: Wording, concepts: Sequence[str]) -> Iterable[object]:
    yield from (wording.describe(), wording.yes, wording.no, wording.max_new_tokens, wording.answer_tokens)
    yield from map(wording.yes_no, concepts)
    yield [(concept, tuple(wording.names.get(concept, (concept,)))) for concept in concepts]
