"""Which of a run's data sets each sample of an epoch comes from: a fixed pattern over the samples of all ranks.

Every step has the sets in their proportions, whatever the number of ranks, and how far each set is read follows from
the step alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dreamlip_train.jobs.user_error import UserError

_PERIOD = 2**16  # samples after which the pattern repeats: proportions are whole multiples of 1 / _PERIOD


class Mixture:
    """Data sets of ``sizes`` samples by name. An epoch draws as many samples as all of them have together.

    Args:
        proportions: a weight for each set; {} draws each set in proportion to its size, so once an epoch.
    Raises:
        UserError: a set is empty, or its share so small that it would never be drawn.
    """

    def __init__(self, sizes: Mapping[str, int], proportions: Mapping[str, float]) -> None:
        self.names, self.sizes = list(sizes), list(sizes.values())
        weights = np.array([proportions.get(name, size) for name, size in sizes.items()], dtype=np.float64)
        exact = weights / max(weights.sum(), np.finfo(np.float64).tiny) * _PERIOD
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: _PERIOD - counts.sum()]] += 1
        for name, size, count in zip(self.names, self.sizes, counts, strict=True):
            if self.total and not size:
                raise UserError(f"data.mixture: the shards of {name!r} have no samples; leave it out")
            if self.total and not count:
                raise UserError(
                    f"data.proportions: {name!r} would be less than 1 of {_PERIOD:,} samples and never be drawn; "
                    "raise its weight, or leave it out"
                )
        self._counts = counts
        # Each set's places spread evenly over the period.
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        of_set = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
        steps = np.cumsum(of_set[:, None] == np.arange(len(counts)), axis=0)
        self._before = np.concatenate([np.zeros((1, len(counts)), dtype=np.int64), steps])

    @property
    def total(self) -> int:
        """Samples of an epoch."""
        return sum(self.sizes)

    @property
    def shares(self) -> list[float]:
        """The part of the samples that each set gives."""
        return [float(count) / _PERIOD for count in self._counts]

    def drawn(self, samples: int | np.ndarray) -> np.ndarray:
        """How many of the first ``samples`` of an epoch come from each set, [.., sets]."""
        periods, rest = np.divmod(samples, _PERIOD)
        return np.multiply.outer(periods, self._counts) + self._before[rest]

    def passes(self, epochs: int, of_epoch: int, samples: int) -> dict[str, dict[str, float]]:
        """{"draws": of each set since the run began, "set_epochs": how often that is the whole set} after ``epochs``
        epochs of which ``of_epoch`` samples were taken (what fills no step is not) and ``samples`` of the next one.
        """
        draws = (epochs * self.drawn(of_epoch) + self.drawn(samples)).tolist()
        sizes = zip(self.names, draws, self.sizes, strict=True)
        return {
            "draws": dict(zip(self.names, draws, strict=True)),
            "set_epochs": {name: count / size for name, count, size in sizes},
        }
