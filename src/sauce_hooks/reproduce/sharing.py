"""Work that is done once and kept in files, however many processes take part, and whenever one of them is ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

_PAUSE_S = 0.5


def once(path: Path, make: Callable[[Path], None]) -> None:
    """Have a file made by whoever comes first; the others wait for it. `make` must write it whole or not at all."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            make(path)


def share(names: Sequence[str], path_of: Callable[[str], Path], work: Callable[[str], None]) -> None:
    """Have everything of a list done, each by one process, and return when all of it is.

    No process waits for a certain other one: if one dies, its lock is free and another takes up what it left. So work that
    takes hours cannot run into the time limits of a process group, and processes may be started one by one as well.

    Args:
        names: what is to be done.
        path_of: a file that is there once it is done.
        work: does it, and writes that file.
    """
    while left := [name for name in names if not path_of(name).exists()]:
        idle = True
        for name in left:
            path = path_of(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
                    if not path.exists():
                        work(name)
                        idle = False
            except Timeout:
                continue
        if idle:
            time.sleep(_PAUSE_S)
