"""Caption tables of every kind and layout, whole or mutated: bytes flipped, cut, doubled, or what trips parsers."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from shard_files import jpeg

PIECES = [
    *(
        b'"',
        b"'",
        b"\0",
        b"\r",
        b"\n",
        b"\t",
        b",",
        b";",
        b"\x1a",
        b"\x0c",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
    ),
    *(b"\\ud800", b"\\u0000", b"NaN", b"Infinity", b"1e999", b"-0", b"null", b"true", b"[]", b"{}", b'""'),
    *(b"[" * 3000, b"{" * 2000, b'{"a":' * 1500, b"x" * 20_000, b"9" * 5000, b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80"),
    *(b"http://[abc]/", b"http://[::1", b"http://h:99999999/x.jpg", b"../../etc/passwd", b"file:///0.jpg", b"//"),
    *(b'"Image Path"', b'"image"', b'"annotations"', b'"images"', b'"conversations"', b'"bytes"', b'"image_id"'),
]
CELLS = [
    *(lambda i: i, lambda i: i / 3, lambda i: None, bool, lambda i: b"ok", lambda i: b"\xff\xfe", lambda i: [f"a{i}"]),
    *(lambda i: [[f"a{i}"]], lambda i: {"a": i}, lambda i: [b"\xff"], lambda i: [None], lambda i: [1.5], lambda i: []),
    *(
        lambda i: [{"bytes": b"x"}],
        lambda i: {"bytes": b"\xff", "path": "x"},
        lambda i: {"bytes": None, "path": f"{i}"},
    ),
    *(lambda i: datetime.datetime(2020, 1, 1), lambda i: datetime.timedelta(1), lambda i: decimal.Decimal("1.5")),
]
KINDS = ("csv", "tsv", *["parquet"] * 4, "json", "jsonl", "csv.gz", "jsonl.zst", "json.gz")


def mutated_table(folder: Path, seed: int) -> Path:
    """Write one, the same for the same seed."""
    rng = random.Random(f"table-{seed}")
    kind = rng.choice(KINDS)
    name, _, compression = kind.partition(".")
    content = _mutated(_content(name, rng), rng) if rng.random() < 0.9 else _content(name, rng)
    if compression == "gz":
        content = gzip.compress(content)
    elif compression:
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    if compression and rng.random() < 0.3:
        content = _mutated(content, rng)
    path = folder / f"{seed}.{kind}"
    path.write_bytes(content)
    return path


def _row(i: int) -> dict[str, Any]:
    return {
        "Image Path": f"http://h/{i}.jpg" if i % 2 else f"{i}.jpg",
        "raw_caption": f"raw, {i}",
        "longSV_captions": f'A dog "{i}" runs.\nIt rains.',
        "shortSV_captions": None if i % 3 else f"short {i}",
        "score": i / 7,
        "tags": ["a", "b"],
    }


def _annotation(i: int) -> dict[str, Any]:
    return {"image": f"{i // 2}.jpg", "image_id": i // 2, "caption_id": i, "caption": f"A dog {i}."}


def _conversation(i: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A dog {i}. It runs."}]
    return {"id": i, "image": f"{i}.jpg", "conversations": turns}


def _content(kind: str, rng: random.Random) -> bytes:
    rows = [_row(i) for i in range(rng.randrange(2, 8))]
    if kind == "parquet":
        return _parquet(rows, rng)
    if kind in ("csv", "tsv"):
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()
    make = rng.choice([_row, _annotation, _conversation])
    records = [make(i) for i in range(6)]
    if kind == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    coco = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]}
    documents = [records, {f"{i}": record for i, record in enumerate(records)}, {"annotations": records}]
    return json.dumps(rng.choice([*documents, {"annotations": records} | coco])).encode()


def _parquet(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        column, make = rng.choice(["Image Path", "raw_caption", "longSV_captions", "tags"]), rng.choice(CELLS)
        for i, row in enumerate(rows):
            row[column] = make(i)
    inside = rng.random() < 0.3
    for i, row in enumerate(rows if inside else ()):
        row["Image Path"] = {"bytes": jpeg(i, 16), "path": f"{i}.jpg"}
    table = pyarrow.Table.from_pylist(rows)
    if inside or rng.random() < 0.3:
        table = table.rename_columns([{"Image Path": "image"}.get(name, name) for name in table.column_names])
    sink = io.BytesIO()
    options = {"use_dictionary": rng.random() < 0.5, "data_page_version": rng.choice(["1.0", "2.0"])}
    pyarrow.parquet.write_table(
        table, sink, compression=rng.choice(["none", "zstd", "gzip"]), row_group_size=2, **options
    )
    return sink.getvalue()


def _mutated(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.choice(PIECES)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at : at + 8] = rng.choice(PIECES)[:200]
        elif kind == 4:
            data[at:at] = data[rng.randrange(len(data) or 1) :][: rng.randrange(60)]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)
