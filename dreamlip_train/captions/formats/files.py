"""Table files as text, plain or compressed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, TextIO

from dreamlip_train.jobs.user_error import UserError

_KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = tuple(_KINDS)
_PIECE = 2**20  # characters
_LARGEST_JSON = 16 * 2**30  # characters: a document is parsed whole


def kind_of(path: Path) -> str:
    """ "csv", "tsv", "parquet", "json" or "jsonl", by the name (.gz and .zst aside); "" for any other file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":  # it is compressed inside
            return ""
    return _KINDS.get(suffixes[-1], "") if suffixes else ""


def require_kind(path: Path) -> str:
    """``kind_of``.

    Raises:
        UserError: no such file, or one that is no table by its name.
    """
    if not path.is_file():
        raise UserError(f"--captions: no file {str(path)!r}")
    kind = kind_of(path)
    if not kind:
        raise UserError(
            f"--captions: {str(path)!r} is none of {', '.join(SUFFIXES)} (all but parquet also as .gz or .zst); "
            "if it is one, name it so"
        )
    return kind


def is_compressed(path: Path) -> bool:
    """Whether a table is compressed as a whole, by its name."""
    return path.suffix.lower() in _COMPRESSED


def open_text(path: Path) -> TextIO:
    """The file's text, line ends as they are; bytes that are not UTF-8 are replaced."""
    compression = _COMPRESSED.get(path.suffix.lower())
    if compression is None:
        return path.open(newline="", encoding="utf-8-sig", errors="replace")
    import pyarrow

    stream = io.BufferedReader(pyarrow.CompressedInputStream(arrow_source(path), compression), 2**20)
    return io.TextIOWrapper(stream, newline="", encoding="utf-8-sig", errors="replace")


def arrow_source(path: Path) -> Any:
    """``path`` as pyarrow takes it: names that are not UTF-8 as bytes, which only its own files do."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        import pyarrow

        return pyarrow.OSFile(os.fsencode(path))  # it closes with what reads it
    return str(path)


def read_text(path: Path) -> str:
    """The whole text of a JSON document.

    Raises:
        UserError: a compressed one grows without bounds.
    """
    parts, size = [], 0
    with open_text(path) as file:
        while part := file.read(_PIECE):  # all at once Python would ask for the memory of the largest first
            parts.append(part)
            size += len(part)
            if size > _LARGEST_JSON:
                limit = f"{_LARGEST_JSON:,} characters"
                raise UserError(f"--captions: {str(path)!r} is larger than {limit}; give it as JSON lines")
    return "".join(parts)
