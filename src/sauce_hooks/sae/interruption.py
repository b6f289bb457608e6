"""Ctrl-C and the scheduler's SIGTERM, put off until a training has saved itself."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within this, from `hold` on, a signal is only noted. A second Ctrl-C does what it always did.

    A second SIGTERM is noted, too: schedulers and launchers both send one, and what comes after it is SIGKILL.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        """What to do: `enabled=False` leaves signals alone, as does a thread that is not the main one."""
        self.signal: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        return self

    def hold(self) -> None:
        """From now on there is something to save."""
        if not self._enabled:
            return
        self._enabled = False
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # None: not Python's, so that it could not be put back
                self._before[number] = before
                signal.signal(number, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def leave(self, message: str) -> None:
        """Leave the program as the signal would have, after saying what was saved."""
        self._restore()
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + signal.SIGTERM)
