"""Times, shares of the floor and peak memory, for every benchmark."""

import ctypes
import gc
import threading
import time

import pytest
import torch
from shapes import DEVICE

_BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which no further case is begun; the others are skipped",
    )
    parser.addoption(
        "--peer",
        action="append",
        default=[],
        metavar="FILE.py:NAME",
        help="a loss of your own beside the others: NAME(image [N, D], text [N, K, D], scale) -> scalar",
    )


@pytest.fixture(autouse=True)
def within_budget(request):
    """A lent machine's time ends: what was measured until then is in the table, and what was not says so."""
    if time.monotonic() - _BEGAN > request.config.getoption("--budget"):
        pytest.skip(f"over --budget {request.config.getoption('--budget'):.0f} s")


@pytest.fixture(scope="session")
def copy_rate():
    """Bytes a second this device copies, read and written bytes both counted."""
    source = torch.empty(2**28 if DEVICE == "cuda" else 2**26, dtype=torch.float32, device=DEVICE)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    rate = 2 * source.numel() * 4 / sorted(seconds)[len(seconds) // 2]
    _SUMMARY.append(f"copy rate of this run: {rate / 1e9:.0f} GB/s")
    return rate


@pytest.fixture(scope="session")
def matmul_rate():
    """Operations a second of a large matrix product on this device: bfloat16 on CUDA, float32 on a CPU,
    random values.
    """
    size, dtype = (8192, torch.bfloat16) if DEVICE == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        begin = time.perf_counter()
        a @ b
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    rate = 2 * size**3 / sorted(seconds[3:])[5]
    _SUMMARY.append(f"matrix products of this run: {rate / 1e12:.2f} TFLOP/s ({str(dtype)[6:]}, {size} cubed)")
    return rate


@pytest.fixture
def run(benchmark, request):
    """``run(step, floor=None, rounds=..., images=None, warmup=2, extra=None)``: the median time of ``step()``.

    With the seconds that it must take at least, its share of that floor; with the images it handles, images/s;
    ``extra`` numbers as they are; and the peak of memory beyond what was in use before: the device's on CUDA,
    the process's on a CPU.
    """

    def measure(step, floor=None, rounds=10 if DEVICE == "cuda" else 3, images=None, warmup=2, extra=None):
        def synchronized():
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = _group(request)
        benchmark.extra_info.update(extra or {})
        try:
            synchronized()
        except torch.cuda.OutOfMemoryError:
            pytest.skip("does not fit in this device's memory")
        begin = time.monotonic()
        benchmark.extra_info["peak_mb"] = _peak_bytes(synchronized) / 2**20
        seconds = time.monotonic() - begin
        if DEVICE == "cuda" and seconds > 0.3:  # a slow case has been warm for long, and a lent machine's time ends
            rounds, warmup = min(rounds, max(3, int(3 / seconds))), 0
        benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=warmup)
        median = benchmark.stats.stats.median if benchmark.stats else None  # none with --benchmark-disable
        if floor is not None and median:
            benchmark.extra_info["fraction_of_floor"] = floor / median
        if images is not None and median:
            benchmark.extra_info["images_per_s"] = images / median
        if median:
            cells = [
                f"{name} {value:.2g}" if value < 10 else f"{name} {value:.0f}"
                for name, value in benchmark.extra_info.items()
            ]
            _SUMMARY.append(f"{request.node.name:<90} {1e3 * median:9.3f} ms   {'  '.join(cells)}")

    return measure


def _group(request) -> str:
    """What a case is compared with: its function's cases of the same shape and phase, as far as it has them.

    --benchmark-group-by=param:phase ends with a KeyError where a case has none.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    shared = [f"{name}={parameters[name]}" for name in ("shape", "phase") if name in parameters]
    return " ".join([request.node.function.__name__, *shared])


def _peak_bytes(step) -> int:
    """How much more memory than before ``step()`` has in use at its peak: torch's count on CUDA, the resident set seen
    every 2 ms on a CPU.
    """
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    import psutil  # a dev dependency, which a GPU machine need not have

    process, done = psutil.Process(), threading.Event()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what earlier steps freed goes back to the system, or this one would find it there
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    step()
    done.set()
    thread.join()
    return peak - before


_SUMMARY: list[str] = []


def pytest_terminal_summary(terminalreporter):
    """What pytest-benchmark's table has no columns for: shares of the floor and peak memory."""
    if _SUMMARY:
        terminalreporter.write_sep("-", "times, shares of the floor, peak memory")
        for line in _SUMMARY:
            terminalreporter.write_line(line)
