"""Shards in, batches out: K drawn sub-captions, a mask and a cropped image for each sample.

    {"images" uint8 [n,3,H,W], "text" int64 [n,K,L], "text_mask" bool [n,K], "cut" captions that lost their ends,
    "keys", "shards"}

data_sets.py lists the shards, epoch_plan.py says who reads what, shards/readers.py does it in the workers; here are the
loader of a rank and its count of what could not be used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.data_sets import DataSet, data_sets
from dreamlip_train.data.epoch_plan import ReaderLayout, ReaderPlan, batches_of_worker, plan_epoch
from dreamlip_train.data.mixture import Mixture
from dreamlip_train.data.quarantine import BadCounts, Quarantine, read_quarantine
from dreamlip_train.data.shards.readers import Heartbeats, Reader, ReaderDataset, Tokenize, start_worker
from dreamlip_train.data.shards.sample_stream import ReadingContext, SampleStream
from dreamlip_train.data.shards.shard_names import file_name
from dreamlip_train.jobs.user_error import RunError, UserError

logger = logging.getLogger("dreamlip_train")

_LOOK_EVERY = 5  # seconds after which a wait for a batch looks whether it still makes sense
_JUDGED_AFTER = 200  # samples seen before data.max_bad_fraction can stop a run: a first bad sample is no rate


def train_loader(
    data: DataConfig,
    *,
    image_size: int,
    tokenize: Tokenize,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    quarantine: str | Path | None = None,
) -> TrainLoader:
    """The training batches of one rank.

    Args:
        image_size: side of the square crops, pixels.
        tokenize: B texts -> int64 [B, L] and how many were cut (CaptionTokenizer.with_cut).
        batch_size: images a batch.
        quarantine: a jsonl file in which every sample left out is noted; a resumed epoch needs it to skip exactly.

    Raises:
        UserError: no shard matches, or there are too few shards or samples for this many readers (the field is named).
    """
    quarantine = None if quarantine is None else Path(quarantine)
    sets, ids = data_sets(data, rank=rank, world_size=world_size, quarantine=quarantine)
    return TrainLoader(
        data=data,
        sets=sets,
        ids=ids,
        image_size=image_size,
        tokenize=tokenize,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        quarantine=quarantine,
    )


@dataclass
class TrainLoader:
    """One rank's batches, epoch by epoch; ``steps_per_epoch`` is the same on every rank, ``bad`` counts what was left
    out.
    """

    data: DataConfig
    sets: list[DataSet]
    ids: dict[str, str]
    image_size: int
    tokenize: Tokenize
    batch_size: int
    rank: int
    world_size: int
    seed: int
    quarantine: Path | None
    bad: BadCounts = field(default_factory=BadCounts)

    def __post_init__(self) -> None:
        self.quarantine_log = Quarantine(self.quarantine)
        self.layout = ReaderLayout(self.world_size, max(1, self.data.num_workers), self.batch_size)
        self.heartbeats = Heartbeats(self.layout.workers)
        proportions = self.data.proportions if self.data.mixture else {}
        self.mixture = Mixture({of.name: of.size for of in self.sets}, proportions)
        self.steps_per_epoch = self.mixture.total // self.layout.global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch_size: {self.layout.global_batch} images per step, but "
                f"{len(self.shards)} shards have {self.mixture.total} samples; lower train.global_batch_size, "
                "or give more data"
            )

    @property
    def shards(self) -> list[str]:
        """The shards of all sets."""
        return [shard for of in self.sets for shard in of.shards]

    @property
    def counts(self) -> list[int]:
        """Samples in each of ``shards``."""
        return [count for of in self.sets for count in of.counts]

    @property
    def fingerprint(self) -> str:
        """Tells data sets apart: the sets' names, the shards' names and sample counts, wherever they lie."""
        entries = [
            (*([of.name] if of.name else []), file_name(shard), count)
            for of in self.sets
            for shard, count in zip(of.shards, of.counts, strict=True)
        ]
        digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
        sizes = ", ".join(f"{of.name} {of.size}" for of in self.sets if of.name)
        return f"{len(entries)} shards, {self.mixture.total} samples{sizes and f' ({sizes})'}, {digest}"

    def drawn(self, epoch: int, steps: int) -> dict[str, dict[str, float]]:
        """Draws of each set, and how often that is the whole set, after ``steps`` steps of ``epoch``; {} without a
        mixture.
        """
        batch = self.layout.global_batch
        return self.mixture.passes(epoch, self.steps_per_epoch * batch, steps * batch) if self.data.mixture else {}

    def after(self, steps: int) -> list[ReaderLayout]:
        """What ``epoch`` takes to go on after ``steps`` steps of these readers."""
        return [replace(self.layout, steps=steps)]

    def epoch(self, epoch: int, past: Sequence[ReaderLayout] = ()) -> Generator[dict[str, Any], None, None]:
        """The batches that ``past`` left of an epoch: with the same readers exactly those an uninterrupted epoch gives
        from there, with others the samples nobody has read yet (as many as bad samples were met on the way may come
        twice).

        The workers start with this call, in this thread: only the main one hears at once that one of them was killed.
        The batches may be taken by another.
        """
        steps_before = past[-1].steps if past and past[-1].same_readers(self.layout) else 0
        steps, plans = plan_epoch(self.mixture, epoch, past[:-1] if steps_before else past, self.layout)
        own = plans[self.rank * self.layout.workers :][: self.layout.workers]
        make = _MakeReader(self, own, steps_before)
        dataset = ReaderDataset(make, self.layout.workers, steps_before % self.layout.workers, self.heartbeats)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.data.num_workers,
            # It draws a seed for its workers, which need none: from the global generator a resumed run would draw once
            # more than an uninterrupted one, and drop other patches.
            generator=torch.Generator(),
            worker_init_fn=partial(start_worker, beats=self.heartbeats),
            pin_memory=self.data.pin_memory and torch.cuda.is_available(),
            prefetch_factor=4 if self.data.num_workers else None,
            timeout=min(_LOOK_EVERY, self.data.stall_seconds or _LOOK_EVERY) if self.data.num_workers else 0,
        )
        self.heartbeats.leaving.value = 0
        return self._batches(iter(loader), steps - steps_before)

    def _batches(self, batches: Iterator[dict[str, Any]], count: int) -> Generator[dict[str, Any], None, None]:
        try:
            for _ in range(count):
                batch = self._next(batches)
                if batch is None:
                    return
                self._account(batch.pop("seen"), batch.pop("bad"))
                yield batch
        finally:
            self.heartbeats.leaving.value = 1

    def leave(self) -> None:
        """No further batch is wanted: who waits for one, in whatever thread, returns within seconds."""
        self.heartbeats.leaving.value = 1

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next batch; None after ``leave``."""
        began = time.monotonic()
        while True:
            try:
                batch = next(batches)
                break
            except RuntimeError as error:  # the DataLoader's: nothing for _LOOK_EVERY seconds, or a worker was killed
                seconds = time.monotonic() - began
                if "timed out" not in str(error):
                    raise worker_error(error) from error
                if self.heartbeats.leaving.value:
                    return None
                if self.data.stall_seconds and seconds >= self.data.stall_seconds:
                    silent = self.heartbeats.silent(self.data.stall_seconds / 2) or [
                        "no worker says which shard it reads"
                    ]
                    raise RunError(
                        f"data.stall_seconds: no batch for {self.data.stall_seconds} s: {'; '.join(silent)}. "
                        "Look at that file and its storage; "
                        "give the same command again to go on from the newest checkpoint"
                    ) from error
            except (OSError, EOFError) as error:  # a worker ended while its batch was on the way
                raise worker_error(
                    f"DataLoader worker is gone in the middle of a batch ({type(error).__name__})"
                ) from error
        if "error" in batch:
            raise RunError(batch["error"])
        return batch

    def _account(self, seen: int, bad: list[dict[str, Any]]) -> None:
        self.bad.seen += seen
        for entry in bad:
            self.bad.add(entry)
            logger.warning("left out: %s: %s: %s (%s)", entry["path"], entry["key"], entry["reason"], entry["detail"])
        self.quarantine_log.add(bad)
        if self.bad.seen >= _JUDGED_AFTER and self.bad.total > self.data.max_bad_fraction * self.bad.seen:
            raise RunError(
                f"data.max_bad_fraction: {self.bad.total} of {self.bad.seen} samples could not be used (limit "
                f"{self.data.max_bad_fraction:.0%}): {self.bad}. Look at them with `dreamlip-train prepare validate`, "
                "or raise the limit"
            )


