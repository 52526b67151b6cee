"""A map over forked processes that reads its input no further ahead than it must."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_function: Callable[[Any], Any]
_stopping: Any


def map_bounded(function: Callable[[Any], Any], items: Iterable[Any], processes: int = 0) -> Iterator[Any]:
    """``map(function, items)``, in order, on forked processes (0: one a core); at most four items a process wait at any time.

    ``function`` need not be picklable (the processes are forks), items and results must be. When it raises, what the other processes have begun is finished
    first: nobody is killed over a file.
    """
    global _function, _stopping
    context = multiprocessing.get_context("fork")
    _function, _stopping = function, context.Event()
    stopping = _stopping
    processes = processes or max(1, len(os.sched_getaffinity(0)))
    room = threading.Semaphore(4 * processes)

    def paced() -> Iterator[Any]:
        for item in items:
            room.acquire()
            if stopping.is_set():
                return
            yield item

    # Held back in this thread, and so in its forks, until each of them has the default in place.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        made = context.Pool(processes, initializer=_plain_sigterm)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with made as pool:
        try:
            for result in pool.imap(_call, paced()):
                room.release()
                yield result
        except Exception:
            stopping.set()
            room.release()
            pool.close()
            pool.join()
            raise


def _plain_sigterm() -> None:
    """The pool ends its processes with SIGTERM. A handler inherited from the parent (Ray installs one) could come too late: Python runs it only after the
    wait that the process has just begun, or lose it where an exception is ignored, and the pool would wait for it for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _call(item: Any) -> Any:
    return None if _stopping.is_set() else _function(item)
