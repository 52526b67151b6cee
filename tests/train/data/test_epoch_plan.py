"""The arithmetic of who reads what, over many random changes of readers."""

import random
from itertools import chain

import pytest

from dreamlip_train.data.epoch_plan import ReaderLayout, SampleRange, batches_of_worker, plan_epoch
from dreamlip_train.data.mixture import Mixture
from dreamlip_train.jobs.user_error import UserError


def samples(piece: SampleRange) -> list[int]:
    """Stands for the shuffled order of a stretch: any fixed order that depends on start and stop alone."""
    order = list(range(piece.start, piece.stop))
    random.Random(f"{piece.start}-{piece.stop}").shuffle(order)
    return order[piece.skip : piece.skip + piece.take]


def samples_read(mixture: Mixture, epoch: int, past: list[ReaderLayout], now: ReaderLayout, steps: int):
    """(set, pass, sample) of what the readers of ``now`` read in ``steps`` steps, step by step."""
    _, plans = plan_epoch(mixture, epoch, past, now)
    by_step = [[] for _ in range(steps)]
    for reader, plan in enumerate(plans):
        streams = [
            [(name, piece.set_epoch, sample) for piece in pieces for sample in samples(piece)]
            for name, pieces in zip(mixture.names, plan.pieces, strict=True)
        ]
        worker = reader % now.workers
        for batch in range(batches_of_worker(steps, worker, now.workers)):
            for stream, take in zip(streams, plan.batches[batch].tolist(), strict=True):
                by_step[worker + batch * now.workers] += stream[:take]
                del stream[:take]
    return by_step


@pytest.mark.parametrize("seed", range(40))
def test_every_sample_once_over_any_changes_of_readers(seed):
    rng = random.Random(seed)
    mixture = Mixture({"": rng.randrange(24, 700)}, {})
    past, found = [], []
    for _ in range(rng.randrange(1, 5)):
        ranks = rng.choice([1, 2, 3, 4, 6])
        now = ReaderLayout(ranks, rng.randrange(1, 4), 12 // ranks)
        steps_left, _ = plan_epoch(mixture, 3, past, now)
        steps = rng.randrange(0, steps_left + 1)
        found += chain.from_iterable(samples_read(mixture, 3, past, now, steps))
        past.append(ReaderLayout(now.ranks, now.workers, now.batch_size, steps))
    steps_left, _ = plan_epoch(mixture, 3, past, ReaderLayout(2, 2, 6))
    assert sum(layout.steps for layout in past) + steps_left == mixture.total // 12
    found += chain.from_iterable(samples_read(mixture, 3, past, ReaderLayout(2, 2, 6), steps_left))
    assert len(found) == len(set(found)) == mixture.total // 12 * 12
    assert {sample for *_, sample in found} <= set(range(mixture.total)) and {epoch for _, epoch, _ in found} == {3}


@pytest.mark.parametrize("seed", range(20))
def test_a_mixture_keeps_its_proportions_and_reads_each_pass_once(seed):
    """Over changes of readers in mid-epoch and over epochs: what a step takes of each set does not depend on who reads,
    and no sample comes again before its set's pass is over.
    """
    rng = random.Random(seed)
    sizes = {"a": rng.randrange(5, 60), "b": rng.randrange(100, 300), "c": rng.randrange(20, 90)}
    mixture = Mixture(sizes, {} if seed % 3 == 0 else {"a": 5, "b": 1.5, "c": 2})
    steps_per_epoch, found = mixture.total // 12, []
    for epoch in range(3):
        past, left = [], steps_per_epoch
        while left:
            ranks = rng.choice([1, 2, 3, 4])
            steps = rng.randrange(1, left + 1)
            found += samples_read(
                mixture, epoch, past, now := ReaderLayout(ranks, rng.randrange(1, 4), 12 // ranks), steps
            )
            past.append(ReaderLayout(now.ranks, now.workers, now.batch_size, steps))
            left -= steps
    everything = [sample for step in found for sample in step]
    assert len(set(everything)) == len(everything) == 3 * steps_per_epoch * 12
    for number, (name, share) in enumerate(zip(mixture.names, mixture.shares, strict=True)):
        per_step = [sum(of == name for of, *_ in step) for step in found]
        assert all(abs(count - 12 * share) <= 2 for count in per_step)
        passes = [set_epoch for of, set_epoch, _ in everything if of == name]
        left_out = 12 * share + 2  # of each epoch, what fills no step
        assert all(passes.count(i) >= sizes[name] - 2 * left_out for i in range(max(passes)))
        assert mixture.drawn(steps_per_epoch * 12)[number] == sum(per_step[:steps_per_epoch])


def test_draws_and_passes_follow_from_the_position():
    mixture = Mixture({"big": 900, "small": 100}, {"big": 1, "small": 1})
    assert mixture.shares == [0.5, 0.5]
    assert mixture.passes(2, 1000, 100) == {
        "draws": {"big": 1050, "small": 1050},
        "set_epochs": {"big": 1050 / 900, "small": 10.5},
    }
    exact = Mixture({"cc3m": 2_823_019, "cc12m": 10_010_225, "yfcc15m": 14_065_827}, {})
    for name, passes in exact.passes(32, exact.total, 0)["set_epochs"].items():
        assert passes == pytest.approx(32, rel=1e-4), name


def test_sets_that_can_give_nothing_are_refused():
    with pytest.raises(UserError, match="'b' have no samples"):
        Mixture({"a": 5, "b": 0}, {})
    with pytest.raises(UserError, match="'b' would be less than 1 of 65,536"):
        Mixture({"a": 5, "b": 5}, {"a": 1e9, "b": 1})


def test_readers_get_equal_shares():
    steps, plans = plan_epoch(Mixture({"": 1000}, {}), 0, [], ReaderLayout(2, 3, 7))
    assert steps == 71
    assert [sum(piece.take for piece in plan.pieces[0]) // 7 for plan in plans] == [24, 24, 23] * 2
