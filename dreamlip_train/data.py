"""Shards in, batches out: K drawn sub-captions, a mask and a cropped image for each sample.

    shards, permuted by (seed, epoch) -> dealt to ranks x workers -> shuffle buffer -> skip to the resume point -> decode, draw, crop
       -> {"images" uint8 [n,3,H,W], "text" int64 [n,K,L], "text_mask" bool [n,K], "keys"}

Everything random is a pure function of the seed, the epoch and the sample's key or stream, so a resumed epoch repeats to the bit.
"""

from __future__ import annotations

import json
import logging
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dreamlip_train.config import DataConfig
from dreamlip_train.samples import BadSample, prepare_sample, val_sample
from dreamlip_train.shards import ShardError, image_of, list_shards, read_shard, sample_counts

logger = logging.getLogger("dreamlip_train")
Tokenize = Callable[[list[str]], Tensor]

_JUDGED_AFTER = 200  # samples seen before data.max_bad_fraction can stop a run: a first bad sample is no rate


@dataclass
class BadCounts:
    """Samples left out so far: ``counts`` by reason, and the first few of each as "shard: key (detail)"."""

    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Samples left out for any reason."""
        return sum(self.counts.values())

    def add(self, entry: dict[str, Any]) -> None:
        """Count one entry of a worker."""
        self.counts[entry["reason"]] += entry.get("count", 1)
        examples = self.examples.setdefault(entry["reason"], [])
        if len(examples) < 5:
            examples.append(f"{entry['shard']}: {entry['key']} ({entry['detail']})")

    def __str__(self) -> str:
        return "; ".join(f"{count} x {reason}, such as {self.examples[reason][0]}" for reason, count in self.counts.most_common())


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
        tokenize: list of B strings -> int64 [B, L].
        batch_size: images a batch.
        quarantine: a jsonl file in which every sample left out is noted; a resumed epoch needs it to skip exactly.

    Raises:
        ValueError: no shard matches, or there are too few shards or samples for this many ranks (the field is named).
    """
    shards = list_shards(data.shards, allow_pipe=data.allow_pipe)
    if len(shards) < world_size:
        raise ValueError(
            f"data.shards: {len(shards)} shards for {world_size} ranks; write smaller shards (--shard-size), or use fewer ranks"
        )
    return TrainLoader(
        data=data, shards=shards, counts=sample_counts(shards), image_size=image_size, tokenize=tokenize, batch_size=batch_size,
        rank=rank, world_size=world_size, seed=seed, quarantine=None if quarantine is None else Path(quarantine),
    )  # fmt: skip


