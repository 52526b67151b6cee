"""The process that may die: reads jobs, a JSON object a line, tries backends, and writes what it found,
a JSON object a line.

An illegal access poisons a CUDA context, a wrong barrier waits for ever, a wrong pointer ends the process:
the supervisor sees to that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

import torch

from ..backends.settings import configure
from ..backends.tuned_tiles import take_tiles
from .cases import contrast_cases, grouping_cases, sigmoid_cases
from .check import Wrong, check
from .speed import WARM_UPS, milliseconds, rates
from .tune import try_tile

SUBJECTS = {subject.OP: subject for subject in (contrast_cases, grouping_cases, sigmoid_cases)}


def main() -> None:
    """Work until there are no more jobs."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything prints must not come between the events
    faulthandler.enable()
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin, events)


def serve(jobs: TextIO, events: TextIO) -> None:
    """Answer each job with any number of {"trying": ...} and one {"done": ...}."""

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    tell(ready=os.getpid())
    for line in jobs:
        job = json.loads(line)
        # The supervisor ends what hangs; should it be gone, this does.
        faulthandler.dump_traceback_later(job["limit"] + 60, repeat=False, exit=True)
        tell(done=run(job, lambda name: tell(trying=name)))
        faulthandler.cancel_dump_traceback_later()
        if job["device"].startswith("cuda"):
            torch.cuda.synchronize()  # a poisoned context ends the process here, after the answer


def run(job: dict[str, Any], trying) -> dict[str, Any]:
    """The answer to a job: its numbers, or {"why", "report"}."""
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kinds = {"check": _check, "time": _time, "rates": _rates, "probe": _probe}
    kinds |= {"compile_tile": _tile, "time_tile": _tile}
    take_tiles(job["tiles"])  # not those of an older verdict
    try:
        return kinds[job["kind"]](job, device, trying)
    except Wrong as error:
        return {"why": str(error), "report": ""}
    except (torch.OutOfMemoryError, MemoryError):
        return {"why": "out of memory", "report": _last_lines(traceback.format_exc())}
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        why = "out of memory" if "allocate memory" in first else f"{type(error).__name__}: {first}"
        return {"why": why, "report": _last_lines(traceback.format_exc())}


def _check(job: dict[str, Any], device: torch.device, trying) -> dict[str, Any]:
    subject, dtype = SUBJECTS[job["op"]], _multiply_as(job["dtype"])
    worst, count = 0.0, 0
    cases = subject.cases(job["backend"], dtype, device, tuple(job["widths"]))
    for case in itertools.islice(cases, job["part"], None, job["parts"]):
        trying(case.name)
        try:
            worst = max(worst, check(case, subject, dtype))
        except Wrong as error:
            raise Wrong(f"{error}, in: {case.name}") from None
        count += 1
    if job["warm"]:  # so that what is timed later, one after the other, is compiled now, beside the other workers
        for speed in subject.speeds(job["backend"], dtype, device, tuple(job["widths"])):
            trying(f"{speed.shape} D={speed.width}")
            with contextlib.suppress(torch.OutOfMemoryError):
                speed.make()()
            torch.cuda.empty_cache()
    return {"error": worst, "cases": count}


def _time(job: dict[str, Any], device: torch.device, trying) -> dict[str, Any]:
    """The times of each shape, smallest first, as far as the job's seconds go; the first of each width in any case."""
    subject, begin = SUBJECTS[job["op"]], time.monotonic()
    timings, untimed = [], []
    per_unit: dict[int, float] = {}  # by width: seconds that a similarity took at the size before
    for speed in subject.speeds(job["backend"], _multiply_as(job["dtype"]), device, tuple(job["widths"])):
        expected = WARM_UPS * per_unit.get(speed.width, 0.0) * speed.similarities
        if speed.width in per_unit and time.monotonic() - begin + expected > job["budget_s"]:
            untimed.append([speed.shape, speed.width])
            continue
        trying(f"{speed.shape} D={speed.width}")
        for ms in _where_it_fits(speed, device):
            per_unit[speed.width] = ms / 1e3 / speed.similarities
            about = {"shape": speed.shape, "width": speed.width, "similarities": speed.similarities, "ms": ms}
            timings.append(about | {"flops": speed.flops, "moved": speed.moved})
    return {"timings": timings, "left_out": untimed}


def _where_it_fits(speed, device: torch.device) -> Iterator[float]:
    with contextlib.suppress(torch.OutOfMemoryError):
        yield milliseconds(speed.make(), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _probe(job: dict[str, Any], device: torch.device, trying) -> dict[str, Any]:
    trying("the device")
    return {"sum": torch.ones(64, device=device).sum().item()}


def _rates(job: dict[str, Any], device: torch.device, trying) -> dict[str, Any]:
    trying("copy and matrix rates")
    return {"rates": rates(device)}


def _tile(job: dict[str, Any], device: torch.device, trying) -> dict[str, Any]:
    trying(f"D={job['width']}")
    configure(float32="torch")
    return try_tile(job, device)


def _multiply_as(dtype: str) -> str:
    """The dtype class; this process multiplies float32 features as it says from now on."""
    configure(float32="fp16" if dtype.endswith("as float16") else "torch")
    return dtype


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


if __name__ == "__main__":
    main()
