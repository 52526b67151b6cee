"""Who reads which samples of an epoch, and where a resumed run picks it up: every sample once, whatever the number of
ranks and loader workers, also when that number changes in mid-epoch.

    the epoch's samples, shards permuted:   0 ............................................. total
    dealt in equal stretches to readers:    | rank 0 worker 0 | rank 0 worker 1 | rank 1 worker 0 | .. | remainder |

Pure arithmetic: an epoch's plan follows from the number of its samples and the layouts that have read it so far;
a resumed run remembers nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReaderLayout:
    """``ranks`` x ``workers`` readers that take ``batch_size`` samples per rank and step, for ``steps`` steps of the
    epoch (or its rest).
    """

    ranks: int
    workers: int
    batch_size: int
    steps: int = 0

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.ranks * self.batch_size

    def same_readers(self, other: ReaderLayout) -> bool:
        """Whether both deal an epoch alike."""
        return (self.ranks, self.workers, self.batch_size) == (other.ranks, other.workers, other.batch_size)


@dataclass(frozen=True)
class SampleRange:
    """``take`` samples, after the first ``skip``, of the shuffled samples ``start`` to ``stop`` of the epoch."""

    start: int
    stop: int
    skip: int
    take: int


def batches_of_worker(steps: int, worker: int, workers: int) -> int:
    """Batches that one worker gives in ``steps`` steps: workers take turns."""
    return len(range(worker, steps, workers))


def plan_epoch(total: int, past: Sequence[ReaderLayout], now: ReaderLayout) -> tuple[int, list[list[SampleRange]]]:
    """How ``now`` reads what the ``past`` layouts left of an epoch of ``total`` samples.

    Returns:
        (steps, streams): the steps that are left, and the pieces of each reader, reader ``rank * workers + worker``.
        What fills no step is nobody's.
    """
    rest = [SampleRange(0, total, 0, total)]
    streams: list[list[SampleRange]] = []
    for layout in past:
        _, streams, rest = _deal(rest, layout)
        for reader, pieces in enumerate(streams):
            read = batches_of_worker(layout.steps, reader % layout.workers, layout.workers) * layout.batch_size
            streams[reader] = _after(pieces, read)
        rest = [piece for pieces in (*streams, rest) for piece in pieces]
    steps, streams, _ = _deal(rest, now)
    return steps, streams


def _deal(pieces: list[SampleRange], layout: ReaderLayout) -> tuple[int, list[list[SampleRange]], list[SampleRange]]:
    """(steps, the pieces of each reader, what is left over)."""
    total = sum(piece.take for piece in pieces)
    steps = total // layout.global_batch
    streams, begin = [], 0
    for _ in range(layout.ranks):
        for worker in range(layout.workers):
            end = begin + batches_of_worker(steps, worker, layout.workers) * layout.batch_size
            streams.append(_cut(pieces, begin, end))
            begin = end
    return steps, streams, _cut(pieces, begin, total)


def _cut(pieces: list[SampleRange], begin: int, end: int) -> list[SampleRange]:
    """Samples ``begin`` to ``end`` of the pieces one after another. A piece that nobody has begun is cut before it is
    shuffled, another one after it.
    """
    cut, position = [], 0
    for piece in pieces:
        first, last = max(begin - position, 0), min(end - position, piece.take)
        position += piece.take
        if first < last and piece.skip == 0 and piece.take == piece.stop - piece.start:
            cut.append(SampleRange(piece.start + first, piece.start + last, 0, last - first))
        elif first < last:
            cut.append(SampleRange(piece.start, piece.stop, piece.skip + first, last - first))
    return cut


def _after(pieces: list[SampleRange], read: int) -> list[SampleRange]:
    """What a reader has left of its pieces after ``read`` samples."""
    left, position = [], 0
    for piece in pieces:
        gone = min(max(read - position, 0), piece.take)
        position += piece.take
        if gone < piece.take:
            left.append(SampleRange(piece.start, piece.stop, piece.skip + gone, piece.take - gone))
    return left
