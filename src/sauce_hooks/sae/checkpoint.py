"""Checkpoints of a training: whole or not there, and only for a training with the same settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sauce_hooks.activations.cache_format import differing, sync_folder
from sauce_hooks.bank import write_text_atomically
from sauce_hooks.errors import ResumeError, SAEFileError

_SETTINGS, _CHECKPOINTS, _METRICS, _LOCK, _PARTIAL = "settings.json", "checkpoints", "metrics.jsonl", "lock", ".partial"
_RECORD = "vision_sae.json"
"""Without it no folder is a `VisionSAE`."""
_WAIT_S = 10.0
"""The loader's processes may outlive a killed training by some seconds, and with them its lock."""


class TrainingFolder:
    """`training/` in the folder of an SAE: settings and metrics, which stay; checkpoints, which go at the end."""

    def __init__(self, out: str | Path) -> None:
        """The folder of an SAE that is being trained; nothing is written yet."""
        self.out = Path(out)
        self.path = self.out / "training"
        self._checkpoints = self.path / _CHECKPOINTS
        self._lock: Any = None

    def latest(self) -> Path | None:
        """The newest checkpoint; its name is the number of steps."""
        if not self._checkpoints.is_dir():
            return None
        return max((p for p in self._checkpoints.iterdir() if p.name.isdecimal()), default=None)

    def open(self, settings: Mapping[str, Any], *, resume: bool) -> Path | None:
        """Make the folder, or see that the training in it has these settings; returns the checkpoint to go on from.

        Until `close`, no other process can open it.

        Raises:
            SAEFileError: it cannot be written to, another process trains in it, or it holds an SAE, or an unfinished
                training that is not to be gone on with.
            ResumeError: a setting has changed.
        """
        self._refuse(resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / _LOCK)
        except Timeout:
            raise SAEFileError(f"another process is training in {self.out}: wait for it, or give another folder") from None
        except OSError as problem:
            raise self._unwritable(problem) from problem
        try:
            self._refuse(resume)  # again: another process may have trained until now
            return self._begin(settings)
        except BaseException:
            self.close()
            raise

    def _refuse(self, resume: bool) -> None:
        """What is there is not overwritten: an SAE may have taken days, and concepts learned since are saved with it."""
        if self.latest() is None and (self.out / _RECORD).exists():
            how = "resume=True loads it; or remove it" if self.is_finished else "remove it"
            raise SAEFileError(f"{self.out} holds an SAE already: {how}, or give another folder")
        if self.latest() is not None and not resume:
            raise SAEFileError(f"{self.out} holds an unfinished training: resume=True goes on with it; or remove the folder")

    def _begin(self, settings: Mapping[str, Any]) -> Path | None:
        latest = self.latest()
        if latest is not None:
            self.check(settings)
            return latest
        try:
            shutil.rmtree(self._checkpoints, ignore_errors=True)  # what a kill left of a first one
            self._checkpoints.mkdir()
            write_text_atomically(self.path / _SETTINGS, json.dumps(settings, indent=1) + "\n")
        except OSError as problem:
            raise self._unwritable(problem) from problem
        return None

    def _unwritable(self, problem: OSError) -> SAEFileError:
        return SAEFileError(f"{self.out} cannot be written to: {problem}. Give another folder.")

    def close(self) -> None:
        """Let other processes train in it."""
        if self._lock is not None:
            self._lock = self._lock.release()

    def check(self, settings: Mapping[str, Any]) -> None:
        """See that the training in this folder has these settings; `ResumeError` says which are others."""
        try:
            then = dict[str, Any](json.loads((self.path / _SETTINGS).read_text()))
        except (OSError, ValueError, TypeError) as problem:
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
        final = self._checkpoints / f"{step:09}"
        if final.exists():  # the last step, say, which was one to save anyway
            return
        building = final.with_suffix(_PARTIAL)
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir(parents=True)
            write(building)
            _to_disk(building)
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
            if old != final and old.is_dir():
                shutil.rmtree(old)

    def _place(self, building: Path, final: Path) -> None:
        os.replace(building, final)
        sync_folder(final.parent)

    def abandon(self) -> None:
        """A training that failed before its first checkpoint leaves nothing but the names of broken images."""
        if self.latest() is not None:
            return
        for name in (_SETTINGS, _METRICS, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        for folder in (self.path, self.out):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def finish(self, save: Callable[[Path], None]) -> None:
        """Save the SAE; its checkpoints have served then.

        Its files are moved to `out` one by one, for `out` itself may be a mounted disk or the working directory. If that is
        interrupted, the checkpoints are still there.

        Args:
            save: writes the SAE as a new folder at the path it is given.
        """
        aside = self.path / f"sae{_PARTIAL}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            save(aside / "sae")
            _to_disk(aside / "sae")
            for file in sorted((aside / "sae").iterdir(), key=lambda file: file.name == _RECORD):
                os.replace(file, self.out / file.name)
            sync_folder(self.out)
        except (OSError, RuntimeError, SafetensorError) as problem:
            raise OSError(
                f"the SAE cannot be saved to {self.out}: {problem}; the last checkpoint is whole, resume=True goes on"
            ) from problem
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._discard()

    def _discard(self) -> None:
        """All checkpoints at once: half a one would be taken for a damaged one."""
        gone = self._checkpoints.with_suffix(_PARTIAL)
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self._checkpoints, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def reading(checkpoint: Path) -> Generator[None]:
    """Whatever a damaged file makes torch stumble over is a `ResumeError`."""
    try:
        yield
    except Exception as problem:
        raise ResumeError(f"the checkpoint {checkpoint} cannot be read: {problem!r}. Remove it to start anew.") from problem


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested settings, in words."""
    return [
        f"{name} was {_short(old)}, is {_short(new)}" for name, old, new in sorted(differing(then, now), key=lambda d: d[0])
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(path: Path) -> Any:
    """The right to train here. The system takes it back when the process ends, however it ends."""
    lock = FileLock(path, timeout=_WAIT_S, thread_local=False)
    lock.acquire()
    return lock


def _to_disk(folder: Path) -> None:
    """The files of a folder, brought to the disk: a name that survives a power cut must not outlive its content."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
