"""The data sets of a run: their shards listed and counted, once for all ranks; what can't be counted is set aside."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.quarantine import Quarantine, read_quarantine
from dreamlip_train.data.shards.manifest import Counts, count_samples
from dreamlip_train.data.shards.shard_names import Shard, list_shards, scheme_of, shard_ids
from dreamlip_train.jobs.user_error import RunError, UserError

logger = logging.getLogger("dreamlip_train")

_COUNTS = "sample_counts.json"  # in the run folder: what no index beside the shards says


@dataclass(frozen=True)
class DataSet:
    """One of the sets that a run draws from: its shards and how many samples each has. The set of data.shards alone has
    no name.
    """

    name: str
    shards: list[str]
    counts: list[int]

    @property
    def size(self) -> int:
        """Samples of the set."""
        return sum(self.counts)


def data_sets(
    data: DataConfig, *, rank: int = 0, world_size: int = 1, quarantine: Path | None = None
) -> tuple[list[DataSet], dict[str, str]]:
    """The sets of data.shards or data.mixture, and the name within all of them of each shard.

    Args:
        quarantine: the run's jsonl file of what is left out; the counts are kept beside it.
    Raises:
        UserError: a pattern matches nothing, two sets share a shard, or there are too few shards for this many readers.
        RunError: more than data.max_bad_fraction of the shards can't be counted.
    """
    patterns = {f"data.mixture.{name}": pattern for name, pattern in sorted(data.mixture.items())}
    patterns = patterns or {"data.shards": data.shards}
    shards_by_field = {
        field: list_shards(pattern, allow_pipe=data.allow_pipe, field=field) for field, pattern in patterns.items()
    }
    shards = [shard for of_set in shards_by_field.values() for shard in of_set]
    places = Counter(os.path.abspath(shard) if scheme_of(shard) == "file" else shard for shard in shards)
    if duplicates := [place for place, times in places.items() if times > 1]:
        raise UserError(f"data.mixture: {duplicates[0]!r} is in two sets; name each shard once")
    readers = world_size * max(1, data.num_workers)
    if len(shards) < readers:
        raise UserError(
            f"data.num_workers: {len(shards)} shards for {world_size} ranks x {max(1, data.num_workers)} workers = "
            f"{readers} readers; "
            f"use --data.num-workers {max(1, len(shards) // world_size)}, fewer ranks, or smaller shards (prepare "
            "--shard-size)"
        )
    ids: dict[str, str] = dict(zip(shards, shard_ids(shards), strict=True))
    counts = _shared_counts(shards, quarantine)
    if counts.broken:
        _set_aside(counts, ids, data, quarantine if rank == 0 else None)
    sets = []
    for field, of_set in shards_by_field.items():
        usable: list[str] = [shard for shard in of_set if shard in counts.samples]
        name = field.removeprefix("data.mixture.") if data.mixture else ""
        sets.append(DataSet(name, usable, [counts.samples[shard] for shard in usable]))
    return sets, ids


def _shared_counts(shards: list[Shard], quarantine: Path | None) -> Counts:
    """Samples in each shard; of several ranks the first one counts, once for the run folder."""
    counts_file = None if quarantine is None else quarantine.with_name(_COUNTS)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count_samples(shards, counts_file)
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [count_samples(shards, counts_file)]
        except UserError as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _set_aside(counts: Counts, ids: Mapping[str, str], data: DataConfig, quarantine: Path | None) -> None:
    """Note the shards that can't be counted; RunError if they are too many."""
    broken, total = counts.broken, len(counts.broken) + len(counts.samples)
    names = "; ".join(f"{shard}: {why}" for shard, why in broken.items())
    if len(broken) > data.max_bad_fraction * total or not counts.samples:
        raise RunError(
            f"data.max_bad_fraction: {len(broken)} of {total} shards can't be read to their ends (limit "
            f"{data.max_bad_fraction:.0%}): {names}. "
            "Fetch them again, leave them out of data.shards, or raise the limit"
        )
    logger.warning("set aside: %d of %d shards, which can't be read to their ends: %s", len(broken), total, names)
    places_before = read_quarantine(quarantine, ids)
    entries = [
        {"shard": ids[shard], "path": shard, "key": "", "reason": "shard could not be counted", "detail": why}
        for shard, why in broken.items()
        if (ids[shard], "") not in places_before
    ]
    Quarantine(quarantine).add(entries)
