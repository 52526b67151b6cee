"""The loader's worker side: a reader goes through its pieces of an epoch, decodes, crops and draws,
and gives whole batches.

    shards -> the samples of its pieces -> shuffle buffer -> skip to the resume point -> decode, draw, crop -> batch

Everything random is a pure function of the seed, the epoch, the stretch and the sample's key, so a resumed epoch
is bit-exact.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.epoch_plan import SampleRange
from dreamlip_train.data.quarantine import BadCounts
from dreamlip_train.data.samples import BadSample, prepare_sample
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard

Tokenize = Callable[[list[str]], tuple[Tensor, int]]
"""B texts -> their tokens int64 [B, L], and how many were too long and lost their ends."""
Prepared = tuple[str, Tensor, list[str], int]
"""What ``samples.prepare_sample`` gives."""
_NAME_BYTES = 400


class NoUsableSampleError(Exception):
    """A stretch in which every sample is bad; the message names them."""


class Heartbeats:
    """Shared memory in which each worker says which shard it reads and when it last got a sample."""

    def __init__(self, workers: int) -> None:
        self.names = [multiprocessing.Array("c", _NAME_BYTES, lock=False) for _ in range(workers)]
        self.times = multiprocessing.Array("d", workers, lock=False)  # 0: it waits to be asked for a batch
        self.leaving = multiprocessing.Value("b", 0, lock=False)  # 1: the training process ends its workers

    def beat(self, worker: int, shard: str) -> None:
        """``worker`` reads ``shard`` and got a sample of it now."""
        self.names[worker].value = shard.encode()[-_NAME_BYTES + 1 :]
        self.times[worker] = time.time()

    def rest(self, worker: int) -> None:
        """``worker`` has nothing to do."""
        self.times[worker] = 0.0

    def silent(self, seconds: float) -> list[str]:
        """What each worker does that has been without a sample for so long."""
        now = time.time()
        return [
            f"worker {worker} has read nothing from {self.names[worker].value.decode(errors='replace')} for "
            f"{now - last:.0f} s"
            for worker, last in enumerate(self.times)
            if last and now - last >= seconds
        ]


class EpochOrder:
    """The samples of an epoch: the shards permuted, one after another."""

    def __init__(self, shards: list[str], counts: list[int], seed: int, epoch: int) -> None:
        order = list(range(len(shards)))
        random.Random(f"shards-{seed}-{epoch}").shuffle(order)
        self.shards = [shards[i] for i in order]
        self.starts = [0, *accumulate(counts[i] for i in order)]

    def stretch(self, start: int, stop: int) -> Iterator[tuple[str, int, int, bool]]:
        """(shard, first, last, whether last is its end) for each shard that samples ``start`` to ``stop`` lie in."""
        i = bisect_right(self.starts, start) - 1
        while i < len(self.shards) and self.starts[i] < stop:
            begin, end = self.starts[i], self.starts[i + 1]
            if end > begin:
                yield self.shards[i], max(start - begin, 0), min(stop, end) - begin, stop >= end
            i += 1


class Reader:
    """The batches of one reader's pieces, in an order that depends on nothing but seed, epoch and the pieces."""

    def __init__(
        self,
        order: EpochOrder,
        pieces: list[SampleRange],
        skip: int,
        *,
        data: DataConfig,
        image_size: int,
        tokenize: Tokenize,
        batch_size: int,
        salt: str,
        known_bad: set[tuple[str, str]],
        ids: Mapping[str, str],
        beat: Callable[[str], None],
    ) -> None:
        self.order, self.data, self.image_size, self.tokenize = order, data, image_size, tokenize
        self.batch_size, self.salt, self.known_bad, self.beat = batch_size, salt, known_bad, beat
        self.ids = ids
        self.bad: list[dict[str, Any]] = []
        self.seen = 0
        self.samples = self._samples(pieces, skip)

    def batch(self) -> dict[str, Any]:
        """The next batch."""
        chosen = [next(self.samples) for _ in range(self.batch_size)]
        k = self.data.num_sub_captions
        captions = [caption for _, (_, _, drawn, _) in chosen for caption in drawn + [""] * (k - len(drawn))]
        tokens, cut = self.tokenize(captions)
        batch = {
            # Channels last, as decoded: a transposition for each picture would cost a third of what cropping it does.
            # default_collate writes them to shared memory at once.
            "images": default_collate([image.permute(1, 2, 0) for _, (_, image, _, _) in chosen]).permute(0, 3, 1, 2),
            "text": tokens.view(len(chosen), k, -1),
            "text_mask": torch.tensor([[slot < len(drawn) for slot in range(k)] for _, (_, _, drawn, _) in chosen]),
            "keys": [key for _, (key, _, _, _) in chosen],
            "shards": [shard for shard, _ in chosen],
            "cut": cut + sum(too_long for _, (_, _, _, too_long) in chosen),
            "seen": self.seen,
            "bad": self.bad,
        }
        self.seen, self.bad = 0, []
        return batch

    def _samples(self, pieces: list[SampleRange], skip: int) -> Iterator[tuple[str, Prepared]]:
        for piece in pieces:
            passed = min(skip, piece.take)
            skip -= passed
            yield from self._piece(piece, piece.skip + passed, piece.take - passed)

    def _piece(self, piece: SampleRange, skip: int, take: int) -> Iterator[tuple[str, Prepared]]:
        """``take`` usable samples of a stretch after the first ``skip``, which are not decoded.
        A stretch cut short by bad samples begins again.
        """
        rng = random.Random(f"samples-{self.salt}-{piece.start}-{piece.stop}")
        while take > 0:
            usable = 0
            for shard, sample in shuffled(self._raw(piece), self.data.shuffle_buffer, rng):
                if (self.ids[shard], sample["key"]) in self.known_bad:
                    continue
                if skip > 0:
                    skip -= 1
                    usable += 1
                    continue
                self.seen += 1
                try:
                    prepared = prepare_sample(sample, self.data, self.image_size, self.salt)
                except BadSample as error:
                    self._note(shard, sample["key"], *error.args)
                    continue
                usable += 1
                take -= 1
                yield shard, prepared
                if take == 0:
                    return
            if usable == 0:
                found = BadCounts()
                for entry in self.bad:
                    found.add(entry)
                names = [shard for shard, *_ in self.order.stretch(piece.start, piece.stop)]
                raise NoUsableSampleError(
                    f"data.shards: no usable sample in {', '.join(names)} (a reader's part): "
                    f"{found if self.bad else 'all are in the quarantine file'}"
                )

    def _raw(self, piece: SampleRange) -> Iterator[tuple[str, dict[str, Any]]]:
        """The stretch's samples as bytes. Those without an image are in no index; they go with the ones before them."""
        for shard, first, last, to_end in self.order.stretch(piece.start, piece.stop):
            self.beat(shard)
            position, given, surplus = 0, 0, 0
            try:
                for sample in read_shard(shard, self.data.max_member_mb * 2**20):
                    self.beat(shard)
                    indexed = image_of(sample) is not None
                    if position >= last and indexed:
                        surplus = 1
                        break
                    if position >= last and not to_end:
                        break
                    if position >= first:
                        given += indexed
                        yield shard, sample
                    position += indexed
            except ShardError as error:
                self._note(shard, f"after {position} samples", "shard could not be read to its end", str(error))
            # Garbage between two members ends a tar without any error.
            if given < last - first:
                self._note(
                    shard,
                    "",
                    "missing from its shard",
                    f"{last - first - given} of {last} listed samples",
                    last - first - given,
                )
            if surplus and to_end:
                self._note(
                    shard,
                    "",
                    "more samples than its index lists",
                    f"over {last}; index it again with `dreamlip-train prepare validate`",
                )

    def _note(self, shard: str, key: str, reason: str, detail: str, count: int = 1) -> None:
        identity = (self.ids[shard], key)
        if identity not in self.known_bad:
            self.known_bad.add(identity)
            self.bad.append(
                {"shard": identity[0], "path": shard, "key": key, "reason": reason, "detail": detail, "count": count}
            )


def shuffled(items: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
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


class ReaderDataset(IterableDataset):
    """What a DataLoader runs in its workers: worker i makes the batches of reader (first + i) mod workers,
    for DataLoader begins at its worker 0.

    ``make(worker, beat)`` gives a reader and how many batches it has left. An error in what the user gave travels as an
    item {"error": message}.
    """

    def __init__(
        self,
        make: Callable[[int, Callable[[str], None]], tuple[Reader, int]],
        workers: int,
        first: int,
        beats: Heartbeats,
    ) -> None:
        self.make, self.workers, self.first, self.beats = make, workers, first, beats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        process = info.id if info else 0
        reader, batches = self.make(
            (self.first + process) % self.workers, lambda shard: self.beats.beat(process, shard)
        )
        for _ in range(batches):
            try:
                batch = reader.batch()
            except NoUsableSampleError as error:
                batch = {"error": str(error)}
            self.beats.rest(process)
            yield batch


def start_worker(worker: int, beats: Heartbeats) -> None:
    """A signal to the process group is for the training process: it finishes its step, saves, and ends its workers.

    Its SIGTERM is the end then, also of a worker that sits in a read for ever, which the training process would
    otherwise wait for when it exits.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if beats.leaving.value:
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    torch.set_num_threads(1)
