"""Files that are there as a whole or not at all, and reading what a stranger may have put in their place."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one and nothing between."""
    write_atomically(path, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """The same of bytes. Where the path is a link, the link is replaced and what it leads to is left alone."""
    # No mkstemp: the file keeps its usual permissions. "x" follows no link that somebody has put there.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_regular(path: Path, at_most: int) -> bytes:
    """The content of a file; links are followed, as the hub's cache is made of them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file (a pipe or a device may never end), or a longer one.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    if found.st_size > at_most:
        raise ValueError(f"{path.name} has {found.st_size:,} bytes, and {at_most:,} are allowed")
    return path.read_bytes()
