"""What takes long to make, and is the same for every process of a test run, made by the first that asks for it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def run_folder() -> Path:
    """A folder of this run, which all its processes share and which ends with it (tests/conftest.py)."""
    return Path(os.environ["DREAMLIP_TEST_RUN"])


def once(key: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """The file that ``make`` wrote for ``key`` to the path given to it."""
    target = run_folder() / (hashlib.sha256(key.encode()).hexdigest()[:16] + suffix)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            make(target.with_suffix(".partial"))
            target.with_suffix(".partial").rename(target)
    return target
