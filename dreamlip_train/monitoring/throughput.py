"""How fast a run is: images, tokens and the time spent waiting for data between two log lines, and the memory it
takes.
"""

from __future__ import annotations

import resource
import time

import torch

# Below this share of waiting the loader keeps up; the first windows are left out, in which the workers start.
_SLOW_DATA = 0.5
_WINDOWS_BEFORE_ADVICE = 3


class Stopwatch:
    """Counts images, tokens and captions cut at the context's end, and splits the time since the last ``window`` into
    waiting for data and the rest.
    """

    def __init__(self) -> None:
        self.slow_windows = self.windows = 0
        self.has_advised = False
        self.restart()

    def restart(self) -> None:
        """Start a window now."""
        self.began = time.perf_counter()
        self.seconds_waited = 0.0
        self.images = self.tokens = self.cut = 0

    def window(self) -> dict[str, float]:
        """{"seconds", "images", "tokens", "cut", "data_wait" (a share of the time)} of the window that ends here."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        result = {
            "seconds": seconds,
            "images": self.images,
            "tokens": self.tokens,
            "cut": self.cut,
            "data_wait": self.seconds_waited / seconds,
        }
        self.windows += 1
        self.slow_windows += self.windows > 1 and result["data_wait"] > _SLOW_DATA
        self.restart()
        return result

    def advice(self, data_wait: float, workers: int, cores: int) -> str | None:
        """Once, when the step keeps waiting for data: what to change."""
        if self.has_advised or self.slow_windows < _WINDOWS_BEFORE_ADVICE:
            return None
        self.has_advised = True
        remedy = (
            f"raise --data.num-workers (now {workers}; {cores} cores here)"
            if workers < cores
            else "all cores are loading: store smaller pictures, or move the shards to a faster disk"
        )
        return f"training waits for data {data_wait:.0%} of the time: {remedy}"


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: what torch allocated on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
