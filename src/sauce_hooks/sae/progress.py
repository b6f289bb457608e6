"""Progress bars, in one place."""

from __future__ import annotations

import sys
from typing import Any

_SECONDS_IN_A_LOG = 30.0
_IN_A_LOG = "{desc}: {percentage:3.0f}%, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(total: int, what: str, unit: str, *, show: bool, done: int = 0) -> Any:
    """A tqdm bar. Where nobody watches (a log file), a line every half minute instead of ten redrawings a second."""
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"total": total, "initial": done, "desc": what, "unit": unit, "disable": not show}
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(**options, mininterval=0.1, maxinterval=0.2)
    log, pause = _Lines(), _SECONDS_IN_A_LOG
    return tqdm(**options, mininterval=pause, maxinterval=2 * pause, file=log, bar_format=_IN_A_LOG)


class _Lines:
    """Stderr for what tqdm draws: each drawing is a line of its own, not written over the last one."""

    def write(self, drawn: str) -> None:
        if line := drawn.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
