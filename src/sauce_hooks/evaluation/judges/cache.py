"""Verdicts that have been paid for, kept in a file: SQLite, so that several processes may share it and none tears it."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from sauce_hooks.errors import JudgeFileError

_OURS = 0x5A0CE001
"""SQLite's application id of these files."""
_WAIT_S = 60.0
"""How long to wait for another process that is writing."""
_AT_ONCE = 500
"""Keys in one query; SQLite allows 999."""


class Kept(NamedTuple):
    """A verdict with what it was given for."""

    key: str
    verdict: str
    """yes, no or unsure."""
    prompt: int
    """Version of the prompt."""
    model: str
    concept: str
    text: str


class VerdictCache:
    """Verdicts by key, in a file or, without a path, in memory."""

    def __init__(self, path: str | Path | None) -> None:
        """Open a cache, or begin one.

        Raises:
            JudgeFileError: the file can't be opened or is something else.
        """
        self.path = None if path is None else Path(path).absolute()
        self._memory: dict[str, str] = {}
        if self.path is not None:
            with self._open() as db:
                self._begin(db)

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        # A connection for each use: one may be used by no other thread and by no forked process.
        assert self.path is not None
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as db, db:
                yield db
        except sqlite3.Error as error:
            raise JudgeFileError(
                f"the judge's cache {self.path} can't be used ({error}): name another file, or mend this"
            ) from error

    def _begin(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")  # two processes may begin it at the same time
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != _OURS and tables:
            raise JudgeFileError(f"{self.path} is a database of something else: name another file for the judge's cache")
        if not tables:
            db.execute(f"PRAGMA application_id = {_OURS}")
            db.execute(
                "CREATE TABLE verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL, prompt INTEGER NOT NULL, "
                "model TEXT NOT NULL, concept TEXT NOT NULL, text TEXT NOT NULL)"
            )

    def get(self, keys: Sequence[str]) -> Mapping[str, str]:
        """The verdicts there are, by key."""
        if self.path is None:
            return {key: self._memory[key] for key in keys if key in self._memory}
        found: dict[str, str] = {}
        with self._open() as db:
            for i in range(0, len(keys), _AT_ONCE):
                part = keys[i : i + _AT_ONCE]
                found.update(
                    db.execute(f"SELECT key, verdict FROM verdicts WHERE key IN ({','.join('?' * len(part))})", part)
                )
        return found

    def put(self, kept: Kept) -> None:
        """Keep a verdict; it is on disk when this returns."""
        if self.path is None:
            self._memory[kept.key] = kept.verdict
            return
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", kept)

    def __len__(self) -> int:
        if self.path is None:
            return len(self._memory)
        with self._open() as db:
            return int(db.execute("SELECT count(*) FROM verdicts").fetchone()[0])
