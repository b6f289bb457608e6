"""The judges' data files, and files that users give: data only, read whole or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from sauce_hooks.bank.files import read_regular
from sauce_hooks.errors import JudgeFileError

_MOST_BYTES = 4_000_000


def read_text(name: str) -> str:
    """The content of a data file of this package."""
    return files("sauce_hooks.evaluation.judges").joinpath(name).read_text(encoding="utf-8")


def read_json(name: str) -> dict[str, Any]:
    """The content of a JSON file of this package."""
    return json.loads(read_text(name))


def read_user_json(path: str | Path) -> Mapping[str, Any]:
    """A user's JSON file.

    Raises:
        JudgeFileError: it can't be read, is too large, or holds no JSON object.
    """
    try:
        found = json.loads(read_regular(Path(path), _MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise JudgeFileError(f"{path} can't be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise JudgeFileError(f"{path} holds a {type(found).__name__}: a JSON object is wanted")
    return found
