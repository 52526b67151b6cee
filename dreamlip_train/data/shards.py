"""What is in shards: how many samples each holds, and the raw samples. Nothing here decodes anything.

    list_shards -> sample_counts (manifest.json, sizes.json or an indexing pass)
                -> read_shard -> {"key", "jpg": bytes, "json": bytes, ..}

Tar members are read as bytes and never unpickled: a ``.pyd`` member is bytes like any other.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WDS_SECURE", "1")

from webdataset.tariterators import base_plus_ext, tar_file_iterator

from dreamlip_train.data.shard_names import local_folder, open_shard
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"


class ShardError(Exception):
    """A shard that could not be read to its end; ``args[0]`` says why."""


def sample_counts(shards: list[str]) -> list[int]:
    """Samples in each shard: from manifest.json or sizes.json beside it, else by reading it once (which is said)."""
    tables: dict[str, dict[str, int]] = {}
    counts: list[int | None] = []
    for shard in shards:
        folder, name = os.path.split(shard)
        if folder not in tables:
            tables[folder] = _count_table(Path(folder)) if local_folder(shard) else {}
        counts.append(tables[folder].get(name))
    missing = [shard for shard, count in zip(shards, counts, strict=True) if count is None]
    if missing:
        logger.warning(
            "counting the samples of %d shards that no manifest.json or sizes.json lists, such as %s; "
            "`dreamlip-train prepare validate` does it once for all",
            len(missing), missing[0],
        )  # fmt: skip
    return [_count(shard) if count is None else count for shard, count in zip(shards, counts, strict=True)]


def _count_table(folder: Path) -> dict[str, int]:
    """Sample counts by shard name from the folder's index files."""
    table: dict[str, int] = {}
    for name in ("sizes.json", MANIFEST):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            listed = content["shards"] if name == MANIFEST else content
            table |= {shard: int(entry["samples"] if name == MANIFEST else entry) for shard, entry in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: is not a shard index ({error}); delete it, or make it again with `dreamlip-train prepare validate`"
            ) from error
    return table


def _count(shard: str) -> int:
    try:
        return sum(1 for sample in read_shard(shard) if image_of(sample) is not None)
    except ShardError as error:
        raise UserError(f"{shard}: cannot be counted: {error}; remove it or fetch it again") from error


def read_shard(shard: str) -> Iterator[dict[str, Any]]:
    """Raw samples in file order: {"key": str, extension: bytes, ..}, extensions in lower case.

    Raises:
        ShardError: the tar is missing, truncated or no tar; the samples before the damage have been given.
    """
    current: dict[str, Any] = {}
    try:
        with open_shard(shard) as stream:
            for member in tar_file_iterator(stream, handler=_reraise):
                if "fname" not in member:  # webdataset marks the end of a shard with an empty record
                    continue
                key, extension = base_plus_ext(member["fname"])
                if not key or not extension:
                    continue
                if current and current["key"] != key:
                    yield current
                    current = {}
                current.setdefault("key", key)
                current[extension.lower()] = member["data"]
    except (OSError, EOFError, ValueError) as error:
        raise ShardError(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("tarfile", "zlib", "webdataset"):
            raise
        raise ShardError(f"{type(error).__name__}: {error}") from error
    if current:
        yield current


def _reraise(error: Exception) -> bool:
    raise error


def image_of(sample: dict[str, Any]) -> bytes | None:
    """The sample's image file, or None."""
    return next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), None)


def record_of(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample's caption columns: its json, and its txt as raw_caption where the json has none.

    Raises:
        ValueError: the json is not an object.
    """
    record: dict[str, Any] = {}
    if "json" in sample:
        record = json.loads(sample["json"].decode("utf-8", errors="strict"))
        if not isinstance(record, dict):
            raise ValueError(f"its json holds a {type(record).__name__}, not an object")
    if "txt" in sample and not isinstance(record.get("raw_caption"), (str, list)):
        record["raw_caption"] = sample["txt"].decode("utf-8", errors="replace")
    return record
