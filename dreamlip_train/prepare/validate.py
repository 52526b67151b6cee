"""``prepare validate``: reads existing shards whole, says what a trainer would trip over, indexes them in
manifest.json, and writes repaired copies.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import caption_columns, caption_pool, is_caption_column, split_sub_captions
from dreamlip_train.captions.statistics import CountTokens, Statistics, character_split_columns
from dreamlip_train.data.images import ImageError, decode_image
from dreamlip_train.data.shards.manifest import MANIFEST
from dreamlip_train.data.shards.manifest_writer import Manifest
from dreamlip_train.data.shards.shard_names import address, file_name, list_shards, local_folder
from dreamlip_train.data.shards.shard_writer import ShardWriter, json_member
from dreamlip_train.data.shards.shards import RepeatedKey, ShardError, image_of, original_key, read_shard, record_of
from dreamlip_train.jobs.job_folder import failed_writes_named
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.output_names import require_another_folder, require_distinct_names
from dreamlip_train.prepare.shard_copy import samples_of


def validate_shards(
    pattern: str,
    *,
    count_tokens: CountTokens | None = None,
    allow_pipe: bool = False,
    index: bool = True,
    crop: int = 0,
    fix: str = "",
) -> dict[str, Any]:
    """Check every sample of the shards, write a manifest.json into each of their folders (``index``),
    and return the whole as one manifest.

    The shards are not touched. A manifest's "samples" of a shard counts all that have an image, for the trainer to
    compare with what it reads; "captions" describe the usable ones, "bad" names the rest.

    Args:
        crop: count images whose shorter side is smaller; 0 does not.
        fix: folder for repaired copies, which keep their names: samples that can't be used and those that come twice
            (the same key and content) left out, keys that come twice told apart, empty captions dropped, captions
            stored as characters put together again.
    Raises:
        UserError: the pattern matches nothing, no sample of the shards is usable, or ``fix`` is their own folder.
    """
    shards = list_shards(pattern, allow_pipe=allow_pipe, field="PATTERN")
    if fix:
        require_another_folder(shards, Path(fix), "--fix")
        require_distinct_names(shards, "PATTERN", "--fix the folders one at a time")
        Path(fix).mkdir(parents=True, exist_ok=True)
    several = len({os.path.dirname(shard) for shard in shards}) > 1
    whole, folders = Manifest(), defaultdict(Manifest)
    kinds: Counter[tuple[str, str]] = Counter()
    samples_before = _SamplesBefore()
    with Progress(f"validate {pattern}", len(shards), "shards") as progress:
        checks = map_bounded(lambda shard: _check(shard, count_tokens, crop), shards)
        for shard, note, digests, shard_kinds in checks:
            kinds.update(shard_kinds)
            counts = Statistics(note["counts"])
            samples_before.add(shard, digests, counts)
            note["counts"] = counts.state
            folder, name = os.path.dirname(address(shard)), file_name(shard)
            folders[folder].add(name, note)
            whole.add(shard if several else name, note)
            total = whole.total
            progress.advance(text=f"{total.samples:,} samples, {total.bad_count:,} findings")
    for column in sorted({column for column, _ in kinds}):
        lists, strings = kinds[column, "list"], kinds[column, "string"]
        if lists and strings:
            whole.total.add_bad("lists and strings in one column", column, f"{lists} lists, {strings} strings")
    if index:
        _write_manifests(shards, folders)
    if whole.total.samples == 0:
        why = whole.total.bad_summary() or "the shards are empty"
        raise UserError(f"PATTERN: no sample of {pattern!r} is usable: {why}")
    if fix:
        writing = failed_writes_named(Path(fix), "--fix")
        with writing, Progress(f"repair {pattern}", len(shards), "shards") as progress:
            for _ in map_bounded(lambda shard: _fix(shard, Path(fix), samples_before.duplicates), shards):
                progress.advance()
        validate_shards(fix, count_tokens=count_tokens)
    return whole.content()


class _SamplesBefore:
    """Which samples came before. Two sets may count from the same number: a sample is its key and its content."""

    def __init__(self) -> None:
        self.owner: dict[bytes, str] = {}
        self.duplicates: set[tuple[str, str]] = set()
        """(shard, key) of the samples that came before."""

    def add(self, shard: str, digests: Sequence[tuple[str, bytes]], counts: Statistics) -> None:
        """Count those samples of a shard, (key, digest) each, that came before."""
        for key, digest in digests:
            if digest in self.owner:
                counts.add_bad("duplicate sample", f"{shard}: {key}", f"also in {self.owner[digest]}")
                self.duplicates.add((shard, key))
            self.owner.setdefault(digest, shard)


def _digest(sample: Mapping[str, Any]) -> bytes:
    digest = hashlib.blake2b(repr(str(original_key(sample))).encode(), digest_size=16)
    for extension, content in sorted(sample.items()):
        if extension != "key":
            digest.update(f"{extension}:{len(content)}:".encode() + content)
    return digest.digest()


def _write_manifests(shards: Sequence[str], folders: Mapping[str, Manifest]) -> None:
    """A manifest.json in each folder on this machine. One that can't be written does not cost the findings."""
    for folder in dict.fromkeys(os.path.dirname(shard) for shard in shards if local_folder(shard)):
        try:
            folders[folder].write(Path(folder))
        except OSError as error:
            print(plain(f"no {MANIFEST} in {folder or '.'}: {error.strerror or error}"), file=sys.stderr)


