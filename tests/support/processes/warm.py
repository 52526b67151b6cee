"""A command of the trainer, or a script, as a process of its own that imports nothing: it is forked from a server that
has imported the trainer once (tests/conftest.py) and computes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tiny import clean_environment


def _main(words: list[str], environment: dict[str, str], output: str, session: bool) -> None:
    if session:
        os.setsid()
    multiprocessing.set_start_method(None, force=True)  # not the server's: the system's, as in a user's process
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        sys.argv = ["dreamlip-train", *words]
        from dreamlip_train import cli

        cli.main(words)


class Command:
    """``dreamlip-train WORDS``, or ``python WORDS`` where they begin with a script; what it prints goes to a file.

    In a ``session`` of its own it has a process group; ``environment`` adds to this process's own.
    """

    def __init__(
        self, words: Sequence[object], output: Path, *, session: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.output = output
        arguments = ([*map(str, words)], clean_environment() | (environment or {}), str(output), session)
        self.process = multiprocessing.get_context("forkserver").Process(target=_main, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 100.0) -> int:
        """The exit code once it has ended; what takes longer is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.text()[-3000:]}")
        return self.process.exitcode

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def two_ranks(words: Sequence[object], folder: Path) -> list[Command]:
    """The command on two ranks of one group, as a launcher starts them; each prints to ``folder``/rank-N.out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [Command(words, folder / f"rank-{place['RANK']}.out", environment=place) for place in places]
