"""A map over forked processes that reads its input no further ahead than it must."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_function: Callable[[Any], Any]


def map_bounded(function: Callable[[Any], Any], items: Iterable[Any], processes: int = 0) -> Iterator[Any]:
    """``map(function, items)``, in order, on forked processes (0: one a core); at most four items a process wait at any time.

    ``function`` need not be picklable (the processes are forks), items and results must be.
    """
    global _function
    _function = function
    processes = processes or max(1, len(os.sched_getaffinity(0)))
    room = threading.Semaphore(4 * processes)

    def paced() -> Iterator[Any]:
        for item in items:
            room.acquire()
            yield item

    with multiprocessing.get_context("fork").Pool(processes, initializer=_plain_sigterm) as pool:
        for result in pool.imap(_call, paced()):
            room.release()
            yield result


def _plain_sigterm() -> None:
    """The pool ends its processes with SIGTERM. A handler inherited from the parent (Ray installs one) could come too late: Python runs it only after the
    wait that the process has just begun, and the pool would wait for it for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(item: Any) -> Any:
    return _function(item)
