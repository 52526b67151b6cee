"""Rows of a CSV or TSV file in which a stray quote costs its own line, and no other row becomes part of its caption.

A quote that is opened and not closed joins lines until the next quote. A record of several lines is therefore only
believed where its quotes are as CSV wants them, it has as many fields as the header, and none of its further lines is a
row by itself; otherwise its first line is reported, and reading continues with the second.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

_LONGEST_CELL = 16 * 2**20  # characters, as the csv module counts them
_MOST_LINES = 1000  # of a record

Record = tuple[int, list[str] | None, str]
"""(line on which it begins, its cells or None, what is wrong with it)."""


class CsvRecords:
    """The records of an open text file (newline="").

    Args:
        looks_like_row: decides which single lines are rows by themselves.
    """

    def __init__(self, file: TextIO, delimiter: str, looks_like_row: Callable[[list[str]], bool]) -> None:
        self.file, self.delimiter, self.looks_like_row = file, delimiter, looks_like_row
        self.fields = 0
        """Of the first record, the header."""
        self.again: deque[str] = deque()  # lines of a record that was not believed
        self.lines = 0  # lines given to the parser and not taken back
        csv.field_size_limit(_LONGEST_CELL)

    def __iter__(self) -> Iterator[Record]:
        while True:
            begin = self.lines + 1
            record: list[str] = []
            try:
                cells = next(csv.reader(self._take(record), delimiter=self.delimiter), None)
                wrong = ""
            except csv.Error as error:
                cells, wrong = [], str(error)
            if cells is None:
                return
            if not wrong and self.fields and len(cells) != self.fields and cells:
                wrong = f"{len(cells)} fields, the header has {self.fields}"
            if len(record) > 1 and not wrong and (not self._is_strict(record) or self._holds_another_row(record)):
                wrong = "a quote is opened and not closed, before rows that are whole"
            if wrong:
                self.again.extendleft(reversed(record[1:]))
                self.lines -= len(record) - 1
                yield begin, None, f"line {begin}: {wrong}"
            elif cells:
                self.fields = self.fields or len(cells)
                yield begin, cells, ""

    def _take(self, record: list[str]) -> Iterator[str]:
        """Lines for one record, noted in ``record``."""
        while True:
            line = self.again.popleft() if self.again else self._read_line()
            if not line:
                if record:
                    raise csv.Error("a quote is opened and not closed up to the end of the file")
                return
            record.append(line)
            self.lines += 1
            if len(record) > _MOST_LINES:
                raise csv.Error(f"a quote is opened and not closed for {_MOST_LINES} lines")
            yield line

    def _read_line(self) -> str:
        """The next line without null bytes; of one too long for any cell the beginning, the rest skipped."""
        line = rest = self.file.readline(2 * _LONGEST_CELL)
        while len(rest) == 2 * _LONGEST_CELL and not rest.endswith(("\n", "\r")):
            rest = self.file.readline(2 * _LONGEST_CELL)
        return line.replace("\0", "") or ("\n" if line else "")

    def _is_strict(self, record: list[str]) -> bool:
        """Whether each quote that closes is followed by a delimiter or the end, as no stray one's partner is."""
        try:
            next(csv.reader(record, delimiter=self.delimiter, strict=True))
        except csv.Error:
            return False
        return True

    def _holds_another_row(self, record: list[str]) -> bool:
        """Whether one of a record's further lines is a row by itself; its last, in which the quote closes, is none."""
        return any(
            self.looks_like_row(next(csv.reader([line], delimiter=self.delimiter), []))
            for line in record[1:]
            if line.count('"') % 2 == 0
        )
