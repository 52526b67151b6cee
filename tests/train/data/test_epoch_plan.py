"""The arithmetic of who reads what, over many random changes of readers."""

import random

import pytest

from dreamlip_train.data.epoch_plan import ReaderLayout, SampleRange, batches_of_worker, plan_epoch


def samples(piece: SampleRange) -> list[int]:
    """Stands for the shuffled order of a stretch: any fixed order that depends on start and stop alone."""
    order = list(range(piece.start, piece.stop))
    random.Random(f"{piece.start}-{piece.stop}").shuffle(order)
    return order[piece.skip : piece.skip + piece.take]


def read(total: int, past: list[ReaderLayout], now: ReaderLayout, steps: int) -> list[int]:
    """What the readers of ``now`` read in ``steps`` steps."""
    _, streams = plan_epoch(total, past, now)
    found = []
    for reader, pieces in enumerate(streams):
        stream = [sample for piece in pieces for sample in samples(piece)]
        found += stream[: batches_of_worker(steps, reader % now.workers, now.workers) * now.batch_size]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_every_sample_once_over_any_changes_of_readers(seed):
    rng = random.Random(seed)
    total = rng.randrange(24, 700)
    past, found = [], []
    for _ in range(rng.randrange(1, 5)):
        ranks = rng.choice([1, 2, 3, 4, 6])
        now = ReaderLayout(ranks, rng.randrange(1, 4), 12 // ranks)
        steps_left, _ = plan_epoch(total, past, now)
        steps = rng.randrange(0, steps_left + 1)
        found += read(total, past, now, steps)
        past.append(ReaderLayout(now.ranks, now.workers, now.batch_size, steps))
    steps_left, _ = plan_epoch(total, past, ReaderLayout(2, 2, 6))
    assert sum(layout.steps for layout in past) + steps_left == total // 12
    found += read(total, past, ReaderLayout(2, 2, 6), steps_left)
    assert len(found) == len(set(found)) == total // 12 * 12 and set(found) <= set(range(total))


def test_readers_get_equal_shares():
    steps, streams = plan_epoch(1000, [], ReaderLayout(2, 3, 7))
    assert steps == 71
    assert [sum(piece.take for piece in pieces) // 7 for pieces in streams] == [24, 24, 23] * 2
