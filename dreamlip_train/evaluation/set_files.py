"""Files of published sets: read, or refused by name with what was expected, what came and where the set comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.atomic_json import parse_json
from dreamlip_train.jobs.user_error import UserError

_CHUNK, _LONGEST_RECORD = 2**22, 2**26  # characters


def first_file(source: str, *paths: Path) -> Path:
    """The first of ``paths`` that is a file; ``source`` says where the set comes from, for the error."""
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"--root: no file {' or '.join(str(path) for path in paths)}. {source}")


def set_text(path: Path, source: str) -> str:
    """A file's text; it must be UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--root: cannot read {path}: {error}. {source}") from error


def set_json(path: Path, source: str) -> Any:
    """A json file's content."""
    try:
        return parse_json(set_text(path, source))
    except UserError:
        raise
    except ValueError as error:
        raise other_layout(path, f"json ({error})", source) from error


def set_json_lines(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    """(line number, content) of a file with one json a line."""
    for number, line in enumerate(set_text(path, source).split("\n"), 1):  # a caption may hold other line separators
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise other_layout(path, f"json in line {number} ({error})", source) from error


def first_records(path: Path, count: int, source: str) -> list[Any]:
    """The first ``count`` entries of a json list; the rest, which may be gigabytes, is not read.

    Raises:
        UserError: the file can't be read, is no list, or has fewer entries.
    """
    decoder, records = json.JSONDecoder(), []
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK).lstrip()
            if not text.startswith("["):
                raise other_layout(path, "a json list", source)
            place = 1
            while len(records) < count:
                while place < len(text) and text[place] in ", \t\r\n":
                    place += 1
                try:
                    record, place = decoder.raw_decode(text, place)
                    records.append(record)
                except json.JSONDecodeError as error:  # the list's end, a record cut off by the chunk's end, or damage
                    over = text.startswith("]", place) or len(text) - place > _LONGEST_RECORD
                    more = "" if over else file.read(_CHUNK)
                    if not more:
                        came = f"got {len(records)} records, then {text[place : place + 20]!r}"
                        raise other_layout(path, f"a json list of at least {count} records, {came}", source) from error
                    text, place = text[place:] + more, 0
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--root: cannot read {path}: {error}. {source}") from error
    return records


def text_field(row: Any, key: str, path: Path, number: int, source: str) -> str:
    """``row[key]``, which must be a text; ``number`` counts the file's records, 0 where it is one."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str):
        place = f" in record {number}" if number else ""
        came = f"the keys {', '.join(map(str, row))}"[:200] if isinstance(row, dict) else type(row).__name__
        raise other_layout(path, f'"{key}", a text,{place}, which has {came}', source)
    return value


def other_layout(path: Path, expected: str, source: str) -> UserError:
    """The error for a file that is there and is not what the set has."""
    return UserError(f"--root: {path} has another layout: expected {expected}. {source}")


def require_files(paths: list[Path], name: str, source: str) -> None:
    """Every image of a published set must be there."""
    require_all([path for path in paths if not path.is_file()], "--root", f"{name}'s {len(paths)} images", source)


def require_all(missing: Sequence[object], option: str, what: str, source: str = "") -> None:
    """None of ``what`` may be missing: a number over a part is another number."""
    if missing:
        raise UserError(
            f"{option}: {len(missing)} of {what} are not there, such as {missing[0]}; fetch them, since a number over "
            f"a part is another. {source}".rstrip()
        )
