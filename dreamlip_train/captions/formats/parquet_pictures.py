"""Pictures inside a parquet file, as Hugging Face's data sets have them: found by row, one row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from dreamlip_train.captions.formats.files import arrow_source, kind_of
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN, renaming

_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM")


def picture_column(path: Path, columns: Mapping[str, str]) -> str | None:
    """The column with the pictures themselves; None where a table names files or URLs, or is no parquet.

    Raises:
        OSError or ValueError: pyarrow's, for a file that it can't open.
    """
    import pyarrow.parquet

    if kind_of(path) != "parquet":
        return None
    with pyarrow.parquet.ParquetFile(arrow_source(path)) as file:
        return pictures_of(file, renaming(file.schema_arrow.names, columns))


def pictures_of(file: Any, rename: Mapping[str, str]) -> str | None:
    """``picture_column`` of an open file whose columns are called as ``rename`` says."""
    import pyarrow.types as types

    for field in file.schema_arrow:
        if rename.get(field.name, field.name) != IMAGE_COLUMN:
            continue
        if types.is_struct(field.type) and any(child.name == "bytes" for child in field.type):
            return field.name
        if types.is_binary(field.type) or types.is_large_binary(field.type):
            return field.name if _first_cell(file, field.name).startswith(_MAGIC) else None
    return None


def _first_cell(file: Any, column: str) -> bytes:
    try:
        batch = next(file.iter_batches(batch_size=1, columns=[column]), None)
        return (batch.column(0)[0].as_py() if batch is not None and batch.num_rows else None) or b""
    except Exception:  # pyarrow's decoders raise all kinds for a damaged page, which its rows will name
        return b""


class ParquetPictures:
    """The pictures of a column, by row number from 1. Picklable: the file is opened where it is read."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._group = -1
        self._cells: Any = None
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "column": self.column, "_group": -1, "_cells": None, "_file": None}

    def count(self) -> int | None:
        """Rows of the file; None where it is damaged."""
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(arrow_source(self.path)).num_rows
        except Exception:  # pyarrow's decoders raise all kinds for damaged footers
            return None

    def read(self, number: int) -> bytes | None:
        """The picture of a row; None if the row has none.

        Raises:
            ValueError: the row's part of the file is damaged.
        """
        import pyarrow.parquet

        try:
            if self._file is None:
                self._file = pyarrow.parquet.ParquetFile(arrow_source(self.path))
                metadata = self._file.metadata
                sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
                self._starts = [0, *accumulate(sizes)]
            group = bisect_right(self._starts, number - 1) - 1
            if group != self._group:
                self._cells = self._file.read_row_group(group, columns=[self.column]).column(0)
                self._group = group
            cell = self._cells[number - 1 - self._starts[group]].as_py()
        except Exception as error:  # pyarrow's decoders raise all kinds for damaged pages
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cell.get("bytes") if isinstance(cell, dict) else cell
