"""The command line, ``dreamlip-train COMMAND``. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from typing import Any

from dreamlip_train.cli import ablate, doctor, evaluation, prepare, report, show, train, weights
from dreamlip_train.cli.usage import PROGRAM, closest, say, usage
from dreamlip_train.jobs.plain_text import PlainFormatter, plain
from dreamlip_train.jobs.progress_line import set_progress_style
from dreamlip_train.jobs.user_error import RunError, UserError

# What the system says of a machine, a disk or a permission: never our bug.
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.EFBIG, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command. A UserError or RunError, or what the system says of a disk or a permission, prints as one
    message and exits with 2; anything else keeps its traceback.
    """
    arguments = _without_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be text that the terminal can show
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # what is logged before a run has its log
        logging.lastResort.setFormatter(PlainFormatter())
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read the output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (UserError, RunError, OSError, ValueError, RuntimeError) as error:
        of_the_machine = isinstance(error, OSError) and error.errno in _OF_THE_MACHINE
        if not (isinstance(error, UserError | RunError) or of_the_machine or _raised_by_the_kernels(error)):
            raise
        rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1" else ""
        print(plain(f"{rank}{PROGRAM}: {error}"), file=sys.stderr)
        sys.exit(2)


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The words without the ``--local_rank=N`` or ``--local_rank N`` that launchers put before them;
    LOCAL_RANK says the same.
    """
    while arguments and arguments[0].replace("-", "_").startswith("__local_rank"):
        arguments = arguments[1:] if "=" in arguments[0] else arguments[2:]
    return arguments


def _raised_by_the_kernels(error: BaseException) -> bool:
    """Whether dreamlip_kernels, which has no class for it, refuses what it was asked for, such as a backend."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith("dreamlip_kernels")


def _dispatch(arguments: list[str]) -> None:
    """Walk COMMANDS along the first words and hand the rest to the command that they name."""
    words: list[str] = []
    command: Any = COMMANDS
    while arguments and arguments[0].split("=")[0] == "--progress":
        option = arguments.pop(0)
        if "=" not in option and not arguments:
            raise UserError("--progress: give a style before the command: auto, bar, lines, json or off")
        set_progress_style(option.partition("=")[2] if "=" in option else arguments.pop(0))
    while isinstance(command, dict):
        if not arguments or arguments[0] in ("-h", "--help"):
            say(usage(words, command))
            sys.exit(0 if arguments else 2)
        word = arguments.pop(0)
        if word not in command:
            raise UserError(f"{' '.join([*words, ''])}{word}: no such command; did you mean {closest(word, command)}?")
        words.append(word)
        command = command[word]
    command(arguments, f"{PROGRAM} {' '.join(words)}")


COMMANDS: dict[str, Any] = {
    "prepare": prepare.COMMANDS,
    "recaption": prepare.recaption,
    "train": train.train,
    "eval": evaluation.COMMANDS,
    "ablate": ablate.ablate,
    "report": report.report,
    "import": weights.import_,
    "export": weights.export,
    "plot": report.plot,
    "show": show.show,
    "explore": show.explore,
    "doctor": doctor.doctor,
}
