"""One shard's part of ``prepare join``: what its samples are called, and its copy with the captions in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.data.shards.shard_writer import ShardWriter
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard, record_of
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.prepare.url_keys import normal_path, normal_url

_URL_FIELDS = ("url", "Image Path", "ImagePath", "URL", "image_url")


def index_shard(task: tuple[int, str], *, state: Path, on: str) -> dict[str, Any]:
    """The compared value of each sample of a shard, to parquet; returns what was wrong."""
    import pyarrow
    import pyarrow.parquet

    number, shard = task
    final, counts = state / f"{number:06d}.parquet", state / f"{number:06d}.json"
    if final.exists() and counts.exists():
        return json.loads(counts.read_text(encoding="utf-8"))
    bad, positions, values = Statistics(), [], []
    for position, sample in _samples(shard, bad):
        value = _value(sample, on)
        if value:
            positions.append(position)
            values.append(value.encode("utf-8", "replace").decode())
        else:
            bad.add_bad(f"no {on}", f"{shard}: {sample['key']}")
    table = pyarrow.table(
        {
            "shard": pyarrow.array([number] * len(values), pyarrow.int32()),
            "position": pyarrow.array(positions, pyarrow.int64()),
            "value": pyarrow.array(values, pyarrow.string()),
        }
    )
    partial = final.with_name(final.name + ".partial")
    pyarrow.parquet.write_table(table, partial, compression="zstd")
    write_json(counts, bad.state)
    os.replace(partial, final)
    return bad.state


def _samples(shard: str, bad: Statistics) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, sample) up to the end or to the damage, which is counted."""
    position = 0
    try:
        for sample in read_shard(shard):
            yield position, sample
            position += 1
    except ShardError as error:
        bad.add_bad("shard could not be read to its end", shard, f"after {position} samples: {error}")


def _value(sample: dict[str, Any], on: str) -> str:
    """What a sample is compared by, in its one spelling; "" if it has none."""
    if on == "key":
        return str(sample["key"]).strip()
    if on == "path":
        return normal_path(str(sample["key"]))
    try:
        record = record_of(sample)
    except (ValueError, RecursionError):
        return ""
    if on == "url":
        return normal_url(next((str(record[name]) for name in _URL_FIELDS if record.get(name)), ""))
    return str(record.get(on) or "").strip()


def rewrite_shard(
    task: tuple[int, str], *, joined: Path, output: Path, state: Path, matched_only: bool
) -> tuple[str, dict[str, int], dict[str, Any]]:
    """Write the shard's copy, its json records with the captions in, unless it is there;
    returns (name, manifest entry, counts).
    """
    number, shard = task
    name = os.path.basename(shard)
    final, known = output / name, state / f"{name}.json"
    if known.exists():
        done = json.loads(known.read_text(encoding="utf-8"))
        if final.exists() or not done["entry"]["samples"]:
            return name, done["entry"], done["counts"]
    captions, counts, with_image = _captions_of(joined, number), Statistics(), 0
    with ShardWriter(final) as writer:
        for position, sample in _samples(shard, counts):
            found = captions.get(position, [])
            if not found and matched_only:
                continue
            record = _record(sample, counts, shard)
            for one in reversed(found):  # by table: the first has the last word
                record |= one
            writer.add({**sample, "json": json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")})
            has_image = image_of(sample) is not None
            with_image += has_image
            if not has_image:
                counts.add_bad("no image", f"{shard}: {sample['key']}")
            elif not caption_pool(record):
                counts.add_bad("no captions", f"{shard}: {sample['key']}")
            else:
                counts.add_sample(record, None, "mask.png" in sample)
    # As validate counts: all that have an image, usable or not, for the trainer to compare with what it reads.
    entry = {"samples": with_image, "bytes": final.stat().st_size if writer.samples else 0}
    write_json(known, {"entry": entry, "counts": counts.state})
    return name, entry, counts.state


def _record(sample: dict[str, Any], counts: Statistics, shard: str) -> dict[str, Any]:
    try:
        return record_of(sample)
    except (ValueError, RecursionError) as error:
        counts.add_bad("unreadable json replaced", f"{shard}: {sample['key']}", str(error))
        return {}


def _captions_of(joined: Path, shard: int) -> dict[int, list[dict[str, Any]]]:
    """{position: the captions of each table} of one shard, from the few row groups of the sorted file that can hold
    it.
    """
    import pyarrow.compute
    import pyarrow.parquet

    found: dict[int, list[dict[str, Any]]] = {}
    with pyarrow.parquet.ParquetFile(joined) as file:
        column = file.schema_arrow.get_field_index("shard")
        for group in range(file.metadata.num_row_groups):
            bounds = file.metadata.row_group(group).column(column).statistics
            if bounds is not None and not bounds.min <= shard <= bounds.max:
                continue
            rows = file.read_row_group(group)
            rows = rows.filter(pyarrow.compute.equal(rows["shard"], shard))
            for position, captions in zip(rows["position"].to_pylist(), rows["captions"].to_pylist(), strict=True):
                found.setdefault(position, []).append(json.loads(captions))
    return found
