"""One shard's part of ``prepare join``: what its samples are called, and its copy with the captions in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.data.shards.shard_names import file_name
from dreamlip_train.data.shards.shards import original_key, record_of
from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.job_folder import make_once
from dreamlip_train.prepare.shard_copy import copy_shard, samples_of
from dreamlip_train.prepare.url_keys import normal_path, normal_url

_URL_FIELDS = ("url", "Image Path", "ImagePath", "URL", "image_url")


def index_shard(task: tuple[int, str], *, state: Path, on: str) -> dict[str, Any]:
    """The compared value of each sample of a shard, to parquet; returns {"counts": of what was wrong}."""
    number, shard = task
    file = state / f"{number:06d}.parquet"
    return make_once(file, file.with_suffix(".json"), lambda: _write_index(file, number, shard, on))


def _write_index(file: Path, number: int, shard: str, on: str) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    bad, positions, values = Statistics(), [], []
    for position, sample in samples_of(shard, bad):
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
    with atomic_write(file) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")
    return {"counts": bad.state}


def _value(sample: dict[str, Any], on: str) -> str:
    """What a sample is compared by, in its one spelling; "" if it has none."""
    if on == "key":
        return original_key(sample).strip()
    if on == "path":
        return normal_path(original_key(sample))
    try:
        record = record_of(sample)
    except ValueError:
        return ""
    if on == "url":
        return normal_url(next((str(record[name]) for name in _URL_FIELDS if record.get(name)), ""))
    return str(record.get(on) or "").strip()


def rewrite_shard(
    task: tuple[int, str], *, matches: Path, output: Path, state: Path, matched_only: bool
) -> tuple[str, dict[str, Any]]:
    """Write the shard's copy, the captions in its json, unless that is done; returns (name, what it holds)."""
    number, shard = task
    name = file_name(shard)

    def write() -> dict[str, Any]:
        tables = _captions_of(matches, number)

        def captions_of(position: int, _: dict[str, Any]) -> dict[str, Any] | None:
            if matched_only and position not in tables:
                return None
            merged: dict[str, Any] = {}
            for captions in reversed(tables.get(position, [])):  # the first table has the last word
                merged |= captions
            return merged

        return copy_shard(shard, output / name, captions_of)

    return name, make_once(output / name, state / f"{name}.json", write)


def _captions_of(matches: Path, shard: int) -> dict[int, list[dict[str, Any]]]:
    """{position: the captions of each table} of one shard, from the few row groups of the sorted file that can hold
    it.
    """
    import pyarrow.compute
    import pyarrow.parquet

    by_position: dict[int, list[dict[str, Any]]] = {}
    with pyarrow.parquet.ParquetFile(matches) as file:
        column = file.schema_arrow.get_field_index("shard")
        for group in range(file.metadata.num_row_groups):
            bounds = file.metadata.row_group(group).column(column).statistics
            if bounds is not None and not bounds.min <= shard <= bounds.max:
                continue
            rows = file.read_row_group(group)
            rows = rows.filter(pyarrow.compute.equal(rows["shard"], shard))
            for position, captions in zip(rows["position"].to_pylist(), rows["captions"].to_pylist(), strict=True):
                by_position.setdefault(position, []).append(json.loads(captions))
    return by_position
