"""The tables' side of ``prepare join``: each becomes parquet with a row number, the compared value and the captions as
json.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import is_caption_column
from dreamlip_train.captions.formats.files import SUFFIXES, kind_of
from dreamlip_train.captions.formats.layouts import advice
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.captions.table import Check, Table
from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.job_folder import make_once
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
            matches = sorted(path for path in Path(part).rglob("*") if kind_of(path))
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
    next(iter(Table(path, columns, _check(column))), None)


def _check(column: str) -> Check:
    def check(table: str, names: list[str], theirs: list[str]) -> None:
        if column not in {*names, *theirs} or not any(is_caption_column(name) for name in names):
            raise UserError(
                f"{table} needs the column {column!r} and at least one of raw_caption, short.._captions and "
                f"long.._captions; it has {', '.join(map(repr, theirs))}. --table-column names the compared one, or if "
                f"they are called otherwise: {advice(theirs)}"
            )

    return check


def stage_table(
    task: tuple[int, Path], *, state: Path, on: str, column: str, columns: dict[str, str]
) -> dict[str, Any]:
    """One caption table to parquet: row number, compared value, captions as json. Returns {"counts": of what was wrong,
    "sources": rows by caption column, "lines": of a file of lines}.
    """
    number, table = task
    file = state / f"{number:05d}.parquet"
    return make_once(file, file.with_suffix(".json"), lambda: _stage(file, number, table, on, column, columns))


def _stage(file: Path, number: int, path: Path, on: str, column: str, columns: dict[str, str]) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    bad, sources = Statistics(), Counter()
    schema = pyarrow.schema(
        [
            ("source", pyarrow.int32()),
            ("row", pyarrow.int64()),
            ("value", pyarrow.string()),
            ("captions", pyarrow.string()),
        ]
    )
    table, normal = Table(path, columns, _check(column), same=column), NORMAL.get(on, str.strip)
    rows: list[tuple[int, int, str, str]] = []
    with atomic_write(file) as partial, pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for row_number, row, wrong in _with_replacements(table, path, bad):
            name = f"{path.name}: row {row_number}"
            if row is None:
                bad.add_bad("malformed row", name, wrong)
                continue
            if wrong:
                bad.add_bad("table cell repaired or left out", name, wrong)
            value = normal(str(row.get(table.rename.get(column, column), "")))
            captions = {name: cell for name, cell in row.items() if is_caption_column(name)}
            if not value or not captions:
                bad.add_bad("no captions" if value else f"no {column}", name, value)
                continue
            sources.update(captions.keys())  # a dict would add its values
            rows.append((number, row_number, value, json.dumps(captions, ensure_ascii=False, default=str)))
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(_as_table(rows, schema))
                rows = []
        writer.write_table(_as_table(rows, schema))
    return {"counts": bad.state, "sources": dict(sources), "lines": table.lines}


def _with_replacements(rows: Iterable[Any], path: Path, bad: Statistics) -> Iterator[Any]:
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
