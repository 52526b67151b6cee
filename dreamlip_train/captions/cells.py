"""What a table's cell holds, as text or plain JSON: values that are not text never become text by accident."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from dreamlip_train.captions.columns import LONGEST_CAPTION, is_caption_column
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.jobs.atomic_json import parse_json

IMAGE_BYTES = "image bytes"
"""In a row whose table has the pictures inside: the picture's file."""
_DEEPEST = 16
_UNSEPARATED = re.compile(r"""(?<=['"])\s+(?=['"])""")
_NUMPY = re.compile(r"array\((\[.*\])(?:,\s*dtype=[^()\[\]]+)?\)", re.DOTALL)
# How a value begins that a program wrote as text: a list, tuple, object or bytes of Python, numpy or JSON.
_WRITTEN = re.compile(r"""\[\s*(?:b?['"{]|None\b|null\b)|\(\s*b?['"]|b['"]|\{\s*['"]|array\(\[""")


class CellError(ValueError):
    """A cell that is no text and no plain value."""


def as_row(record: Mapping[str, Any], rename: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(cells under our names without the empty ones, what was repaired or left out), or (None, why the row can't be
    used).

    Caption columns keep text, and lists of text; a list that was written as text is a list again, and of a conversation
    the answer is the caption. Bytes are UTF-8, but for a picture inside the table ({"bytes", "path"}).

    Args:
        rename: {the table's column: ours}, where they differ.
    """
    row: dict[str, Any] = {}
    notes: list[str] = []
    for name, cell in record.items():
        name = rename.get(name, name)
        try:
            if name == IMAGE_COLUMN:
                row |= _image(cell, notes)
                continue
            value = _plain(cell, notes, name)
            if is_caption_column(name):
                value = _caption(value, notes, name)
        except CellError as error:
            if name == IMAGE_COLUMN:
                return None, f"{name}: {error}"
            notes.append(f"{name} left out: {error}")
            continue
        if value not in (None, "", []):
            row[_text(name, [], "")] = value
    return row, "; ".join(dict.fromkeys(notes))


def _image(cell: Any, notes: list[str]) -> dict[str, Any]:
    """The image column of a row: a name, or a picture's bytes and perhaps its name."""
    row = {}
    if isinstance(cell, Mapping) and ("bytes" in cell or "path" in cell):  # as Hugging Face's datasets keep pictures
        if isinstance(cell.get("bytes"), bytes | bytearray):
            row[IMAGE_BYTES] = bytes(cell["bytes"])
        cell = cell.get("path")
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    value = _plain(cell, notes, IMAGE_COLUMN)
    if value is None or value == "":
        return row
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise CellError(f"a {type(cell).__name__}, not text")
    return row | {IMAGE_COLUMN: str(value)}


def _plain(value: Any, notes: list[str], name: str, depth: int = 0) -> Any:
    """``value`` as JSON has it: strings that have a UTF-8 form, finite numbers, lists and objects of them."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _text(value, notes, name)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return _text(bytes(value).decode("utf-8"), notes, name)
        except UnicodeDecodeError as error:
            raise CellError(f"bytes that are not UTF-8 ({bytes(value)[:8]!r} ..)") from error
    if depth == _DEEPEST:
        raise CellError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping):
        return {_text(str(k), notes, name): _plain(v, notes, name, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, notes, name, depth + 1) for item in value]
    return str(value)  # dates, decimals


def _text(value: str, notes: list[str], name: str) -> str:
    """``value`` without null bytes, lone surrogates replaced."""
    if value.isascii() and "\0" not in value:
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        notes.append(f"{name}: half of an escaped character replaced")
        value = value.encode("utf-8", "replace").decode("utf-8")
    if "\0" in value:
        notes.append(f"{name}: null bytes taken out")
    return value.replace("\0", "")


def _caption(value: Any, notes: list[str], name: str) -> Any:
    """A caption cell's text or list of texts."""
    if isinstance(value, str):
        return written_value(value, notes, name)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if all(isinstance(sentence.get("raw"), str) for sentence in value):  # Karpathy's sentences
            return [sentence["raw"] for sentence in value]
        return _answer(value)
    if isinstance(value, list):
        texts = [item for item in value if isinstance(item, str)]
        if any(isinstance(item, list | dict) for item in value):
            raise CellError("a list of something else than texts")
        return texts
    if value is not None:
        raise CellError(f"a {type(value).__name__}, not text")
    return value


def _answer(turns: list[dict[str, Any]]) -> str:
    """What a model says of the picture in a conversation {"from", "value"} or {"role", "content"} of one question."""
    answers = [
        turn.get("value", turn.get("content"))
        for turn in turns
        if str(turn.get("from", turn.get("role"))).lower() in ("gpt", "assistant", "model")
    ]
    if len(answers) != 1:
        raise CellError(f"a conversation with {len(answers)} answers is no caption")
    if not isinstance(answers[0], str):
        raise CellError("an answer that is no text")
    return answers[0]


def written_value(text: str, notes: list[str], name: str) -> Any:
    """The value of a caption such as "['A dog.', 'It runs.']", which to_csv makes of a list column, or "b'A dog.'",
    which it makes of bytes; any other text as it is.

    Raises:
        CellError: the value is no caption.
    """
    bare = text.strip()
    if not _WRITTEN.match(bare) or bare[-1] not in "])}'\"" or len(bare) > LONGEST_CAPTION:
        return text
    bare = array.group(1) if (array := _NUMPY.fullmatch(bare)) else bare
    try:
        with warnings.catch_warnings(action="ignore"):  # of an unknown escape, such as "\\d"
            # numpy writes no commas; Python would join such strings to one.
            value = ast.literal_eval(_UNSEPARATED.sub(", ", bare))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        try:
            value = parse_json(bare)
        except ValueError:
            return text
    if not isinstance(value, list | tuple | dict | bytes):  # a caption that is in quotes and brackets
        return text
    form = "bytes that were" if isinstance(value, bytes) else "a list that was"
    value = _plain(value, notes, name)
    value = value if isinstance(value, str) else _caption(value, notes, name)
    notes.append(f"{name}: {form} written as text, read as {form.rsplit(' ', 2)[0]}")
    return value
