"""``prepare validate FILE``: what a caption table is taken for, and which of its rows can't be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import caption_columns, caption_pool
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.formats.parquet_pictures import picture_column
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.captions.table import Table
from dreamlip_train.jobs.progress_line import Progress


def validate_table(path: Path, columns: dict[str, str]) -> dict[str, Any]:
    """Read a table whole.

    Returns:
        {"layout", "columns": {the table's: ours}, "pictures": the column that has them inside or None, "rows",
        "usable": of them, "lines": of a file of lines, "captions" and "bad" as in a manifest}.
    Raises:
        UserError: it is no table, or lacks columns.
    """
    table, counts, rows = Table(path, columns), Statistics(), 0
    pictures: set[str] = set()
    inside = None
    with Progress(f"validate {path}", unit="rows") as progress:
        for rows, (number, row, wrong) in enumerate(table, 1):
            if rows == 1:
                inside = picture_column(path, columns)
            name = f"row {number}"
            progress.advance(text=f"{counts.bad_count} findings")
            if row is None:
                counts.add_bad("malformed row", name, wrong)
                continue
            if wrong:
                counts.add_bad("table cell repaired or left out", name, wrong)
            if not row.get(IMAGE_COLUMN) and inside is None:
                counts.add_bad("no image", name)
            elif not caption_pool(row):
                counts.add_bad("no captions", name)
            elif inside is None and row[IMAGE_COLUMN] in pictures:
                counts.add_bad("duplicate image", name, row[IMAGE_COLUMN])
            else:
                counts.add_sample(row, None)
                pictures.add(row.get(IMAGE_COLUMN, ""))
    read = [IMAGE_COLUMN, *caption_columns(dict.fromkeys(table.names))]
    theirs = {ours: name for name, ours in table.rename.items() if ours in table.names}
    return {
        "layout": table.layout,
        "columns": {theirs.get(name, name): name for name in read if name in table.names},
        "pictures": inside,
        "rows": rows,
        "usable": counts.samples,
        "lines": table.lines,
        **{name: part for name, part in counts.summary().items() if name in ("captions", "bad")},
    }


def format_table(name: str, table: dict[str, Any]) -> str:
    """What ``validate_table`` found, as text to read."""
    lines = f" on {table['lines']} lines" if table["lines"] else ""
    text = [f"{name}: {table['layout']}, {table['rows']} rows{lines}, {table['usable']} usable"]
    for theirs, ours in table["columns"].items():
        inside = ", the pictures themselves" if theirs == table["pictures"] else ""
        text.append(f"  {theirs} -> {ours}{inside}" if theirs != ours or inside else f"  {ours}")
    for source, numbers in table["captions"].items():
        text.append(f"  {source}: {numbers['samples']} captions, {numbers['sentences_mean']:.1f} sentences each")
    for reason, entry in table["bad"].items():
        text.append(f"  {entry['count']} x {reason}, such as {'; '.join(entry['examples'][:3])}")
    return "\n".join(text)
