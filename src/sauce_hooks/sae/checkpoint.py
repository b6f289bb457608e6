"""Checkpoints of a training: whole or not there, and only for a training with the same settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from sauce_hooks.errors import ResumeError, SAEFileError

_SETTINGS, _CHECKPOINTS, _PARTIAL = "settings.json", "checkpoints", ".partial"


class TrainingFolder:
    """`training/` in the folder of an SAE: settings and metrics, which stay; checkpoints, which go at the end."""

    def __init__(self, out: str | Path) -> None:
        """The folder of an SAE that is being trained; nothing is written yet."""
        self.out = Path(out)
        self.path = self.out / "training"
        self._checkpoints = self.path / _CHECKPOINTS

    def latest(self) -> Path | None:
        """The newest checkpoint; its name ends with the number of steps."""
        if not self._checkpoints.is_dir():
            return None
        return max((p for p in self._checkpoints.iterdir() if p.suffix != _PARTIAL), default=None)

    def open(self, settings: Mapping[str, Any], *, resume: bool) -> Path | None:
        """Make the folder, or see that the training in it has these settings; returns the checkpoint to go on from.

        Raises:
            SAEFileError: it cannot be written to, or holds an unfinished training that is not to be gone on with.
            ResumeError: a setting has changed.
        """
        latest = self.latest()
        if latest is not None and not resume:
            raise SAEFileError(f"{self.out} holds an unfinished training: resume=True goes on with it; or remove the folder")
        if latest is not None:
            self.check(settings)
            return latest
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self._checkpoints.iterdir():
                shutil.rmtree(leftover)
            write_whole(self.path / _SETTINGS, json.dumps(settings, indent=1) + "\n")
        except OSError as problem:
            raise SAEFileError(f"{self.out} cannot be written to: {problem}. Give another folder.") from problem
        return None

    def check(self, settings: Mapping[str, Any]) -> None:
        """See that the training in this folder has these settings; `ResumeError` says which are others."""
        try:
            then = cast(dict[str, Any], json.loads((self.path / _SETTINGS).read_text()))
        except (OSError, ValueError) as problem:
            raise ResumeError(
                f"{self.path / _SETTINGS} cannot be read: {problem}. Train anew in another folder."
            ) from problem
        differences = changes(then, json.loads(json.dumps(settings)))
        if differences:
            raise ResumeError(
                f"{self.out} was begun with other settings: {'; '.join(differences)}. "
                "Go on with those it was begun with, or train anew in another folder."
            )

    @property
    def is_finished(self) -> bool:
        """Whether a training with known settings came to its end here."""
        return (self.path / _SETTINGS).is_file() and not self._checkpoints.exists()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """A new checkpoint in the place of the old one, which stays if the new one cannot be written.

        Args:
            step: the number of steps made.
            write: fills the folder it is given.
        """
        building = self._checkpoints / f"{step:09}{_PARTIAL}"
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir(parents=True)
            write(building)
            final = self._checkpoints / f"{step:09}"
            if final.exists():  # the same step once more, after an interruption right behind it
                shutil.rmtree(building)
                return
            self._place(building, final)
        except BaseException as problem:
            shutil.rmtree(building, ignore_errors=True)
            if isinstance(problem, OSError | RuntimeError) and not isinstance(problem, NotImplementedError):
                saved = self.latest()
                kept = f"the checkpoint at step {int(saved.name)} is whole" if saved else "there is no earlier checkpoint"
                raise OSError(
                    f"the checkpoint at step {step} cannot be written to {self.path}: {problem}; {kept}"
                ) from problem
            raise
        for old in self._checkpoints.iterdir():
            if old != final:
                shutil.rmtree(old)

    def _place(self, building: Path, final: Path) -> None:
        os.replace(building, final)

    def abandon(self) -> None:
        """A training that failed before its first checkpoint leaves nothing but the names of broken images."""
        if self.latest() is not None:
            return
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        for name in (_SETTINGS, "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path, self.out):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def finish(self) -> None:
        """The SAE is saved: its checkpoints have served."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)


def changes(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested settings, in words."""
    found: list[str] = []
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        name = f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(cast(dict[str, Any], old), cast(dict[str, Any], new), f"{name}.")
        elif old != new:
            found.append(f"{name} was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    building = path.with_name(path.name + _PARTIAL)
    try:
        building.write_text(text)
        os.replace(building, path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise
