"""``prepare urls``: a caption table as the parquet file that img2dataset downloads from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import caption_columns
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.table import Table, peeked
from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError

_ROWS_PER_GROUP = 20_000


def write_url_list(
    captions: str | Path, output: str | Path, columns: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write ``output`` with the column "url" and the table's caption columns; lists become json.

    img2dataset's own CSV reader takes a line for a row, and captions have line breaks.

    Returns:
        {"rows": written, "without a URL": left out, "malformed": left out, "columns": names of the captions}.
    Raises:
        UserError: the table can't be read, lacks columns or has no URL, or ``output`` is not called .parquet.
    """
    import pyarrow
    import pyarrow.parquet

    captions, output = Path(captions), Path(output)
    if output.suffix != ".parquet":
        raise UserError(f"--output: got {str(output)!r}; give a name that ends in .parquet")
    table = Table(captions, columns)
    read = peeked(table)
    names = caption_columns(dict.fromkeys(table.names))
    schema = pyarrow.schema([("url", pyarrow.string()), *((name, pyarrow.string()) for name in names)])
    counts = {"rows": 0, "without a URL": 0, "malformed": 0}
    rows: list[dict[str, Any]] = []
    with (
        Progress(f"urls {captions}", unit="rows") as progress,
        atomic_write(output) as partial,
        partial.open("wb") as file,  # pyarrow opens names in UTF-8 alone
        pyarrow.parquet.ParquetWriter(file, schema) as writer,
    ):
        for _, row, _ in read:
            url = str((row or {}).get(IMAGE_COLUMN, "")).strip()
            if row is None or not url.startswith(("http://", "https://")):
                counts["malformed" if row is None else "without a URL"] += 1
                continue
            rows.append({"url": url} | {name: _text(row[name]) for name in names if row.get(name)})
            counts["rows"] += 1
            if len(rows) == _ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
                progress.advance(_ROWS_PER_GROUP)
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        if not counts["rows"]:
            raise UserError(f"--captions: no row of {str(captions)!r} has a URL in {IMAGE_COLUMN!r}")
    return counts | {"columns": names}


def _text(cell: Any) -> str:
    text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()
