"""What ``dreamlip-train`` says of its commands and of words that are none."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.user_error import UserError

PROGRAM = "dreamlip-train"
_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


def say(text: str) -> None:
    """Print ``text``, in which names and captions of strangers may stand, to standard output."""
    print(plain(text), flush=True)


def usage(words: list[str], commands: dict[str, Any]) -> str:
    """The commands below ``words``, one line each."""
    lines = [f"usage: {' '.join([PROGRAM, *words])} COMMAND ...", ""]
    for name, command in commands.items():
        if isinstance(command, dict):
            lines += [f"  {name + ' ' + sub:<20} {first_line(inner)}" for sub, inner in command.items()]
        else:
            lines.append(f"  {name:<20} {first_line(command)}")
    lines += [
        "",
        "Each takes --help. Before the command, --progress auto|bar|lines|json|off says how progress is shown.",
    ]
    return "\n".join(lines)


def first_line(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring."""
    return (function.__doc__ or "").strip().split("\n")[0]


def closest(word: str, names: Collection[str]) -> str:
    """The names most like ``word``, or all of them."""
    return ", ".join(difflib.get_close_matches(word, names, n=3) or list(names))


def require_picture(output: str) -> None:
    """``require_writable`` of a file in which matplotlib is to draw.

    Raises:
        UserError: it can't be written there, or its name ends in none of the formats.
    """
    require_writable(output)
    if not output.lower().endswith(_PICTURES):
        raise UserError(f"--output: got {output!r}; give a name that ends in {', '.join(_PICTURES)}")


def require_writable(output: str) -> None:
    """Work of hours must not end at a folder that is not there; "" writes nothing.

    Raises:
        UserError: the file can't be written there.
    """
    folder = Path(output).absolute().parent
    if output and not folder.is_dir():
        raise UserError(f"--output: no folder {str(folder)!r}; make it first")
    if output and Path(output).is_dir():
        raise UserError(f"--output: {output!r} is a folder; give a file")
    if output and not os.access(output if Path(output).exists() else folder, os.W_OK):
        raise UserError(f"--output: {output!r} can't be written there; give another file")
