"""C++ sources built at their first use: one process builds, the others wait, and nobody waits for the dead.

torch's own builder marks a build with a file, which a killed build leaves behind: every later process waits for it for
ever. Here a lock of the operating system goes with its process, and whoever holds it knows that no mark is anyone's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

logger = logging.getLogger("dreamlip_kernels")

PATIENCE = 600.0  # seconds to wait for another process' build
_POLL = 0.2


def build(name: str, sources: list[str], flags: list[str], patience: float = PATIENCE) -> ModuleType:
    """The extension module ``name``, compiled into torch's cache of extensions unless it is there already.

    Raises:
        TimeoutError: another process has been building for ``patience`` seconds.  RuntimeError: it does not compile;
            the message is the compiler's own error line.
    """
    from torch.utils import cpp_extension

    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with _only_builder(folder, patience):
        (folder / "lock").unlink(missing_ok=True)  # of a build that was killed: we hold the lock that counts
        try:
            module = cpp_extension.load(name, sources, extra_cflags=flags, build_directory=str(folder), verbose=False)
        except RuntimeError as error:
            raise RuntimeError(error_line(str(error))) from error
    assert isinstance(module, ModuleType)  # a path comes of a program
    return module


def error_line(output: str) -> str:
    """The line of a failed build that says why: the compiler's first error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(fatal )?error\b:|not found|cannot find", line)]
    return next(iter(errors), lines[-1] if lines else "no message")


@contextmanager
def _only_builder(folder: Path, patience: float) -> Iterator[None]:
    """Within, no other process builds in ``folder``."""
    with open(folder / "builder", "a+") as file:
        deadline = time.monotonic() + patience
        waited = False
        while not _locked(file):
            file.seek(0)
            builder = file.read().strip() or "?"
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {builder} has been building in {folder} for {patience:.0f} s; end it, and start again"
                )
            if not waited:
                logger.warning("waiting for process %s, which is building the C++ kernels", builder)
            waited = True
            time.sleep(_POLL)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield  # closing the file gives the lock back; so does the end of the process


def _locked(file) -> bool:
    """Whether this process has the lock on ``file`` now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
