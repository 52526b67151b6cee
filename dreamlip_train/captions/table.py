"""Rows of a caption table (CSV, TSV, parquet, JSON, JSON lines), one at a time: however large the file, and naming every row that cannot be read."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.jobs.user_error import UserError

IMAGE_COLUMN = "Image Path"
SUFFIXES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")
# A cell larger than this is an unclosed quote that swallows the rows after it.
_LARGEST_CELL = 16 * 2**20
# The names in DreamLIP's JSON files, and others in use, for the columns of its CSV files.
ALIASES = {
    "ImagePath": IMAGE_COLUMN,
    "RawCaption": "raw_caption",
    **{
        f"{mllm}Caption{length.capitalize()}": f"{length}{mllm}_captions"
        for mllm in ("IB", "SV", "LLA")
        for length in ("short", "long")
    },
}

Row = tuple[int, dict[str, Any] | None, str]
"""(row number from 1, its cells or None, what is wrong with it); empty cells are left out."""


def read_rows(path: Path, check: Callable[[Path, list[str]], None] | None = None) -> Iterator[Row]:
    """Every row of a table, columns under DreamLIP's CSV names (``ALIASES``).

    Args:
        check: called with the path and the column names before any row is given; raises UserError for those it does not accept. None wants the image
            column and a caption column.
    Raises:
        UserError: no such file, an empty one, another format, or one without the expected columns.
    """
    check = check or check_columns
    if not path.is_file():
        raise UserError(f"--captions: no file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, check)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else ",", check)
    if suffix == ".jsonl":
        return _json_lines(path, check)
    if suffix == ".json":
        return _json_rows(path, check)
    raise UserError(f"--captions: {str(path)!r} is none of {', '.join(SUFFIXES)}")


def _csv_rows(path: Path, delimiter: str, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader((line.replace("\0", "") for line in file), delimiter=delimiter)
        header = next(rows, None)
        if not header:
            raise UserError(f"--captions: {str(path)!r} is empty")
        other = next((mark for mark in "\t;|," if mark != delimiter and mark in header[0]), None)
        if len(header) == 1 and other:
            raise UserError(
                f"--captions: {str(path)!r} is read as separated by {delimiter!r}, but its header {header[0][:80]!r} has {other!r}; "
                "name a tab-separated file .tsv, or convert it to CSV or parquet"
            )
        header = [ALIASES.get(name.strip(), name.strip()) for name in header]
        check(path, header)
        number = 0
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                number += 1
                yield number, None, f"line {rows.line_num}: {error}"
                continue
            if cells is None:
                return
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                yield number, None, f"line {rows.line_num}: {len(cells)} fields, the header has {len(header)}"
            else:
                yield number, {name: cell for name, cell in zip(header, cells, strict=True) if cell}, ""


def _parquet_rows(path: Path, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--captions: {str(path)!r} is not a readable parquet file: {error}") from error
    check(path, [ALIASES.get(name, name) for name in file.schema_arrow.names])
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, _named(row), ""


def _json_lines(path: Path, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    checked = False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, None, f"line {number}: {error}"
                continue
            if not isinstance(record, dict):
                yield number, None, f"line {number}: a {type(record).__name__}, not an object"
                continue
            row = _named(record)
            if not checked:
                check(path, [ALIASES.get(name, name) for name in record])
                checked = True
            yield number, row, ""


def _json_rows(path: Path, check: Callable[[Path, list[str]], None]) -> Iterator[Row]:
    """A list of records, or an object of records by key (which becomes the column "key")."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--captions: {str(path)!r} is not JSON: {error}") from error
    if isinstance(content, dict):
        content = [{"key": key, **value} if isinstance(value, dict) else value for key, value in content.items()]
    if not isinstance(content, list) or not content:
        raise UserError(
            f"--captions: {str(path)!r} must hold a list of records, or an object of records by key, and at least one"
        )
    first = next((record for record in content if isinstance(record, dict)), {})
    check(path, [ALIASES.get(name, name) for name in first])
    for number, record in enumerate(content, 1):
        if isinstance(record, dict):
            yield number, _named(record), ""
        else:
            yield number, None, f"record {number}: a {type(record).__name__}, not an object"


def _named(record: dict[str, Any]) -> dict[str, Any]:
    return {ALIASES.get(name, name): cell for name, cell in record.items() if not _is_empty(cell)}


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def check_columns(path: Path, names: list[str]) -> None:
    """A table needs the image column and at least one of DreamLIP's caption columns."""
    captions = [name for name in CAPTION_COLUMNS if name in names]
    if IMAGE_COLUMN not in names or not captions:
        raise UserError(
            f"--captions: {str(path)!r} needs the column {IMAGE_COLUMN!r} and at least one of {', '.join(CAPTION_COLUMNS)}; "
            f"it has {', '.join(map(repr, names))}"
        )