def _check(
    shard: str, count_tokens: CountTokens | None, crop: int
) -> tuple[str, dict[str, Any], list[tuple[str, bytes]], Counter[tuple[str, str]]]:
    """(shard, what ``Manifest.add`` takes, (key, digest) of those with a picture, how often each column holds a list
    and a string).
    """
    counts, digests, kinds, size = Statistics(), [], Counter(), 0
    for _, sample in samples_of(shard, counts):
        if image_of(sample) is not None:
            digests.append((sample["key"], _digest(sample)))
        size += sum(len(value) for value in sample.values() if isinstance(value, bytes))
        _check_sample(shard, sample, counts, kinds, count_tokens, crop)
    if local_folder(shard):
        size = os.path.getsize(shard) if os.path.exists(shard) else None
    return shard, {"samples": len(digests), "bytes": size, "counts": counts.state}, digests, kinds


def _check_sample(
    shard: str,
    sample: dict[str, Any],
    counts: Statistics,
    kinds: Counter[tuple[str, str]],
    count_tokens: CountTokens | None,
    crop: int,
) -> None:
    name = f"{shard}: {sample['key']}"
    image = image_of(sample)
    if isinstance(sample["key"], RepeatedKey):
        counts.add_bad("duplicate key", name, f"an earlier sample is called {sample['key'].original}")
    if image is None:
        return counts.add_bad("no image", name, f"members {sorted(set(sample) - {'key'})}")
    notes: list[str] = []
    try:
        record = record_of(sample, notes)
    except ValueError as error:
        return counts.add_bad("unreadable captions", name, str(error))
    for note in notes:
        counts.add_bad("caption that was a list or bytes, written as text", name, note)
    for column in character_split_columns(record):
        counts.add_bad("caption stored as characters", name, column)
    for column in caption_columns(record):
        if column not in character_split_columns(record):
            if split_sub_captions(record[column]):
                kinds[column, "list" if isinstance(record[column], list) else "string"] += 1
            else:
                counts.add_bad(f"empty {column}", name, repr(record[column])[:40])
    if not caption_pool(record):
        return counts.add_bad("no captions", name)
    try:
        height, width = decode_image(image).shape[-2:]
    except ImageError as error:
        return counts.add_bad("damaged image", name, str(error))
    if min(height, width) < crop:
        counts.add_bad(f"image smaller than {crop} pixels", name, f"{width} x {height}")
    counts.add_sample(record, count_tokens, "mask.png" in sample)


def _fix(shard: str, folder: Path, duplicates: set[tuple[str, str]]) -> None:
    """The shard's repaired copy, without the ``duplicates`` (shard, key)."""
    with ShardWriter(folder / file_name(shard)) as writer:
        try:
            for sample in read_shard(shard):
                copy = None if (shard, sample["key"]) in duplicates else _fixed(sample)
                if copy is not None:
                    writer.add(copy)
        except ShardError:
            pass  # what comes after the damage is lost; the findings say so


def _fixed(sample: dict[str, Any]) -> dict[str, Any] | None:
    """The sample with its captions repaired, or None if it can't be used."""
    image = image_of(sample)
    try:
        record = record_of(sample)
        if image is None:
            return None
        decode_image(image)
    except ValueError:  # an ImageError is one
        return None
    split = character_split_columns(record)
    record |= {column: "".join(record[column]) for column in split}
    record = {name: value for name, value in record.items() if not is_caption_column(name) or split_sub_captions(value)}
    if not caption_pool(record):
        return None
    return {**sample, "json": json_member(record)}
