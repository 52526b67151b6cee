"""Rows of a caption table, CSV or parquet, one at a time: however large the file, and naming every row that cannot be read."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamlip_train.captions import CAPTION_COLUMNS

IMAGE_COLUMN = "Image Path"


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(row number from 1, row or None, what is wrong with it) for every row, empty cells left out.

    Raises:
        ValueError: no such file, an empty one, another format, or one without the expected columns.
    """
    if not path.is_file():
        raise ValueError(f"--captions: no file {str(path)!r}")
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    raise ValueError(f"--captions: {str(path)!r} is neither .csv, .tsv nor .parquet")


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader((line.replace("\0", "") for line in file), delimiter=delimiter)
        header = next(rows, None)
        if header is None:
            raise ValueError(f"--captions: {str(path)!r} is empty")
        check_columns(path, header)
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


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"--captions: {str(path)!r} is not a readable parquet file: {error}") from error
    check_columns(path, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, {name: cell for name, cell in row.items() if not _is_empty(cell)}, ""


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def check_columns(path: Path, names: list[str]) -> None:
    """A table needs the image column and at least one of DreamLIP's caption columns."""
    captions = [name for name in CAPTION_COLUMNS if name in names]
    if IMAGE_COLUMN not in names or not captions:
        raise ValueError(
            f"--captions: {str(path)!r} needs the column {IMAGE_COLUMN!r} and at least one of {', '.join(CAPTION_COLUMNS)}; "
            f"it has {', '.join(map(repr, names))}"
        )
