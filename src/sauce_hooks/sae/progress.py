"""Progress bars, in one place."""

from __future__ import annotations

import sys
from typing import Any

_SECONDS_IN_A_LOG = 30.0


def progress_bar(total: int, what: str, unit: str, *, show: bool, done: int = 0) -> Any:
    """A tqdm bar. Where nobody watches (a log file), a line every half minute instead of ten a second."""
    from tqdm.auto import tqdm

    pause = 0.1 if sys.stderr.isatty() or "ipykernel" in sys.modules else _SECONDS_IN_A_LOG
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not show, mininterval=pause, maxinterval=2 * pause)
