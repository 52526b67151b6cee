"""How many samples each shard holds: from manifest.json or sizes.json beside it, from what an earlier start has
counted, else by reading it once.

What can't be counted is named and set aside; nothing here stops at the first broken tar.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamlip_train.data.shards.shard_names import Shard, address, file_name, local_folder, open_shard, scheme_of
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard
from dreamlip_train.jobs.atomic_json import parse_json, read_json, write_json
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

MANIFEST = "manifest.json"
_LARGEST_INDEX = 256 * 2**20


@dataclass
class Counts:
    """Samples in each shard that could be counted, and why the others could not."""

    samples: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def count_samples(shards: list[Shard], counts_file: Path | None = None) -> Counts:
    """The counts of ``shards``, in their order.

    Args:
        counts_file: a JSON file in which what had to be counted is kept, for the next start;
            a local file counts as the same while its size and time are.
    Raises:
        UserError: an index file beside the shards is damaged.
    """
    tables: dict[str, dict[str, int]] = {}
    counts = Counts()
    counts_by_mark = _read_counts(counts_file)
    before = dict(counts_by_mark)
    uncounted = []
    for shard in shards:
        folder, name = os.path.dirname(address(shard)), file_name(shard)
        if folder not in tables:
            tables[folder] = _index_of(shard)
        if name in tables[folder]:
            counts.samples[shard] = tables[folder][name]
        else:
            uncounted.append(shard)
    missing = [shard for shard in uncounted if _mark(shard) not in counts_by_mark]
    if missing:
        logger.warning(
            "counting the samples of %d shards that no %s or sizes.json lists, such as %s; "
            "`dreamlip-train prepare validate` does it once for all",
            len(missing),
            MANIFEST,
            missing[0],
        )
    for shard in uncounted:
        mark = _mark(shard)
        entry = counts_by_mark[mark] = counts_by_mark[mark] if mark in counts_by_mark else _counted(shard)
        if isinstance(entry, int):
            counts.samples[shard] = entry
        else:
            counts.broken[shard] = str(entry)
    if counts_file is not None and counts_by_mark != before:
        try:
            counts_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(counts_file, counts_by_mark)
        except OSError as error:
            logger.warning("%s can't be written (%s): the next start counts again", counts_file, error.strerror)
    counts.samples = {shard: counts.samples[shard] for shard in shards if shard in counts.samples}
    return counts


def indexed_samples(shards: Sequence[str]) -> dict[str, int]:
    """The samples of each shard where indexes beside them say it of all; else nothing: no shard is read.

    Raises:
        UserError: an index file beside the shards is damaged.
    """
    tables: dict[str, dict[str, int]] = {}
    for folder, shard in {os.path.dirname(address(shard)): shard for shard in shards}.items():
        tables[folder] = _index_of(shard)
    counts = {shard: tables[os.path.dirname(address(shard))].get(file_name(shard), -1) for shard in shards}
    return {} if -1 in counts.values() else counts


def _counted(shard: Shard) -> int | str:
    """Samples with an image, or why they can't be counted."""
    try:
        return sum(1 for sample in read_shard(shard) if image_of(sample) is not None)
    except ShardError as error:
        return str(error)


def _mark(shard: Shard) -> str:
    """What a count is kept under: the name, and of a local file its size and time."""
    if scheme_of(shard) != "file":
        return str(shard)
    try:
        stat = os.stat(shard)
    except OSError:
        return f"{os.path.abspath(shard)} is missing"
    return f"{os.path.abspath(shard)} {stat.st_size} {stat.st_mtime_ns}"


def _read_counts(counts_file: Path | None) -> dict[str, Any]:
    try:
        content = read_json(counts_file) if counts_file is not None and counts_file.exists() else {}
    except (OSError, ValueError):  # a start that was killed; it is counted again
        return {}
    return content if isinstance(content, dict) else {}


def _index_of(shard: str) -> dict[str, int]:
    """Sample counts by shard name from the index files beside a shard."""
    table: dict[str, int] = {}
    for name in ("sizes.json", MANIFEST):
        path, content = _read_index(shard, name)
        if content is None:
            continue
        try:
            parsed = parse_json(content)
            entries = parsed["shards"] if name == MANIFEST else parsed
            table |= {shard: int(entry["samples"] if name == MANIFEST else entry) for shard, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: is not a shard index ({error}); delete it, or make it again with `dreamlip-train prepare "
                "validate`"
            ) from error
    return table


def _read_index(shard: str, name: str) -> tuple[str, bytes | None]:
    """(its path or URL, its content or None)."""
    folder = local_folder(shard)
    if folder is not None:
        path = folder / name
        return str(path), path.read_bytes() if path.is_file() else None
    if scheme_of(shard) != "http" or name != MANIFEST:
        return name, None
    url = Shard(f"{os.path.dirname(address(shard))}/{name}", "http")
    try:
        with open_shard(url) as stream:
            content = stream.read(_LARGEST_INDEX)
    except OSError:  # it is not there
        return url, None
    return url, content if content.lstrip()[:1] == b"{" else None  # else a server's page that says so
