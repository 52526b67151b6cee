"""Held-out shards in, samples for evaluation out: one after another, in file order, nothing drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.quarantine import BadCounts
from dreamlip_train.data.samples import BadSample, val_sample
from dreamlip_train.data.shards.shard_names import list_shards
from dreamlip_train.data.shards.shards import ShardError, read_shard
from dreamlip_train.jobs.user_error import UserError

logger = logging.getLogger("dreamlip_train")


def val_samples(
    data: DataConfig,
    *,
    image_size: int,
    max_samples: int = 0,
    is_ours: Callable[[int], bool] = lambda position: True,
) -> Iterator[dict[str, Any]]:
    """Held-out samples in file order, for evaluation.

    Args:
        max_samples: how many of the first ones are looked at, 0 for all.
        is_ours: whether the sample at a position is decoded; the others are passed over.
    Yields:
        {"position": int, "key": str, "image": uint8 [3, S, S], "sentences": the sub-captions of data.eval_source or,
        where it is missing, of the first long caption the sample has, "raw": str or None, "mask":
        uint8 [S, S] label map of the same geometry, or None}

    Raises:
        UserError: data.val_shards is empty or matches nothing.
    """
    bad = BadCounts()
    position = -1
    for shard in list_shards(data.val_shards, allow_pipe=data.allow_pipe, field="data.val_shards"):
        for sample in _held_out(shard, bad):
            position += 1
            if max_samples and position >= max_samples:
                break
            if not is_ours(position):
                continue
            try:
                yield {"position": position, **val_sample(sample, data, image_size)}
            except BadSample as error:
                bad.add({"shard": shard, "key": sample["key"], "reason": error.args[0], "detail": error.args[1]})
    if bad.total:
        logger.warning("held-out samples left out: %s", bad)


def check_held_out(data: DataConfig, *, image_size: int) -> None:
    """Raise UserError unless data.val_shards has a sample with a sentence: said before a run, not at its first
    evaluation, which may be days later.
    """
    read = 0
    for sample in val_samples(data, image_size=image_size):
        if sample["sentences"]:
            return
        read += 1
    raise no_sentences(data, read)


def no_sentences(data: DataConfig, read: int) -> UserError:
    """The error of held-out shards in which nothing can be asked."""
    if read == 0:
        return UserError(
            f"data.val_shards: no sample of {data.val_shards!r} could be read; `dreamlip-train prepare validate` says "
            "what is in it"
        )
    return UserError(
        f"data.val_shards: none of the samples of {data.val_shards!r} has a sentence in {data.eval_source!r} or "
        "another long caption "
        f"({read} read); set data.eval_source to a column that has text"
    )


def _held_out(shard: str, bad: BadCounts) -> Iterator[dict[str, Any]]:
    try:
        yield from read_shard(shard)
    except ShardError as error:
        bad.add({"shard": shard, "key": "", "reason": "shard could not be read to its end", "detail": str(error)})
