"""Work on batches shared by the ranks of a process group: each does every so-manyth batch, all get all results, and all
stop together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist

from dreamlip_train.jobs.user_error import UserError

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class StoppedError(Exception):
    """An evaluation that was asked to stop."""


class Share:
    """This rank's part of an evaluation: everything, or with ``distributed`` what ``owns`` says."""

    def __init__(self, distributed: bool) -> None:
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    def owns(self, batch: int) -> bool:
        """Whether this rank does batch number ``batch``."""
        return batch % self.ranks == self.rank

    def map(
        self, work: Callable[[Batch], Result], batches: Iterable[Batch], should_stop: Callable[[], bool]
    ) -> list[Result]:
        """``work`` of this rank's batches. After each the ranks look at each other: an error of one, or its wish to
        stop, is everybody's, and nobody waits in a collective that another has left. Collective.

        Raises:
            StoppedError: ``should_stop`` said so, on any rank.  UserError: what ``work`` raised, on any rank.
        """
        results: list[Result] = []
        waiting = iter(batches)
        while True:
            busy, error = False, None
            try:
                if not should_stop():
                    for batch in waiting:
                        results.append(work(batch))
                        busy = True
                        break
            except UserError as raised:
                error = raised
            everyone = self.gather((should_stop(), str(error or ""), busy))
            if error is not None:
                raise error
            if errors := [text for _, text, _ in everyone if text]:
                raise UserError(errors[0])
            if any(stop for stop, _, _ in everyone):
                raise StoppedError
            if not any(busy for _, _, busy in everyone):
                return results

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, by rank. Collective."""
        if self.ranks == 1:
            return [value]
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, value)
        return everyone
