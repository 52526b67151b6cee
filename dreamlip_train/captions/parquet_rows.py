"""Rows of a parquet file, types checked before any is read; a damaged page costs its row group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreamlip_train.captions.cells import as_row
from dreamlip_train.captions.columns import is_caption_column
from dreamlip_train.captions.formats.files import arrow_source
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.formats.parquet_pictures import pictures_of
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

_BATCH = 1024


def parquet_rows(
    path: Path, know: Callable[[list[str]], Mapping[str, str]]
) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """``table.Table``'s rows of a parquet file, without the pictures that may be in it (formats/parquet_pictures.py).

    Args:
        know: of the columns' names, checked by it: {the file's: ours} where they differ.
    Raises:
        UserError: it is not readable, lacks columns, or a caption or image column holds something else than text (it is
            named).
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(arrow_source(path))
        names = [field.name for field in file.schema_arrow]
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    except Exception as error:  # damaged footers: ArrowException, OSError, UnicodeDecodeError, MemoryError ..
        raise UserError(f"--captions: {str(path)!r} is not a readable parquet file: {_first_line(error)}") from error
    rename = know(names)
    columns_to_read = _text_columns(path, file, rename)
    done = 0
    for group, rows in enumerate(groups):
        begin = done
        try:
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns_to_read):
                for record in _records(batch):
                    done += 1
                    yield done, *as_row(record, rename)
        except Exception as error:  # pyarrow's decoders raise all kinds for damaged pages
            rows_lost = max(begin + rows - done, 1)
            yield done + 1, None, f"row group {group}: {rows_lost} rows are damaged: {_first_line(error)}"
        done = max(begin + rows, done)


def _records(batch: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # text that is not UTF-8, which parquet does not check
        columns = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _values(column: Any) -> list[Any]:
    import pyarrow.types

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if not pyarrow.types.is_string(column.type):
            raise
        return [None if cell is None else cell.decode("utf-8", "replace") for cell in column.cast("binary").to_pylist()]


def _text_columns(path: Path, file: Any, rename: Mapping[str, str]) -> list[str]:
    """The columns that are read: text for captions and images, and all others but those with bytes inside."""
    columns_to_read, columns_of_bytes = [], []
    pictures = pictures_of(file, rename)
    for field in file.schema_arrow:
        ours = rename.get(field.name, field.name)
        if field.name == pictures:
            if any(child.name == "path" for child in getattr(field.type, "fields", ())):
                columns_to_read.append(f"{field.name}.path")
            continue
        if is_caption_column(ours) and _is_conversation(field.type):
            columns_to_read.append(field.name)
            continue
        if (ours == IMAGE_COLUMN or is_caption_column(ours)) and not _is_text(field.type, lists=ours != IMAGE_COLUMN):
            raise UserError(
                f"--captions: the column {field.name!r} of {str(path)!r} holds {field.type}, not text; "
                "give a table without it, or convert it to text"
            )
        if _is_text(field.type, lists=True) or "binary" not in str(field.type):
            columns_to_read.append(field.name)
        else:
            columns_of_bytes.append(f"{field.name} ({field.type})")
    if columns_of_bytes:
        logger.warning("%r: columns that hold bytes are left out: %s", str(path), ", ".join(columns_of_bytes))
    return columns_to_read


def _is_conversation(kind: Any) -> bool:
    import pyarrow.types as types

    return (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)


def _is_text(kind: Any, lists: bool) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if lists and (types.is_list(kind) or types.is_large_list(kind)):
        return _is_text(kind.value_type, lists=False)
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    # A column without any text has the type of nothing, or pandas' floats.
    return any(is_kind(kind) for is_kind in (*texts, types.is_null, types.is_floating))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
