"""``prepare validate``: reads existing shards whole, says what a trainer would trip over, and indexes them in manifest.json."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from dreamlip_train.caption_statistics import CountTokens, Statistics, character_split_columns, write_json
from dreamlip_train.captions import caption_pool
from dreamlip_train.images import ImageError, decode_image
from dreamlip_train.processes import map_bounded
from dreamlip_train.progress import Progress
from dreamlip_train.shards import MANIFEST, ShardError, image_of, list_shards, local_folder, read_shard, record_of


def validate_shards(
    pattern: str, *, count_tokens: CountTokens | None = None, allow_pipe: bool = False, index: bool = True
) -> dict[str, Any]:
    """Check every sample of the shards, write a manifest.json into each of their folders (``index``), and return the whole as one manifest.

    The shards are not touched. A manifest's "samples" of a shard counts all that have an image, for the trainer to compare with what it
    reads; "captions" describe the usable ones, "bad" names the rest.

    Raises:
        ValueError: the pattern matches nothing, or no sample of the shards is usable.
    """
    shards = list_shards(pattern, allow_pipe=allow_pipe, field="PATTERN")
    total = Statistics()
    folders: dict[Path | None, tuple[Statistics, dict[str, Any]]] = defaultdict(lambda: (Statistics(), {}))
    owner: dict[str, str] = {}
    with Progress(f"validate {pattern}") as progress:
        for done, (shard, entry, state, keys) in enumerate(map_bounded(lambda shard: _check(shard, count_tokens), shards), 1):
            counts = Statistics(state)
            for key in keys:
                if key in owner:
                    counts.add_bad("duplicate key", f"{shard}: {key}", f"also in {owner[key]}")
                owner.setdefault(key, shard)
            total.merge(counts)
            folder_counts, listed = folders[local_folder(shard)]
            folder_counts.merge(counts)
            listed[Path(shard).name] = entry
            progress.update(f"{done} of {len(shards)} shards, {total.samples} samples, {total.bad_count} findings")
    for folder, (counts, listed) in folders.items():
        if folder is not None and index:
            write_json(folder / MANIFEST, {"format": 1, **counts.summary(), "shards": listed})
    manifest = {"format": 1, **total.summary(), "shards": {name: entry for _, listed in folders.values() for name, entry in listed.items()}}
    if total.samples == 0:
        raise ValueError(f"PATTERN: no sample of {pattern!r} is usable: {total.bad_summary() or 'the shards are empty'}")
    return manifest


def _check(shard: str, count_tokens: CountTokens | None) -> tuple[str, dict[str, int], dict[str, Any], list[str]]:
    """(shard, its manifest entry, counts, keys)."""
    counts, keys, with_image, size = Statistics(), [], 0, 0
    try:
        for sample in read_shard(shard):
            keys.append(sample["key"])
            with_image += image_of(sample) is not None
            size += sum(len(value) for value in sample.values() if isinstance(value, bytes))
            _check_sample(shard, sample, counts, count_tokens)
    except ShardError as error:
        counts.add_bad("shard could not be read to its end", shard, f"after {len(keys)} samples: {error}")
    entry = {"samples": with_image, "bytes": Path(shard).stat().st_size if local_folder(shard) else size}
    return shard, entry, counts.state, keys


def _check_sample(shard: str, sample: dict[str, Any], counts: Statistics, count_tokens: CountTokens | None) -> None:
    name = f"{shard}: {sample['key']}"
    image = image_of(sample)
    if image is None:
        return counts.add_bad("no image", name, f"members {sorted(set(sample) - {'key'})}")
    try:
        record = record_of(sample)
    except (ValueError, RecursionError) as error:
        return counts.add_bad("unreadable captions", name, str(error))
    for column in character_split_columns(record):
        counts.add_bad("caption stored as characters", name, column)
    if not caption_pool(record):
        return counts.add_bad("no captions", name)
    try:
        decode_image(image)
    except ImageError as error:
        return counts.add_bad("damaged image", name, str(error))
    counts.add_sample(record, count_tokens, "mask.png" in sample)
