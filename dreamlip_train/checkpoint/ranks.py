"""Blocks that succeed on every rank or fail on every rank."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from dreamlip_train.jobs.user_error import RunError, UserError

logger = logging.getLogger("dreamlip_train")

_NAMED = re.compile(r"--|\w+\.\w+: ")  # an error that says which flag or field it is about


class SaveError(RunError):
    """A checkpoint that could not be written, on every rank alike; those before it are untouched."""


@contextlib.contextmanager
def all_or_none() -> Iterator[list[str]]:
    """A block that fails on all ranks if it fails on one: errors raised in it, or put into its list,
    become one SaveError everywhere.
    """
    # Texts, not exceptions: a kept exception keeps its frames, and with them the files that they have open.
    errors: list[str] = []
    try:
        yield errors
    except (OSError, RuntimeError) as error:
        errors.append(describe_error(error))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors[0] if errors else None)
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if failures:
        raise SaveError(failures[0])


def describe_error(error: Exception) -> str:
    """The error's class and message."""
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def deaths_told_afterwards() -> Iterator[None]:
    """A block in which the death of a child process (SIGCHLD) interrupts nothing; the handler is called when it is
    over.

    torch raises in the middle of whatever the main thread does when a loader worker dies. In a save that would cost the
    checkpoint, and look as if the disk had failed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deaths: list[Any] = []
    handler = signal.signal(signal.SIGCHLD, lambda number, frame: deaths.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    if deaths and callable(handler):
        handler(signal.SIGCHLD, None)


def on_first_rank(work: Callable[[], list[str]]) -> None:
    """Rank 0 alone does ``work``, whose lines are logged loudly; an error in it is everybody's. Collective."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            for line in work():
                logger.warning(line)
        except OSError as error:
            outcome = [f"--run-dir: {error}"]
        except UserError as error:
            outcome = [str(error) if _NAMED.match(str(error)) else f"--run-dir: {error}"]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise UserError(outcome[0])
