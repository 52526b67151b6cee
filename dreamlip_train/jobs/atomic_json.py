"""JSON: files that are whole or absent, and texts of which every fault is a ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.user_error import UserError


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` at once: a crash leaves the old file or the new one, and of several writers the last one's is
    there whole.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path, shared=True) as partial:
        # A lone surrogate, of a file name or a caption, becomes the escape that JSON has for it.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it can't be read.  ValueError: it is no JSON.
    """
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, whose only error is ValueError: also where the text is nested too deep, or no UTF-8."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error


def read_json_object(path: str | Path, argument: str) -> dict[str, Any]:
    """The object in a JSON file that ``argument`` of a user names.

    Raises:
        UserError: it can't be read, or holds something else.
    """
    try:
        content = read_json(Path(path))
    except OSError as error:
        raise UserError(f"{argument}: cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{argument}: {str(path)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{argument}: {str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line; what is none, as a line that a crash cut off, is passed over."""
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict):
                yield record
