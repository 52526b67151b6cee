"""Loss spikes: a step's loss far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque

_WINDOW, _ARMED_AFTER = 200, 50
_DEVIATIONS = 8.0  # robust standard deviations
_FRACTION = 0.05  # of the median, where the loss hardly varies


class LossSpikes:
    """The last losses, and what counts as a spike among them."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=_WINDOW)

    def check(self, loss: float) -> float | None:
        """The median of the losses before this one if it is a spike: above it by 8 robust standard deviations and by 5
        %. None otherwise.
        """
        if not math.isfinite(loss):
            return None
        median = None
        if len(self.last) >= _ARMED_AFTER:
            middle = statistics.median(self.last)
            deviation = 1.4826 * statistics.median(abs(value - middle) for value in self.last)
            if loss - middle > max(_DEVIATIONS * deviation, _FRACTION * abs(middle)):
                median = middle
        self.last.append(loss)
        return median
