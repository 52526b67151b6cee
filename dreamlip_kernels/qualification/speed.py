"""How long a call takes, and what this run's own copy and matrix rates would allow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

BUDGET_S = 0.4  # of repeats of one step, beyond the least number of them
LEAST, MOST = 3, 20
WARM_UPS = 2
SLOW_S = 0.2  # a step that takes so long is not repeated after them: the faster of the two counts


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Median of repeated steps after two to warm up: by device events on a GPU, by the clock on a CPU."""
    once = min(_seconds(step, device) for _ in range(WARM_UPS))  # the first one may compile
    if once > SLOW_S:
        return 1e3 * once
    repeats = max(LEAST, min(MOST, int(BUDGET_S / once)))
    times = _by_events(step, repeats, device) if device.type == "cuda" else _by_clock(step, repeats)
    return statistics.median(times)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - begin, 1e-6)


def rates(device: torch.device) -> dict[str, float]:
    """{"flops": operations a second of a large matrix product, "bytes": bytes a second of a copy,
    reads and writes both counted}.
    """
    size, dtype, count = (8192, torch.bfloat16, 2**30) if device.type == "cuda" else (1024, torch.float32, 2**27)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = milliseconds(lambda: a @ b, device)
    copy = milliseconds(lambda: target.copy_(source), device)
    return {"flops": 2 * size**3 / product * 1e3, "bytes": 2 * count / copy * 1e3}


def _by_events(step: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    with torch.cuda.device(device):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for first, last in events:
            first.record()
            step()
            last.record()
        torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]


def _by_clock(step: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
    return times
