"""``subprocess.Popen`` of a Python script, forked from the tests' server instead of by a Python that imports torch."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

import fork_server

PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired


class Popen:
    """PYTHON SCRIPT ARGUMENTS..., in a session of its own: text goes in and out by pipes, errors into a file."""

    def __init__(self, words: Sequence[str], *, stderr: IO[Any], env: dict[str, str], **_: object) -> None:
        assert words[0] == sys.executable and words[1].endswith(".py"), words
        stdin, writer = multiprocessing.Pipe(duplex=False)
        reader, stdout = multiprocessing.Pipe(duplex=False)
        ends = (stdin, stdout, Connection(os.dup(stderr.fileno())))
        arguments = (words[1:], env | fork_server.address(), ends)
        self._process = multiprocessing.get_context("forkserver").Process(target=_main, args=arguments)
        self._process.start()
        for end in ends:
            end.close()
        self.stdin = os.fdopen(os.dup(writer.fileno()), "w")
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired("a forked script", timeout or 0.0)
        return self._process.exitcode


def _main(words: list[str], environment: dict[str, str], ends: tuple[Connection, ...]) -> None:
    os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ.update(environment)
    fork_server.join()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
