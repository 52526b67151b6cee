"""Batches one ahead of the step: in order, all of them, errors where they belong, and nothing left running."""

import threading
import time

import pytest
import torch

from dreamlip_train.model.packing import PackedCaptions
from dreamlip_train.training.prefetch import _tensors, prefetched

CPU = torch.device("cpu")


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_every_batch_in_order_with_what_became_of_it():
    assert list(prefetched(iter(range(50)), lambda batch: batch * 10, CPU)) == [(i, 10 * i) for i in range(50)]
    assert not prefetch_threads()


def test_the_next_batch_is_made_while_the_last_is_used():
    made = []
    batches = prefetched(iter(range(10)), made.append, CPU)
    next(batches)
    deadline = time.time() + 5
    while len(made) < 3 and time.time() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]  # in use, ready, and in the making: no further
    time.sleep(0.3)
    assert made == [0, 1, 2]
    batches.close()
    assert not prefetch_threads()


def test_an_error_comes_after_the_batches_before_it():
    def source():
        yield 1
        yield 2
        raise RuntimeError("a damaged shard")

    batches = prefetched(source(), lambda batch: batch, CPU)
    assert next(batches) == (1, 1) and next(batches) == (2, 2)
    with pytest.raises(RuntimeError, match="a damaged shard"):
        next(batches)
    assert not prefetch_threads()


def test_closing_early_waits_for_the_thread_so_that_the_source_can_be_closed():
    closed = []

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    given = source()
    batches = prefetched(given, lambda batch: batch, CPU)
    next(batches)
    batches.close()
    given.close()
    assert closed == [True] and not prefetch_threads()


def test_the_tensors_of_a_moved_batch_are_all_found():
    a, *packed = (torch.zeros(i + 1) for i in range(5))
    moved = [{"images": a, "keys": ["x"], "text": PackedCaptions(*packed)}, {"seen": None}]
    assert [len(tensor) for tensor in _tensors(moved)] == [1, 2, 3, 4, 5]
