"""Units of work, shared among processes of one core each, that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

_Unit = TypeVar("_Unit")


def in_processes(
    do: Callable[[_Unit], object],
    units: Sequence[_Unit],
    jobs: int,
    *,
    start: Callable[..., object],
    given: tuple[Any, ...] = (),
    after: Callable[[], object],
) -> None:
    """Do every unit in one of several processes. Ctrl-C, or an error in any of them, ends them all at once.

    What a unit finds it must keep itself, in a file that is written whole or not at all.

    Args:
        do: does a unit; a function of a module, so that it can be pickled.
        units: what is to be done; picklable.
        jobs: processes.
        start: run first in each process.
        given: what it is given; picklable.
        after: run here after each unit, in their order.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (start, given))
    try:
        with _interrupts_held():  # processes begin with what is held here, and so never hear of it
            futures = [pool.submit(do, unit) for unit in units]
        for future in futures:
            future.result()
            after()
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # what is finished is on disk
        pool.shutdown(wait=False)  # it finds its processes gone; futures cancelled meanwhile would confuse it
        raise
    pool.shutdown()


@contextmanager
def _interrupts_held() -> Generator[None]:
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(start: Callable[..., object], given: tuple[Any, ...]) -> None:
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends this one
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # bars of several processes would be drawn through each other
    start(*given)


def _end_with_the_first() -> None:
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()  # it was killed: nobody is left to take what this one finds
        os._exit(1)
