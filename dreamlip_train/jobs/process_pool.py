"""A map over forked processes that reads its input no further ahead than it must, and says what died where one of them
was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from dreamlip_train.jobs.user_error import RunError

_WAITING_PER_PROCESS = 4
_function: Callable[[Any], Any]


def map_bounded(function: Callable[[Any], Any], items: Iterable[Any], processes: int = 0) -> Iterator[Any]:
    """``map(function, items)``, in order, on forked processes (0: one per core); at most four items per process wait at
    any time.

    ``function`` need not be picklable (the processes are forks), items and results must be.
    When it raises, what the other processes have begun is finished first: nobody is killed over a file.

    Raises:
        RunError: a process died, as when the system kills it for its memory; the items that were under way are named.
    """
    global _function
    _function = function
    processes = processes or max(1, len(os.sched_getaffinity(0)))
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _begin, (os.getpid(),)) as pool:
        try:
            for item in items:
                with _interrupt_afterwards():
                    waiting.append((item, pool.submit(_call, item)))
                if len(waiting) >= _WAITING_PER_PROCESS * processes:
                    yield _first_result(waiting, processes)
            while waiting:
                yield _first_result(waiting, processes)
        except BrokenProcessPool as error:  # of submit
            raise _died(waiting, processes) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """A block that Ctrl-C interrupts at its end: Python loses an exception in the middle of a fork, and a process that
    is a fork by then would end with a traceback of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
    if interrupts and callable(handler):
        handler(*interrupts[0])


def _first_result(waiting: deque[tuple[Any, Future[Any]]], processes: int) -> Any:
    try:
        result = waiting[0][1].result()
    except BrokenProcessPool as error:
        raise _died(waiting, processes) from error
    waiting.popleft()
    return result


def _died(waiting: deque[tuple[Any, Future[Any]]], processes: int) -> RunError:
    """The error that names what was under way: the first items that were not finished."""
    unfinished = [item for item, future in waiting if future.cancelled() or not future.done() or future.exception()]
    names = ", ".join(f"{_short(item)}" for item in unfinished[:processes])
    return RunError(
        f"a worker process died, perhaps killed by the system for its memory, while at {names or 'its first item'}. "
        "What is finished is kept; give the same "
        "command again, with more memory or fewer processes"
    )


def _short(item: Any) -> str:
    """An item by its first name: tasks are names, or tuples that begin with a number or a name."""
    if isinstance(item, tuple):
        item = next((part for part in item if isinstance(part, str | os.PathLike)), item[:1])
    return f"{item!s:.200}"


def _begin(parent: int) -> None:
    """A worker's signals, and its end with its parent's.

    Ctrl-C is for the parent, which lets the workers finish. A handler of SIGTERM inherited from it (Ray installs one)
    is not for the worker. The queue it waits at does not close when the parent is killed, for its brothers hold it
    open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)
