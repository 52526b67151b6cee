"""Blocks that succeed on every rank or fail on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from dreamlip_train.jobs.user_error import RunError


class SaveError(RunError):
    """A checkpoint that could not be written, on every rank alike; those before it are untouched."""


@contextlib.contextmanager
def all_or_none() -> Iterator[list[Exception]]:
    """A block that fails on all ranks if it fails on one: errors raised in it, or put into its list, become one SaveError everywhere."""
    errors: list[Exception] = []
    try:
        yield errors
    except (OSError, RuntimeError) as error:
        errors.append(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, f"{type(errors[0]).__name__}: {errors[0]}" if errors else None)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if failed:
        raise SaveError(failed[0])
