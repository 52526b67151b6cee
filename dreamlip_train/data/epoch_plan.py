"""Who reads which samples of an epoch, and where a resumed run picks it up: every sample once, whatever the number of
ranks and loader workers, also when that number changes in mid-epoch.

    a set's part of the epoch, shards permuted:   0 ....................................... total
    dealt in stretches to readers:    | rank 0 worker 0 | rank 0 worker 1 | rank 1 worker 0 | .. | remainder |

A reader's stretch of each set is what its batches will take of that set (mixture.py). Pure arithmetic: an epoch's plan
follows from the sets' sizes and the layouts that have read it so far; a resumed run remembers nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dreamlip_train.data.mixture import Mixture


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
    """``take`` samples, after the first ``skip``, of the shuffled samples ``start`` to ``stop`` of a set's pass
    ``set_epoch``.
    """

    start: int
    stop: int
    skip: int
    take: int
    set_epoch: int = 0


@dataclass(frozen=True)
class ReaderPlan:
    """What one reader reads: ``pieces`` of each set, and [batches, sets] samples that each of its batches takes."""

    pieces: list[list[SampleRange]]
    batches: np.ndarray


def plan_epoch(
    mixture: Mixture, epoch: int, past: Sequence[ReaderLayout], now: ReaderLayout
) -> tuple[int, list[ReaderPlan]]:
    """How ``now`` reads what the ``past`` layouts left of an epoch.

    Returns:
        (steps, plans): the steps that are left, and the plan of each reader, reader ``rank * workers + worker``.
        What fills no step is nobody's.
    """
    rests = [
        _passes(epoch * part, (epoch + 1) * part, size)
        for part, size in zip(mixture.drawn(mixture.total).tolist(), mixture.sizes, strict=True)
    ]
    begin = 0
    for layout in past:
        takes = _takes(mixture, begin, layout)
        begin += layout.steps * layout.global_batch
        for number, rest in enumerate(rests):
            *streams, nobodys = _deal(rest, [int(take[:, number].sum()) for take in takes])
            for reader, pieces in enumerate(streams):
                batches = batches_of_worker(layout.steps, reader % layout.workers, layout.workers)
                streams[reader] = _after(pieces, int(takes[reader][:batches, number].sum()))
            rests[number] = [piece for pieces in (*streams, nobodys) for piece in pieces]
    takes = _takes(mixture, begin, now)
    dealt = [_deal(rest, [int(take[:, number].sum()) for take in takes])[:-1] for number, rest in enumerate(rests)]
    steps = (mixture.total - begin) // now.global_batch
    return steps, [ReaderPlan([of_set[reader] for of_set in dealt], take) for reader, take in enumerate(takes)]


def batches_of_worker(steps: int, worker: int, workers: int) -> int:
    """Batches that one worker gives in ``steps`` steps: workers take turns."""
    return len(range(worker, steps, workers))


def _passes(start: int, stop: int, size: int) -> list[SampleRange]:
    """Samples ``start`` to ``stop`` of a set of ``size`` read over and over, cut where a pass over it ends."""
    pieces = []
    while start < stop:
        number, first = divmod(start, size)
        last = min(first + stop - start, size)
        pieces.append(SampleRange(first, last, 0, last - first, number))
        start += last - first
    return pieces


def _takes(mixture: Mixture, begin: int, layout: ReaderLayout) -> list[np.ndarray]:
    """[batches, sets] samples that each reader's batches take to the end of the epoch, after its first ``begin``
    samples: a step's samples are those of rank 0, then those of rank 1, ..
    """
    steps = (mixture.total - begin) // layout.global_batch
    edges = mixture.drawn(begin + layout.batch_size * np.arange(steps * layout.ranks + 1))
    by_rank = np.diff(edges, axis=0).reshape(steps, layout.ranks, len(mixture.sizes))
    return [by_rank[worker :: layout.workers, rank] for rank in range(layout.ranks) for worker in range(layout.workers)]


def _deal(pieces: list[SampleRange], shares: list[int]) -> list[list[SampleRange]]:
    """The pieces, one after another, cut into parts of ``shares`` samples, and at last what is left over. A piece that
    nobody has begun is cut before it is shuffled, another one after it.
    """
    queue = deque(pieces)
    dealt: list[list[SampleRange]] = []
    for share in shares:
        own = []
        while share:
            piece = queue.popleft()
            take = min(share, piece.take)
            share -= take
            is_whole = piece.skip == 0 and piece.take == piece.stop - piece.start
            middle = piece.start + take if is_whole else piece.stop
            own.append(SampleRange(piece.start, middle, piece.skip, take, piece.set_epoch))
            if take < piece.take:
                start, skip = (middle, 0) if is_whole else (piece.start, piece.skip + take)
                queue.appendleft(SampleRange(start, piece.stop, skip, piece.take - take, piece.set_epoch))
        dealt.append(own)
    return [*dealt, list(queue)]


def _after(pieces: list[SampleRange], read: int) -> list[SampleRange]:
    """What a reader has left of its pieces after ``read`` samples."""
    left, position = [], 0
    for piece in pieces:
        done = min(max(read - position, 0), piece.take)
        position += piece.take
        if done < piece.take:
            left.append(SampleRange(piece.start, piece.stop, piece.skip + done, piece.take - done, piece.set_epoch))
    return left
