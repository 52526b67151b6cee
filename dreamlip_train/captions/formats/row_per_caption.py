"""Tables with a row for each caption, as Flickr8k's: rows of one picture that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dreamlip_train.captions.columns import is_caption_column, is_whole
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN

Row = tuple[int, dict[str, Any] | None, str]


def together(rows: Iterable[Row], same: Callable[[], str]) -> Iterator[Row]:
    """The rows (``table.Row``); those that name the picture of the row before, have its value in the column ``same()``
    (asked once the columns are known) and other captions in the same columns, as one row with lists of captions.

    Only raw and short captions: a long one in a list would count as split already.
    """
    number, whole, note = 0, None, ""
    for begin, row, wrong in rows:
        if whole is not None and row is not None and _is_another_caption(whole, row, same()):
            whole = whole | {
                name: [*_texts(whole[name]), *_texts(row[name])] for name in filter(is_caption_column, row)
            }
            note = "; ".join(filter(None, [note, wrong]))
            continue
        if number:
            yield number, whole, note
        number, whole, note = begin, row, wrong
    if number:
        yield number, whole, note


def _is_another_caption(row: dict[str, Any], following: dict[str, Any], same: str) -> bool:
    columns = set(filter(is_caption_column, row))
    return (
        bool(columns)
        and row.get(IMAGE_COLUMN) not in (None, "")
        and row[IMAGE_COLUMN] == following.get(IMAGE_COLUMN)
        and row.get(same) == following.get(same)
        and columns == set(filter(is_caption_column, following))
        and all(map(is_whole, columns))
        and any(row[name] != following[name] for name in columns)
    )


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]
