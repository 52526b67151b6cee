"""The tables' side of ``prepare join``: each becomes parquet with a row number, the compared value and the captions as
json.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreamlip_train.captions.cells import column_name
from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.captions.table import SUFFIXES, read_rows
from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.finished import make_once
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.join.match import ROWS_PER_GROUP
from dreamlip_train.prepare.url_keys import normal_path, normal_url

NORMAL = {"url": normal_url, "path": normal_path}


def find_tables(captions: str) -> list[Path]:
    """The files that ``captions`` names: files, folders and globs, joined with "::".

    Raises:
        UserError: a part matches no table.
    """
    tables: list[Path] = []
    for part in captions.split("::"):
        if Path(part).is_dir():
            matches = sorted(path for path in Path(part).rglob("*") if path.suffix.lower() in SUFFIXES)
        else:
            matches = [Path(name) for name in sorted(glob.glob(part))]
        if not matches:
            raise UserError(f"--captions: {part!r} matches no table ({', '.join(SUFFIXES)})")
        tables += matches
    return tables


def check_table(path: Path, column: str, columns: dict[str, str]) -> None:
    """Look at a table's head, before anything is claimed or forked.

    Raises:
        UserError: it can't be read or lacks the columns.
    """
    next(read_rows(path, _check(column, columns)), None)


def _wanted(columns: dict[str, str]) -> dict[str, str]:
    """{column in the shards: column in the tables}."""
    return {name: name for name in CAPTION_COLUMNS} | columns


def _check(column: str, columns: dict[str, str]) -> Callable[[Path, list[str]], None]:
    wanted = {column_name(name) for name in _wanted(columns).values()}

    def check(table: Path, names: list[str]) -> None:
        if column not in names or not wanted & set(names):
            raise UserError(
                f"--captions: {str(table)!r} needs the column {column!r} and at least one of "
                f"{', '.join(sorted(wanted))}; "
                f"it has {', '.join(map(repr, names))}. --table-column names the compared one, "
                "--columns OURS THEIRS maps captions"
            )

    return check


def stage_table(
    task: tuple[int, Path], *, state: Path, on: str, column: str, columns: dict[str, str]
) -> dict[str, Any]:
    """One caption table to parquet: row number, compared value, captions as json. Returns {"counts": of what was wrong,
    "sources": rows by caption column}.
    """
    number, table = task
    file = state / f"{number:05d}.parquet"
    return make_once(file, file.with_suffix(".json"), lambda: _stage(file, number, table, on, column, columns))


def _stage(file: Path, number: int, table: Path, on: str, column: str, columns: dict[str, str]) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    wanted = _wanted(columns)
    bad, sources = Statistics(), Counter()
    schema = pyarrow.schema(
        [
            ("source", pyarrow.int32()),
            ("row", pyarrow.int64()),
            ("value", pyarrow.string()),
            ("captions", pyarrow.string()),
        ]
    )
    normal = NORMAL.get(on, str.strip)
    rows: list[tuple[int, int, str, str]] = []
    with atomic_write(file) as partial, pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for row_number, row, wrong in _with_replacements(read_rows(table, _check(column, columns)), table, bad):
            name = f"{table.name}: row {row_number}"
            if row is None:
                bad.add_bad("malformed row", name, wrong)
                continue
            if wrong:
                bad.add_bad("table cell repaired or left out", name, wrong)
            value = normal(str(row.get(column, "")))
            captions = {ours: row[theirs] for ours, theirs in wanted.items() if row.get(theirs)}
            if not value or not captions:
                bad.add_bad("no captions" if value else f"no {column}", name, value)
                continue
            sources.update(captions.keys())  # a dict would add its values
            rows.append((number, row_number, value, json.dumps(captions, ensure_ascii=False, default=str)))
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(_as_table(rows, schema))
                rows = []
        writer.write_table(_as_table(rows, schema))
    return {"counts": bad.state, "sources": dict(sources)}


def _with_replacements(rows: Iterator[Any], path: Path, bad: Statistics) -> Iterator[Any]:
    """The rows; those in which undecodable bytes were replaced are counted, and kept."""
    for number, row, wrong in rows:
        if row is not None and any(isinstance(cell, str) and "\ufffd" in cell for cell in row.values()):
            bad.add_bad("not UTF-8 (bytes replaced)", f"{path.name}: row {number}")
        yield number, row, wrong


def _as_table(rows: list[tuple[int, int, str, str]], schema: Any) -> Any:
    import pyarrow

    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in schema]
    # A lone surrogate (half of an escaped character in a JSON table) has no UTF-8.
    texts = [[text.encode("utf-8", "replace").decode() for text in column] for column in columns[2:]]
    return pyarrow.table(
        [pyarrow.array(column, field.type) for column, field in zip([*columns[:2], *texts], schema, strict=True)],
        schema=schema,
    )
