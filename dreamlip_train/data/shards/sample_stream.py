"""One reader's samples of one data set, decoded, cropped and with their captions drawn.

    shards -> the samples of its pieces -> shuffle buffer -> skip to the resume point -> decode, draw, crop

Everything random is a pure function of the seed, the pass over the set, the stretch and the sample's key, so a resumed
epoch is bit-exact.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.data_sets import DataSet
from dreamlip_train.data.epoch_plan import SampleRange
from dreamlip_train.data.quarantine import BadCounts
from dreamlip_train.data.samples import BadSample, TrainingSample, prepare_sample
from dreamlip_train.data.shards.shards import ShardError, image_of, read_shard


class NoUsableSampleError(Exception):
    """A stretch in which every sample is bad; the message names them."""


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


@dataclass(frozen=True)
class ReadingContext:
    """What the streams of a worker share: settings, the run's seed, (shard, key) of what is known to be bad, the name
    of each shard, whom to tell that a shard is read, and whether there is one set alone.
    """

    data: DataConfig
    image_size: int
    seed: int
    known_bad: set[tuple[str, str]]
    ids: Mapping[str, str]
    beat: Callable[[str], None]
    alone: bool


class SampleStream:
    """(shard, sample) for the pieces of a set one after another, the first ``skip`` passed over; ``seen`` and ``bad``
    count what was read since the last batch.
    """

    def __init__(self, of: DataSet, pieces: list[SampleRange], skip: int, buffer: int, context: ReadingContext) -> None:
        self.of, self.buffer, self.context = of, buffer, context
        self.orders: dict[int, EpochOrder] = {}
        self.bad: list[dict[str, Any]] = []
        self.seen = 0
        self.samples = self._samples(pieces, skip)

    def _samples(self, pieces: list[SampleRange], skip: int) -> Iterator[tuple[str, TrainingSample]]:
        for piece in pieces:
            done = min(skip, piece.take)
            skip -= done
            yield from self._piece(piece, piece.skip + done, piece.take - done)

    def _piece(self, piece: SampleRange, skip: int, take: int) -> Iterator[tuple[str, TrainingSample]]:
        """``take`` usable samples of a stretch after the first ``skip``, which are not decoded.
        A stretch cut short by bad samples begins again; one of a mixture without a usable sample, which may be a small
        end of a pass, gives way to the whole set.
        """
        context, salt = self.context, f"{self.context.seed}-{piece.set_epoch}"
        rng = random.Random(f"samples-{salt}-{piece.start}-{piece.stop}")
        start, stop = piece.start, piece.stop
        while take > 0:
            usable = 0
            for shard, sample in shuffled(self._raw(piece.set_epoch, start, stop), self.buffer, rng):
                if (context.ids[shard], sample["key"]) in context.known_bad:
                    continue
                if skip > 0:
                    skip -= 1
                    usable += 1
                    continue
                self.seen += 1
                try:
                    prepared = prepare_sample(sample, context.data, context.image_size, salt)
                except BadSample as error:
                    self._note(shard, sample["key"], *error.args)
                    continue
                usable += 1
                take -= 1
                yield shard, prepared
                if take == 0:
                    return
            if usable == 0 and (context.alone or (start, stop) == (0, self.of.size)):
                self._give_up(piece.set_epoch, start, stop)
            if usable == 0:
                start, stop = 0, self.of.size

    def _give_up(self, set_epoch: int, start: int, stop: int) -> NoReturn:
        counts = BadCounts()
        for entry in self.bad:
            counts.add(entry)
        names = [shard for shard, *_ in self._order(set_epoch).stretch(start, stop)]
        field = f"data.mixture: {self.of.name}" if self.of.name else "data.shards"
        raise NoUsableSampleError(
            f"{field}: no usable sample in {', '.join(names)} (a reader's part): "
            f"{counts if self.bad else 'all are in the quarantine file'}"
        )

    def _order(self, set_epoch: int) -> EpochOrder:
        if set_epoch not in self.orders:
            self.orders = {set_epoch: EpochOrder(self.of.shards, self.of.counts, self.context.seed, set_epoch)}
        return self.orders[set_epoch]

    def _raw(self, set_epoch: int, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The stretch's samples as bytes. Those without an image are in no index; they go with the ones before them."""
        for shard, first, last, to_end in self._order(set_epoch).stretch(start, stop):
            self.context.beat(shard)
            position, yielded, surplus = 0, 0, 0
            try:
                for sample in read_shard(shard, self.context.data.max_member_mb * 2**20):
                    self.context.beat(shard)
                    indexed = image_of(sample) is not None
                    if position >= last and indexed:
                        surplus = 1
                        break
                    if position >= last and not to_end:
                        break
                    if position >= first:
                        yielded += indexed
                        yield shard, sample
                    position += indexed
            except ShardError as error:
                self._note(shard, f"after {position} samples", "shard could not be read to its end", str(error))
            # Garbage between two members ends a tar without any error.
            if yielded < last - first:
                self._note(
                    shard,
                    "",
                    "missing from its shard",
                    f"{last - first - yielded} of {last} listed samples",
                    last - first - yielded,
                )
            if surplus and to_end:
                self._note(
                    shard,
                    "",
                    "more samples than its index lists",
                    f"over {last}; index it again with `dreamlip-train prepare validate`",
                )

    def _note(self, shard: str, key: str, reason: str, detail: str, count: int = 1) -> None:
        identity = (self.context.ids[shard], key)
        if identity not in self.context.known_bad:
            self.context.known_bad.add(identity)
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
