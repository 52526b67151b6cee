"""Rows of a caption table (CSV, TSV, parquet, JSON, JSON lines, plain or compressed), one at a time: however large the
file, and naming every row that cannot be read.

All cells pass cells.py, which says what is text; formats/ knows the layouts that people publish.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dreamlip_train.captions.cells import as_row
from dreamlip_train.captions.columns import is_caption_column
from dreamlip_train.captions.csv_rows import CsvRecords
from dreamlip_train.captions.formats.annotations import records_of
from dreamlip_train.captions.formats.files import is_compressed, open_text, read_text, require_kind
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN, advice, describe_layout, renaming
from dreamlip_train.captions.formats.row_per_caption import together
from dreamlip_train.captions.parquet_rows import parquet_rows
from dreamlip_train.jobs.atomic_json import parse_json
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

Row = tuple[int, dict[str, Any] | None, str]
"""(row number from 1, its cells or None, what is wrong with it or was repaired in its cells);
empty cells are left out.
"""
Check = Callable[[str, list[str], list[str]], None]
"""Called with what names the table, its columns as they are called here, and as they are called in the file."""


class Table:
    """A caption table. Iterating gives every row, columns under our names.

    Args:
        columns: {our column: the table's}, as the user says; {} goes by the names (formats/layouts.py).
        check: raises UserError for columns that are not accepted. None wants the image column and a caption column.
        same: a column, under the table's name, in which rows of one picture must agree to become one.
    Raises:
        UserError: no such file, or of another kind; while iterating, before any row: an empty one, or one without the
            expected columns.
    """

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str] | None = None,
        check: Check | None = None,
        same: str = IMAGE_COLUMN,
    ) -> None:
        self.same = same
        self.path, self.columns, self.check = path, dict(columns or {}), check or check_columns
        self.kind = require_kind(path)
        self.layout = ""
        """The published layout it has, known from its first row on."""
        self.lines: int | None = None
        """Of a file of lines: how many were read."""
        self.rename: dict[str, str] = {}
        """{the table's column: ours}, known from the first row on."""
        self.names: list[str] = []
        """Its columns, under our names."""

    def __iter__(self) -> Iterator[Row]:
        if self.kind == "parquet":
            rows = parquet_rows(self.path, self._know)
        elif self.kind == "jsonl":
            rows = self._json_lines()
        elif self.kind == "json":
            rows = self._json_rows()
        else:
            rows = self._csv_rows("\t" if self.kind == "tsv" else ",")
        number = 0
        try:
            for number, row, wrong in rows if self.kind == "parquet" else together(rows, self._same):
                yield number, row, wrong
        except (OSError, EOFError) as error:
            if not is_compressed(self.path):
                raise
            if not self.names:
                raise UserError(f"--captions: {str(self.path)!r} is not readable: {error}") from error
            yield number + 1, None, f"the file is damaged from here on: {error}"

    def _same(self) -> str:
        return self.rename.get(self.same, self.same)

    def _know(self, names: list[str], form: str = "") -> dict[str, str]:
        """What the columns are called here; once they are checked."""
        self.layout = describe_layout(names, self.columns, form)
        self.rename = renaming(names, self.columns, form)
        self.names = [self.rename.get(name, name) for name in names]
        self.check(f"--captions: {str(self.path)!r}", self.names, names)
        missing = [theirs for theirs in self.columns.values() if theirs not in names]
        if missing and self.check is check_columns:
            raise UserError(f"--columns: {str(self.path)!r} has no column {missing[0]!r}; it has {_listed(names)}")
        return self.rename

    def _csv_rows(self, delimiter: str) -> Iterator[Row]:
        with open_text(self.path) as file:
            header: list[str] = []
            records = CsvRecords(
                file,
                delimiter,
                lambda cells: bool(header) and len(cells) == len(header) and _names_a_picture(cells, image),
            )
            number = image = 0
            for _, cells, wrong in records:
                self.lines = records.lines
                if not header:
                    header, form = _header(self.path, cells or [], delimiter)
                    ours = [self._know(header, form).get(name, name) for name in header]
                    image = ours.index(IMAGE_COLUMN) if IMAGE_COLUMN in ours else 0
                    if not form:
                        continue
                number += 1
                if cells is None:
                    yield number, None, wrong
                else:
                    record = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
                    yield number, *as_row(record, self.rename)
            if not header:
                raise UserError(f"--captions: {str(self.path)!r} is empty")
            logger.info("%r: %d rows on %d lines", str(self.path), number, records.lines)

    def _json_lines(self) -> Iterator[Row]:
        has_names = False
        with open_text(self.path) as file:
            for number, line in enumerate(file, 1):
                self.lines = number
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
                if not has_names:
                    self._know(list(record))
                    has_names = True
                yield number, *as_row(record, self.rename)

    def _json_rows(self) -> Iterator[Row]:
        try:
            content = parse_json(read_text(self.path))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--captions: {str(self.path)!r} is not JSON: {error}") from error
        records, form = records_of(content)
        if not records:
            names = (
                f"; it is an object of {_listed(list(content)[:10])}" if isinstance(content, dict) and content else ""
            )
            raise UserError(
                f"--captions: {str(self.path)!r} must hold a list of records, or an object of records by key, "
                f"and at least one{names}. A file for each picture: jq -c . FILES > captions.jsonl"
            )
        self._know(
            list(dict.fromkeys(name for record in records[:100] if isinstance(record, dict) for name in record)), form
        )
        for number, record in enumerate(records, 1):
            if isinstance(record, dict):
                yield number, *as_row(record, self.rename)
            else:
                yield number, None, f"record {number}: a {type(record).__name__}, not an object"


def peeked(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, the first of which is read now: a table is checked and known then."""
    iterator = iter(rows)
    return chain([row for row in [next(iterator, None)] if row is not None], iterator)


def _header(path: Path, cells: list[str], delimiter: str) -> tuple[list[str], str]:
    """(the columns' names, the form of a table that has no line for them).

    Raises:
        UserError: the file is separated otherwise, has a name twice, or no names.
    """
    other = next((mark for mark in "\t;|," if mark != delimiter and cells and mark in cells[0]), None)
    if len(cells) == 1 and other:
        raise UserError(
            f"--captions: {str(path)!r} is read as separated by {delimiter!r}, but its header {cells[0][:80]!r} has "
            f"{other!r}; name a tab-separated file .tsv, or convert it, such as with "
            f"pandas.read_csv(FILE, sep={other!r}, skipinitialspace=True).to_csv(OTHER, index=False)"
        )
    header = [name.strip() for name in cells]
    urls = [name for name in header if name.startswith(("http://", "https://"))]
    if len(header) == 2 and len(urls) == 1:  # CC3M's and CC12M's files, one the other way round
        return ["url" if name == urls[0] else "caption" for name in header], "no header"
    if urls:
        raise UserError(
            f"--captions: {str(path)!r} has no line with its columns' names: the first line holds {urls[0][:80]!r}; "
            "put one above it"
        )
    duplicates = [name for name, times in Counter(filter(None, header)).items() if times > 1]
    if duplicates:
        raise UserError(f"--captions: {str(path)!r} has the column {duplicates[0]!r} twice; rename one")
    return header, ""


def _names_a_picture(cells: list[str], image: int) -> bool:
    """Whether a line that has as many cells as the header is a row by itself, not a caption's line with as many
    commas.
    """
    name = cells[image].strip()
    return re.search(r"[./\\0-9]", name) is not None and (not re.search(r"\s", name) or "." in name[-5:])


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def check_columns(table: str, names: list[str], theirs: list[str]) -> None:
    """A table needs the image column and at least one caption column."""
    if IMAGE_COLUMN not in names or not any(is_caption_column(name) for name in names):
        raise UserError(
            f"{table} needs the column {IMAGE_COLUMN!r} and at least one of raw_caption, short.._captions and "
            f"long.._captions; it has {_listed(theirs)}. If they are called otherwise, say how: {advice(theirs)}"
        )