@dataclass
class TrainLoader:
    """One rank's batches, epoch by epoch; ``steps_per_epoch`` is the same on every rank, ``bad`` counts what was left out."""

    data: DataConfig
    shards: list[str]
    counts: list[int]
    image_size: int
    tokenize: Tokenize
    batch_size: int
    rank: int
    world_size: int
    seed: int
    quarantine: Path | None
    bad: BadCounts = field(default_factory=BadCounts)

    def __post_init__(self) -> None:
        # More workers than shards would leave some with nothing to read.
        self.workers = min(self.data.workers, len(self.shards) // self.world_size)
        self.streams = self.world_size * max(1, self.workers)
        self.steps_per_epoch = min(sum(self._full_batches(epoch, rank)) for epoch in range(8) for rank in range(self.world_size))
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"engine.batch_size: no rank and worker has {self.batch_size} samples ({sum(self.counts)} in {len(self.shards)} shards, "
                f"{self.world_size} ranks, {max(1, self.workers)} workers); lower engine.batch_size or data.workers, or give more data"
            )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of an epoch from its ``start_step``-th on: exactly those an uninterrupted epoch gives from there."""
        consumed, first = self._consumed(epoch, start_step)
        known_bad = _read_quarantine(self.quarantine)
        dataset = _Streams(self, epoch, consumed, first, known_bad)
        batches = DataLoader(
            dataset, batch_size=None, num_workers=self.workers, worker_init_fn=_worker_init,
            pin_memory=torch.cuda.is_available(), prefetch_factor=4 if self.workers else None,
        )  # fmt: skip
        for _, batch in zip(range(start_step, self.steps_per_epoch), batches, strict=False):
            self._account(batch.pop("seen"), batch.pop("bad"))
            yield batch

    def _account(self, seen: int, bad: list[dict[str, Any]]) -> None:
        self.bad.seen += seen
        for entry in bad:
            self.bad.add(entry)
            logger.warning("left out: %s: %s: %s (%s)", entry["shard"], entry["key"], entry["reason"], entry["detail"])
        if bad and self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in bad)
        if self.bad.seen >= _JUDGED_AFTER and self.bad.total > self.data.max_bad_fraction * self.bad.seen:
            raise RuntimeError(
                f"data.max_bad_fraction: {self.bad.total} of {self.bad.seen} samples could not be used (limit "
                f"{self.data.max_bad_fraction:.0%}): {self.bad}. Look at them with `dreamlip-train prepare validate`, or raise the limit"
            )

    def stream_shards(self, epoch: int, stream: int) -> list[str]:
        """The shards of one of the ranks x workers streams in an epoch: all shards permuted, then dealt out."""
        return [self.shards[i] for i in self._dealt(epoch, stream)]

    def _dealt(self, epoch: int, stream: int) -> list[int]:
        order = list(range(len(self.shards)))
        random.Random(f"shards-{self.seed}-{epoch}").shuffle(order)
        return order[stream :: self.streams]

    def _full_batches(self, epoch: int, rank: int) -> list[int]:
        """Full batches in each of a rank's streams."""
        streams = (rank + self.world_size * worker for worker in range(max(1, self.workers)))
        return [sum(self.counts[i] for i in self._dealt(epoch, stream)) // self.batch_size for stream in streams]

    def _batches(self, epoch: int) -> list[int]:
        """Batches each of this rank's workers gives. Where shards of unequal size leave a rank short of ``steps_per_epoch``, its first
        stream begins again: a rank that stopped early would hang the others."""
        batches = self._full_batches(epoch, self.rank)
        batches[0] += max(0, self.steps_per_epoch - sum(batches))
        return batches

    def _consumed(self, epoch: int, steps: int) -> tuple[list[int], int]:
        """Batches each worker has given after ``steps`` steps, and whose turn is next: workers take turns until they have nothing left."""
        left = self._batches(epoch)
        consumed, turn = [0] * len(left), 0
        for _ in range(steps):
            while left[turn] == 0:
                turn = (turn + 1) % len(left)
            left[turn] -= 1
            consumed[turn] += 1
            turn = (turn + 1) % len(left)
        return consumed, turn


class _Streams(IterableDataset):
    """The batches of one worker's stream. DataLoader begins at its worker 0, so logical workers are rotated to the one whose turn it is."""

    def __init__(self, loader: TrainLoader, epoch: int, consumed: list[int], first: int, known_bad: set[tuple[str, str]]):
        self.loader, self.epoch, self.consumed, self.first, self.known_bad = loader, epoch, consumed, first, known_bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        loader, workers = self.loader, len(self.consumed)
        worker = (self.first + (info.id if info else 0)) % workers
        total = loader._batches(self.epoch)[worker]
        stream = _Stream(loader, self.epoch, loader.rank + loader.world_size * worker, self.known_bad)
        for _ in range(self.consumed[worker], total):
            yield stream.batch(skip_first=self.consumed[worker] * loader.batch_size)


class _Stream:
    """Samples of a few shards, shuffled, in an order that depends on nothing but seed, epoch and stream."""

    def __init__(self, loader: TrainLoader, epoch: int, stream: int, known_bad: set[tuple[str, str]]):
        self.loader, self.epoch, self.known_bad = loader, epoch, known_bad
        self.shards = loader.stream_shards(epoch, stream)
        self.expected = dict(zip(loader.shards, loader.counts, strict=True))
        self.rng = random.Random(f"samples-{loader.seed}-{epoch}-{stream}")
        self.bad: list[dict[str, Any]] = []
        self.seen = 0
        self.skipping = -1
        self.samples = self._samples()

    def batch(self, skip_first: int) -> dict[str, Any]:
        """The next batch; the first call leaves out ``skip_first`` usable samples without decoding them."""
        if self.skipping < 0:
            self.skipping = skip_first
        loader = self.loader
        chosen = [next(self.samples) for _ in range(loader.batch_size)]
        k = loader.data.num_sub_captions
        captions = [caption for _, _, drawn in chosen for caption in drawn + [""] * (k - len(drawn))]
        tokens = loader.tokenize(captions)
        batch = {
            "images": torch.stack([image for _, image, _ in chosen]),
            "text": tokens.view(len(chosen), k, -1).long(),
            "text_mask": torch.tensor([[slot < len(drawn) for slot in range(k)] for _, _, drawn in chosen]),
            "keys": [key for key, _, _ in chosen],
            "seen": self.seen,
            "bad": self.bad,
        }
        self.seen, self.bad = 0, []
        return batch

    def _samples(self) -> Iterator[tuple[str, Tensor, list[str]]]:
        """Usable samples (key, image, drawn sub-captions), over and over: a stream cut short by bad samples begins again."""
        while True:
            usable = 0
            for shard, sample in _shuffled(self._raw(), self.loader.data.shuffle_buffer, self.rng):
                if (shard, sample["key"]) in self.known_bad:
                    continue
                if self.skipping > 0:
                    self.skipping -= 1
                    usable += 1
                    continue
                self.seen += 1
                try:
                    prepared = prepare_sample(sample, self.loader.data, self.loader.image_size, f"{self.loader.seed}-{self.epoch}")
                except BadSample as error:
                    self._note(shard, sample["key"], *error.args)
                    continue
                usable += 1
                yield prepared
            if usable == 0:
                worst = BadCounts()
                for entry in self.bad:
                    worst.add(entry)
                raise RuntimeError(
                    f"data.shards: no usable sample in {', '.join(self.shards)}: {worst or 'all are in the quarantine file'}"
                )

    def _raw(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for shard in self.shards:
            found = 0
            try:
                for sample in read_shard(shard):
                    found += image_of(sample) is not None
                    yield shard, sample
            except ShardError as error:
                self._note(shard, f"after {found} samples", "shard could not be read to its end", str(error))
            # Garbage between two members ends a tar without any error.
            if found < self.expected[shard] and (shard, "") not in self.known_bad:
                missing = self.expected[shard] - found
                self._note(shard, "", "missing from its shard", f"{missing} of {self.expected[shard]} listed samples", missing)

    def _note(self, shard: str, key: str, reason: str, detail: str, count: int = 1) -> None:
        if (shard, key) not in self.known_bad:
            self.known_bad.add((shard, key))
            self.bad.append({"shard": shard, "key": key, "reason": reason, "detail": detail, "count": count})


def _shuffled(items: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
    """Each item leaves a buffer of ``size`` at random, once the buffer is full or the items are over."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = rng.randrange(size)
        buffer[place], item = item, buffer[place]
        yield item
    rng.shuffle(buffer)
    yield from buffer


def val_samples(data: DataConfig, *, image_size: int, max_samples: int = 0) -> Iterator[dict[str, Any]]:
    """Held-out samples in file order, for evaluation.

    Yields:
        {"key": str, "image": uint8 [3, S, S], "sentences": the sub-captions of data.eval_source or, where it is missing, of the first long
        caption the sample has, "raw": str or None, "mask": uint8 [S, S] label map of the same geometry, or None}

    Raises:
        ValueError: data.val_shards is empty or matches nothing.
    """
    bad = BadCounts()
    given = 0
    for shard in list_shards(data.val_shards, allow_pipe=data.allow_pipe, field="data.val_shards"):
        for sample in _held_out(shard, bad):
            if max_samples and given >= max_samples:
                break
            try:
                yield val_sample(sample, data, image_size)
                given += 1
            except BadSample as error:
                bad.add({"shard": shard, "key": sample["key"], "reason": error.args[0], "detail": error.args[1]})
    if bad.total:
        logger.warning("held-out samples left out: %s", bad)


def _held_out(shard: str, bad: BadCounts) -> Iterator[dict[str, Any]]:
    try:
        yield from read_shard(shard)
    except ShardError as error:
        bad.add({"shard": shard, "key": "", "reason": "shard could not be read to its end", "detail": str(error)})


def _read_quarantine(path: Path | None) -> set[tuple[str, str]]:
    if path is None or not path.exists():
        return set()
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {(entry["shard"], entry["key"]) for entry in entries}


def _worker_init(worker: int) -> None:
    # A signal to the process group is for the training process: it finishes its step, saves, and ends its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
