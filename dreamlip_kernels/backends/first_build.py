"""C++ sources built at their first use: one process builds, the others wait, and nobody waits for the dead.

sources, flags, torch -> a name -> loaded, if a library of that name is there -> else built in a folder of this build's
own by a process of its own, and moved to its name when it is whole and has been loaded once

torch's own builder marks a build with a file and builds where it loads from: a killed build keeps every later process
waiting for ever, a compiler that outlives it writes into a library in use, and one that hangs hangs its caller.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from . import cache, child_process

logger = logging.getLogger("dreamlip_kernels")

PATIENCE = 600.0  # seconds to wait for a compiler, and for another process' build
_POLL = 0.2
_LAST_WORDS = 5.0  # seconds that a compiler has to end in when it is told to
_BUILDER = """
import json, os, sys
from torch.utils import cpp_extension
name, sources, flags, folder, target = json.loads(sys.argv[1])
cpp_extension.load(name, sources, extra_cflags=flags, build_directory=folder, verbose=False)
built = os.path.join(folder, name + ".so")
with open(built, "rb") as file:
    os.fsync(file.fileno())
os.replace(built, f"{target}-{os.path.getsize(built)}.so")
"""


def build(name: str, sources: list[str], flags: list[str], patience: float = PATIENCE) -> ModuleType:
    """The extension module ``name``, compiled into the first cache folder that takes it unless it is in one already.

    Raises:
        TimeoutError: the compiler, or another process that compiles, has been at it for ``patience`` seconds.
        RuntimeError: it does not compile; the message is the compiler's own error line.
        OSError: no folder takes it.
    """
    stem = f"{name}-{_digest(sources, flags)}"
    for folder in folders():
        if (module := _loaded(name, folder, stem)) is not None:
            return module
    folder = _writable()
    with _only_builder(folder, name, patience) as lock:
        if (module := _loaded(name, folder, stem)) is not None:  # of the process that was waited for
            return module
        logger.warning(
            "compiling the C++ kernels once, into %s (half a minute); "
            "installing the package with torch present avoids it",
            folder,
        )
        began = time.monotonic()
        with tempfile.TemporaryDirectory(
            prefix=f"{name}-", suffix=".building", dir=folder, ignore_cleanup_errors=True
        ) as private:
            _compile([name, sources, flags, private, str(folder / stem)], lock, patience)
        logger.warning("compiled the C++ kernels in %.0f s", time.monotonic() - began)
        module = _loaded(name, folder, stem)
    if module is None:
        raise RuntimeError(f"what was built in {folder} is gone")
    return module


def folders() -> list[Path]:
    """Where libraries may lie: TORCH_EXTENSIONS_DIR where it is set, then where everything of ours is cached."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [folder.absolute() for folder in ([Path(extensions)] if extensions else []) + cache.folders()]


def error_line(output: str) -> str:
    """The line of a failed build that says why: the compiler's first error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(fatal )?error\b:|not found|cannot find", line)]
    return next(iter(errors), lines[-1] if lines else "no message")


def _digest(sources: list[str], flags: list[str]) -> str:
    """A word that changes with whatever decides what the library holds: sources and their headers, flags, torch,
    Python and machine.
    """
    import torch

    digest = hashlib.sha256(json.dumps([flags, torch.__version__, sys.version, platform.machine()]).encode())
    files = {Path(source) for source in sources} | {h for s in sources for h in Path(s).parent.glob("*.h")}
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _loaded(name: str, folder: Path, stem: str) -> ModuleType | None:
    """The library ``stem`` of ``folder`` as a module; None where there is none, or none that is whole and loads."""
    for path in folder.glob(f"{stem}-*.so"):
        try:
            if not cache.is_own(folder):
                logger.warning("%s belongs to another user; nothing is loaded from there", folder)
                return None
            if path.name != f"{stem}-{path.stat().st_size}.so":  # cut off: to load it would end the process
                continue
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None  # by its ending
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        except (ImportError, OSError) as error:  # built where other libraries are, or gone in this moment
            logger.warning("%s can't be loaded and is built again: %s", path, error)
    return None


def _writable() -> Path:
    """The first of the folders that takes files."""
    reasons = []
    for folder in folders():
        try:
            cache.make(folder)
            if not cache.is_own(folder):
                raise PermissionError(1, "it belongs to another user")
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0" * 4096)
            return folder
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    raise OSError(f"no folder takes what is built ({'; '.join(reasons)}); set DREAMLIP_CACHE_DIR")


def _compile(words: list[Any], lock: int | None, patience: float) -> None:
    """Build in a process that has the lock too: killed alone, this one leaves a build that ends well, and that others
    wait for.
    """
    environment = child_process.environment()
    beside = sysconfig.get_path("scripts")  # where pip puts ninja, also in an environment that nobody activated
    environment["PATH"] = os.pathsep.join([beside, environment.get("PATH", os.defpath)])
    with tempfile.TemporaryFile() as log:  # a pipe would stay open as long as a compiler that outlives its builder
        process = subprocess.Popen(
            [*child_process.PYTHON, "-c", _BUILDER, json.dumps(words)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[] if lock is None else [lock],
        )
        try:
            _note(lock, process.pid)
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the compiler has not come to its end in {patience:.0f} s") from None
        finally:
            _end(process)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if status < 0:
        raise RuntimeError(f"the process that compiles was killed ({signal.Signals(-status).name})")
    if status:
        raise RuntimeError(error_line(output))


def _end(process: subprocess.Popen[bytes]) -> None:
    """No such process any more: told first, so that ninja ends its compilers, which are groups of their own."""
    for number, seconds in ((signal.SIGTERM, _LAST_WORDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


@contextlib.contextmanager
def _only_builder(folder: Path, name: str, patience: float) -> Iterator[int | None]:
    """Within, no other process builds ``name`` in ``folder``, as far as its file system can lock; yields the lock's
    file descriptor.
    """
    with open(folder / f"{name}.lock", "a+") as file:
        if not _locked(file, patience):
            yield None
            return
        for left in folder.glob(f"{name}-*.building"):  # by the killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        _note(file.fileno(), os.getpid())
        yield file.fileno()  # closing the file gives the lock back; so does the end of its processes


def _locked(file: Any, patience: float) -> bool:
    """Whether this process has the lock, sooner or later; False where the file system has no locks: builds are private,
    so that the last one's result stays.
    """
    deadline, has_said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            file.seek(0)
            builder = file.read().strip() or "?"
        except OSError:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"process {builder} has been building {file.name.removesuffix('.lock')} for {patience:.0f} s; end it, "
                "and start again"
            )
        if not has_said:
            logger.warning("waiting for process %s, which is building the C++ kernels", builder)
        has_said = True
        time.sleep(_POLL)


def _note(lock: int | None, pid: int) -> None:
    """Who builds, in the lock's file, for those who wait."""
    if lock is not None:
        os.ftruncate(lock, 0)
        os.write(lock, f"{pid} of {socket.gethostname()}".encode())
