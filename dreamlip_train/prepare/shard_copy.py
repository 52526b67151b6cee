"""A shard's copy with further captions in its samples' json; the samples stay in their order and all else as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.statistics import Statistics
from dreamlip_train.data.shards.shard_writer import ShardWriter, json_member
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard, record_of


def copy_shard(
    shard: str, file: Path, captions_of: Callable[[int, dict[str, Any]], Mapping[str, Any] | None], lacking: str = ""
) -> dict[str, Any]:
    """Write ``file``, unless no sample is left; returns what ``Manifest.add`` takes, but for the bytes.

    Args:
        captions_of: of (position in the shard, sample): the captions to add, {} for none; None leaves the sample out.
        lacking: the reason by which a picture to which no captions were added is counted; "" does not count it.
    """
    counts, with_image = Statistics(), 0
    with ShardWriter(file) as writer:
        for position, sample in samples_of(shard, counts):
            captions = captions_of(position, sample)
            if captions is None:
                continue
            name, has_image = f"{shard}: {sample['key']}", image_of(sample) is not None
            record = {**_record(sample, name, counts), **captions}
            writer.add({**sample, "json": json_member(record)})
            # As validate counts: all that have an image, usable or not, for the trainer to compare with what it reads.
            with_image += has_image
            if has_image and not captions and lacking:
                counts.add_bad(lacking, name)
            if not has_image:
                counts.add_bad("no image", name)
            elif caption_pool(record):
                counts.add_sample(record, None, "mask.png" in sample)
            elif captions or not lacking:
                counts.add_bad("no captions", name)
    return {"samples": with_image, "counts": counts.state}


def samples_of(shard: str, counts: Statistics) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, sample) up to the shard's end or to its damage, which is counted."""
    position = 0
    try:
        for sample in read_shard(shard):
            yield position, sample
            position += 1
    except ShardError as error:
        counts.add_bad("shard could not be read to its end", shard, f"after {position} samples: {error}")


def _record(sample: dict[str, Any], name: str, counts: Statistics) -> dict[str, Any]:
    try:
        return record_of(sample)
    except ValueError as error:
        counts.add_bad("unreadable json replaced", name, str(error))
        return {}
