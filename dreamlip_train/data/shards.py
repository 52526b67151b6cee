"""Shards as files: which ones a pattern names, how many samples each holds, and the raw samples inside. Nothing here decodes anything.

    pattern -> list_shards -> sample_counts (manifest.json, sizes.json or an indexing pass)
            -> read_shard -> {"key", "jpg": bytes, "json": bytes, ..}

Tar members are read as bytes and never unpickled: a ``.pyd`` member is bytes like any other.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("WDS_SECURE", "1")

import braceexpand
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"


class ShardError(Exception):
    """A shard that could not be read to its end; ``args[0]`` says why."""


def list_shards(pattern: str, *, allow_pipe: bool = False, field: str = "data.shards") -> list[str]:
    """The shard paths and URLs that a pattern names, sorted within each part: globs, braces, folders, several parts joined with "::".

    Raises:
        UserError: the pattern is empty, matches nothing, or is a "pipe:" (a shell command) that was not permitted.
    """
    if not pattern.strip():
        raise UserError(
            f"{field}: is empty; give a folder, a glob such as 'shards/*.tar', or braces such as 'cc3m-{{0000..0575}}.tar'"
        )
    found: list[str] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:"):
            if not allow_pipe:
                raise UserError(f"{field}: {part!r} runs a shell command; set data.allow_pipe if you trust it")
            found.append(part)
            continue
        for name in braceexpand.braceexpand(part.removeprefix("file://")):
            found += _expand(name, field)
    repeated = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
    if repeated:
        raise UserError(f"{field}: {repeated[0]!r} is named more than once by {pattern!r}; name each shard once")
    return found


def _expand(name: str, field: str) -> list[str]:
    if "://" in name:
        return [name]
    matches = sorted(glob.glob(os.path.join(name, "*.tar"))) if os.path.isdir(name) else sorted(glob.glob(name))
    if not matches:
        what = "a folder without .tar files" if os.path.isdir(name) else f"no such file (in {os.getcwd()})"
        raise UserError(f"{field}: {name!r} matches no shard: {what}; `dreamlip-train prepare` makes shards")
    return matches


def sample_counts(shards: list[str]) -> list[int]:
    """Samples in each shard: from manifest.json or sizes.json beside it, else by reading it once (which is said)."""
    tables: dict[str, dict[str, int]] = {}
    counts: list[int | None] = []
    for shard in shards:
        folder, name = os.path.split(shard)
        if folder not in tables:
            tables[folder] = _count_table(Path(folder)) if "://" not in shard else {}
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
        with _open(shard) as stream:
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


def _open(shard: str) -> Any:
    if shard.startswith("pipe:"):  # list_shards has asked for the user's permission
        return Pipe(shard.removeprefix("pipe:"), mode="rb", shell=True)
    return gopen(shard, "rb") if "://" in shard else open(shard, "rb")


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


def local_folder(shard: str) -> Path | None:
    """The folder of a shard on this machine; None for a URL."""
    return None if urlsplit(shard).scheme or shard.startswith("pipe:") else Path(shard).parent
