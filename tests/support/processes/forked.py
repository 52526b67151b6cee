"""A command in a fork of the test's process, which has imported everything: it starts in milliseconds."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dreamlip_train import cli

_VERSION_3 = 0x20080522
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: permissions mean nothing to who has them


def start(words: list[str], out: Path, before: Callable[[], None] = lambda: None) -> int:
    """The process, in a group of its own; what it prints goes to ``out``."""
    begun, begin = os.pipe()
    child = os.fork()
    if child:
        os.close(begin)
        os.read(begun, 1)  # its group is there from now on
        os.close(begun)
        return child
    code = 1
    try:
        os.setsid()
        handle = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        before()
        os.write(begin, b"1")
        with os.fdopen(1, "w", closefd=False) as stdout, os.fdopen(2, "w", closefd=False) as stderr:
            sys.stdout, sys.stderr = stdout, stderr
            code = _exit_code(lambda: cli.main(words))
    finally:
        os._exit(code)


def _exit_code(program: Callable[[], object]) -> int:
    """That of a process that runs ``program`` and ends; a traceback is printed."""
    try:
        program()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def ended(process: int, seconds: float = 60.0) -> int:
    """The exit code; a process that has not ended by then is killed, and the test fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError("the process did not end")


def obey_permissions() -> None:
    """From here on this process, also of root, writes only where the permissions say so."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Data(ctypes.Structure):
        _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]

    libc, header, data = ctypes.CDLL(None, use_errno=True), Header(_VERSION_3, 0), (Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0, os.strerror(ctypes.get_errno())
    data[0].effective &= ~_OVERRIDES
    data[0].permitted &= ~_OVERRIDES
    assert libc.capset(ctypes.byref(header), data) == 0, os.strerror(ctypes.get_errno())


def python_module(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """``subprocess.run([sys.executable, "-m", MODULE, ...])`` in a fork of this process: its imports are there."""
    assert command[:2] == [sys.executable, "-m"], command
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout = sys.stderr = out
                sys.argv = command[2:]
                code = _exit_code(lambda: runpy.run_module(command[2], run_name="__main__", alter_sys=True))
            finally:
                out.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        printed = out.read()
    return subprocess.CompletedProcess(command, code, printed, printed)