def is_worker_error(error: BaseException) -> bool:
    """Whether torch raised it because a loader worker died; its signal handler does so wherever the process happens to
    be.
    """
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def worker_error(error: BaseException | str) -> RunError:
    """The same with what to do about it."""
    reason = str(error).splitlines()[0].rstrip(". ")
    return RunError(
        f"data.num_workers: {reason}. If the system ran out of memory, lower data.num_workers or data.shuffle_buffer"
    )


class _MakeReader:
    """Builds a worker's reader inside the worker."""

    def __init__(self, loader: TrainLoader, plans: list[ReaderPlan], steps_before: int) -> None:
        self.loader, self.plans, self.steps_before = loader, plans, steps_before
        self.known_bad = read_quarantine(loader.quarantine, loader.ids)

    def __call__(self, worker: int, beat: Callable[[str], None]) -> tuple[Reader, int]:
        loader, plan = self.loader, self.plans[worker]
        done = batches_of_worker(self.steps_before, worker, len(self.plans))
        context = ReadingContext(
            loader.data, loader.image_size, loader.seed, self.known_bad, loader.ids, beat, alone=len(loader.sets) == 1
        )
        streams = [
            SampleStream(of, pieces, skip, max(1, int(loader.data.shuffle_buffer * share)), context)
            for of, pieces, skip, share in zip(
                loader.sets, plan.pieces, plan.batches[:done].sum(axis=0).tolist(), loader.mixture.shares, strict=True
            )
        ]
        rest = plan.batches[done:].tolist()
        return Reader(streams, rest, loader.data.num_sub_captions, loader.tokenize), len(rest)
