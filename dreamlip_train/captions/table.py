"""Rows of a caption table (CSV, TSV, parquet, JSON, JSON lines), one at a time: however large the file,
and naming every row that cannot be read.

All cells pass cells.py, which says what is text.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreamlip_train.captions.cells import IMAGE_COLUMN, as_row, column_name
from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.captions.csv_rows import CsvRecords
from dreamlip_train.captions.parquet_rows import parquet_rows
from dreamlip_train.jobs.atomic_json import parse_json
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

SUFFIXES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")

Row = tuple[int, dict[str, Any] | None, str]
"""(row number from 1, its cells or None, what is wrong with it or was repaired in its cells);
empty cells are left out.
"""


def read_rows(path: Path, check: Callable[[Path, list[str]], None] | None = None) -> Iterator[Row]:
    """Every row of a table, columns under DreamLIP's CSV names (``column_name``).

    Args:
        check: called with the path and the column names before any row is given; raises UserError for those it does not
            accept. None wants the image column and a caption column.
    Raises:
        UserError: no such file, an empty one, another format, or one without the expected columns.
    """
    check = check or check_columns
    if not path.is_file():
        raise UserError(f"--captions: no file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path, check)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else ",", check)
    if suffix == ".jsonl":
        return _json_lines(path, check)
    if suffix == ".json":
        return _json_rows(path, check)
    raise UserError(f"--captions: {str(path)!r} is none of {', '.join(SUFFIXES)}")


def _csv_rows(path: Path, delimiter: str, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        header: list[str] = []
        records = CsvRecords(
            file, delimiter, lambda cells: len(cells) == len(header) and _names_a_picture(cells, header)
        )
        number = 0
        for line, cells, wrong in records:
            if not header:
                header = _header(path, cells or [], delimiter)
                check(path, header)
                continue
            number += 1
            if cells is None:
                yield number, None, wrong
            elif len(cells) != len(header):
                yield number, None, f"line {line}: {len(cells)} fields, the header has {len(header)}"
            else:
                yield number, *as_row({name: cell for name, cell in zip(header, cells, strict=True) if cell})
        if not header:
            raise UserError(f"--captions: {str(path)!r} is empty")
        logger.info("%s: %d rows on %d lines", path, number, records.lines)


def _header(path: Path, cells: list[str], delimiter: str) -> list[str]:
    other = next((mark for mark in "\t;|," if mark != delimiter and cells and mark in cells[0]), None)
    if len(cells) == 1 and other:
        raise UserError(
            f"--captions: {str(path)!r} is read as separated by {delimiter!r}, but its header {cells[0][:80]!r} has "
            f"{other!r}; "
            "name a tab-separated file .tsv, or convert it to CSV or parquet"
        )
    header = [column_name(name.strip()) for name in cells]
    repeated = [name for name, times in Counter(filter(None, header)).items() if times > 1]
    if repeated:
        raise UserError(f"--captions: {str(path)!r} has the column {repeated[0]!r} twice; rename one")
    return header


def _names_a_picture(cells: list[str], header: list[str]) -> bool:
    """Whether a line that has as many cells as the header is a row by itself, not a caption's line with as many
    commas.
    """
    name = cells[header.index(IMAGE_COLUMN) if IMAGE_COLUMN in header else 0].strip()
    return re.search(r"[./\\0-9]", name) is not None and (not re.search(r"\s", name) or "." in name[-5:])


def _json_lines(path: Path, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    checked = False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
                yield number, None, f"line {number}: {error}"
                continue
            if not isinstance(record, dict):
                yield number, None, f"line {number}: a {type(record).__name__}, not an object"
                continue
            if not checked:
                check(path, [column_name(name) for name in record])
                checked = True
            yield number, *as_row(record)


def _json_rows(path: Path, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    """A list of records, or an object of records by key (which becomes the column "key")."""
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig", errors="replace"))
    except ValueError as error:
        raise UserError(f"--captions: {str(path)!r} is not JSON: {error}") from error
    if isinstance(content, dict):
        content = [{"key": key, **value} if isinstance(value, dict) else value for key, value in content.items()]
    if not isinstance(content, list) or not content:
        raise UserError(
            f"--captions: {str(path)!r} must hold a list of records, or an object of records by key, and at least one"
        )
    first = next((record for record in content if isinstance(record, dict)), {})
    check(path, [column_name(name) for name in first])
    for number, record in enumerate(content, 1):
        if isinstance(record, dict):
            yield number, *as_row(record)
        else:
            yield number, None, f"record {number}: a {type(record).__name__}, not an object"


def check_columns(path: Path, names: list[str]) -> None:
    """A table needs the image column and at least one of DreamLIP's caption columns."""
    captions = [name for name in CAPTION_COLUMNS if name in names]
    if IMAGE_COLUMN not in names or not captions:
        raise UserError(
            f"--captions: {str(path)!r} needs the column {IMAGE_COLUMN!r} and at least one of "
            f"{', '.join(CAPTION_COLUMNS)}; "
            f"it has {', '.join(map(repr, names))}"
        )
