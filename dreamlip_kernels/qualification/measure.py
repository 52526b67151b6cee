"""Finds out, once on each device, which backends are right and faster there.

correctness of every op, backend and dtype class, in processes side by side -> speed of what is right,
one after another -> a verdict on disk

Each answer goes into a journal first: a qualification that is killed resumes from there.
"""

from __future__ import annotations

import collections
import datetime
import logging
import os
import time
from typing import Any

import torch

from ..backends import cache, dispatch, identity, verdicts
from ..backends.tuned_tiles import Tiles
from ..backends.verdicts import Record, Timing, Verdict
from .cases import contrast_cases, grouping_cases, sigmoid_cases
from .journal import Journal
from .supervisor import run_jobs
from .tune import tune as tune_tiles

logger = logging.getLogger("dreamlip_kernels")

SUBJECTS = (contrast_cases, grouping_cases, sigmoid_cases)
WIDTHS = (512, 768)
LIMIT_S = {"cuda": 60.0, "cpu": 120.0}  # between two signs of life: a case, with its kernels compiled
# Of timed calls for an op, shared out equally to its backends and dtypes; larger sizes are left out beyond that.
BUDGET_S = {"cuda": 20.0, "cpu": 60.0}
# The kernels of a case are compiled one after another: cases of other kinds go to other processes.
# Every width has four kinds.
PARTS = 4
GIGABYTES_PER_WORKER = 2
# The interpreter takes seconds for what a GPU does in microseconds: one small width, for correctness alone.
INTERPRETED_WIDTHS = (64,)


def qualify(
    device: torch.device | str | None = None,
    *,
    widths: tuple[int, ...] = WIDTHS,
    tune: bool = False,
    reuse: bool = False,
) -> Record:
    """Test and time every backend on ``device``, store the verdict that ``backend="auto"`` reads from then on,
    and return it.

    Correctness first: ragged sizes, masks, every dtype and scale, forward and backward, against float64,
    with at most twice the error of eager code; three bit-exact runs; no write beyond a buffer;
    captured in a CUDA graph. Then speed against torch code. All of it runs in child processes:
    a crash, a hang or a lack of memory there is a verdict, and this process continues.
    One process of a machine works at a time; one that is killed leaves what it has answered so far to the next.
    docs/backends.md.

    Args:
        device: the device to qualify; None is the current CUDA device, or the CPU where there is none.
        widths: feature widths D to test and time.
        tune: on a GPU, first time a short list of tiles for the contrast's Triton kernels, and keep the fastest.
        reuse: return the verdict in force, if there is one, without testing anything.

    Raises:
        ValueError: a width is not positive.  RuntimeError: the device cannot be used.
    """
    if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(f"qualify: widths must be positive integers, got {widths!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    if device not in devices and (device != torch.device("cuda") or len(devices) == 1):
        raise RuntimeError(f"qualify: device={str(device)!r} cannot be used; torch sees {', '.join(map(str, devices))}")
    device = verdicts.indexed(device)
    with cache.lock(identity.file_name(device)):
        verdicts.forget()
        if reuse and (old := verdicts.record(device)) is not None:
            return old
        journal = Journal(identity.file_name(device))
        record = verdicts.store(device, _measure(device, tuple(widths), tune, journal))
        journal.end()
        return record


def _measure(device: torch.device, widths: tuple[int, ...], tune: bool, journal: Journal) -> Record:
    begin = time.monotonic()
    at_once, limit_s = _workers(device), LIMIT_S[device.type]
    tiles = _tiles(device, widths, tune, at_once, limit_s, journal)
    checks = [job | {"tiles": tiles} for job in _check_jobs(device, widths)]
    [probe] = run_jobs([_job("probe", device, widths)], 1, limit_s, logger.info)
    if "why" in probe:
        raise RuntimeError(f"qualify: {device} cannot be used: {probe['why']}\n{probe['report']}")
    parts = journal.run(checks, at_once, limit_s, logger.info)
    answers = _joined(checks, parts)
    job_by_key = {_key(job): job for job in checks}
    right = [job for key, job in job_by_key.items() if "why" not in answers[key] and not job["interpreted"]]
    rates, timings, untimed = _speeds(device, widths, right, journal)
    results = [
        _verdict(job, answers[key], timings.get(key, ()), untimed.get(key, {})) for key, job in job_by_key.items()
    ]
    return Record(
        identity=identity.identity(device),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=round(time.monotonic() - begin, 1),
        widths=widths,
        rates=rates,
        verdicts=tuple(results),
        tiles=tiles,
    )


def _tiles(
    device: torch.device, widths: tuple[int, ...], tune: bool, at_once: int, limit_s: float, journal: Journal
) -> Tiles:
    """Tuned now, or what an earlier verdict on the same device and kernels holds: what is tested is what will run."""
    if tune and device.type == "cuda":
        return tune_tiles(device, widths, at_once, limit_s, journal)
    if tune:
        logger.warning("qualify: there are no tiles to tune on %s: the Triton kernels of a GPU have them", device)
    old = verdicts.record(device)
    return old.tiles if old is not None else {}


def _workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        return max(1, cores // 2)
    memory = torch.cuda.get_device_properties(device).total_memory >> 30
    return max(1, min(cores - 2, memory // GIGABYTES_PER_WORKER))


def _joined(checks: list[dict[str, Any]], parts: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """One answer for each op, backend and dtype class: the first failure of its parts, else their largest error."""
    answers: dict[tuple[str, str, str], dict[str, Any]] = {}
    for job, part in zip(checks, parts, strict=True):
        so_far = answers.setdefault(_key(job), part)
        if so_far is part or "why" in so_far:
            continue
        both = {"error": max(so_far["error"], part.get("error", 0.0)), "cases": so_far["cases"] + part.get("cases", 0)}
        answers[_key(job)] = part if "why" in part else both
    return answers


def _check_jobs(device: torch.device, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    jobs = []
    for subject in SUBJECTS:
        for backend in dispatch.backends(subject.OP):
            interpreted = device.type == "cpu" and backend == "triton"
            for dtype in subject.DTYPES if backend != "torch" else ():
                probe = torch.empty(0, device=device, dtype=getattr(torch, dtype.split()[0]))
                # The interpreter has no bfloat16 products.
                if _cannot_run(subject.OP, backend, probe, interpreted) or (interpreted and dtype == "bfloat16"):
                    continue
                about = {"op": subject.OP, "backend": backend, "dtype": dtype, "interpreted": interpreted}
                environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
                case_widths = INTERPRETED_WIDTHS if interpreted else widths
                parts = PARTS if device.type == "cuda" else 1
                for part in range(parts):
                    # What is timed later, one call after another, is compiled now, beside the other workers.
                    how = {"part": part, "parts": parts, "warm": part == parts - 1 and not interpreted}
                    jobs.append(_job("check", device, case_widths, environment=environment, **how, **about))
    return jobs


def _cannot_run(op: str, backend: str, probe: torch.Tensor, interpreted: bool) -> str | None:
    if interpreted:
        return None if dispatch.TRITON_INSTALLED else "triton is not installed"
    try:
        dispatch.select(op, probe, backend)  # which compiles what only needs compiling
    except RuntimeError as error:
        return str(error)
    return None


def _speeds(device: torch.device, widths: tuple[int, ...], right: list[dict[str, Any]], journal: Journal):
    """(rates, timings by job, the failures of those that were not timed): one process, one call after another."""
    if not right:
        return {}, {}, {}
    jobs = _time_jobs(device, widths, right)
    first, *answers = journal.run([_job("rates", device, widths), *jobs], 1, LIMIT_S[device.type], logger.info)
    if "why" in first:
        raise RuntimeError(f"qualify: {device} cannot be timed: {first['why']}\n{first['report']}")
    rates, times = first["rates"], dict(zip(map(_key, jobs), answers, strict=True))
    timings, failures = {}, {}
    for job in right:
        mine, base = times[_key(job)], times[job["op"], "torch", job["dtype"].split()[0]]
        failure = next((answer for answer in (mine, base) if "why" in answer), None)
        if failure is None:
            timings[_key(job)] = _against(mine["timings"], base, rates)
        else:
            failures[_key(job)] = failure
    return rates, timings, failures


def _time_jobs(device: torch.device, widths: tuple[int, ...], right: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is right, op by op and dtype by dtype, each after the torch code that it is held against: what is stored of
    a qualification that is killed are whole comparisons.
    """
    jobs: dict[tuple[str, str, str], dict[str, Any]] = {}
    for job in sorted(right, key=lambda job: (job["op"], job["dtype"].split()[0])):
        base = {"op": job["op"], "backend": "torch", "dtype": job["dtype"].split()[0]}  # it has no classes of float32
        jobs.setdefault(_key(base), _job("time", device, widths, **base))
        jobs[_key(job)] = job | {"kind": "time", "name": f"{job['name']}, speed"}
    number = collections.Counter(job["op"] for job in jobs.values())
    return [job | {"budget_s": BUDGET_S[device.type] / number[job["op"]]} for job in jobs.values()]


def _against(mine: list[dict[str, Any]], base: dict[str, Any], rates: dict[str, float]) -> tuple[Timing, ...]:
    """The times of a backend beside torch code's, and what the device's rates allow; without the shapes for which
    torch code had no time left.
    """
    torch_ms = {(t["shape"], t["width"]): round(t["ms"], 4) for t in base["timings"]}
    untimed_shapes = {tuple(about) for about in base["left_out"]}
    return tuple(
        Timing(
            shape=t["shape"],
            width=t["width"],
            similarities=t["similarities"],
            ms=round(t["ms"], 4),
            torch_ms=torch_ms.get((t["shape"], t["width"])),
            floor_ms=round(1e3 * max(t["flops"] / rates["flops"], t["moved"] / rates["bytes"]), 4),
        )
        for t in mine
        if (t["shape"], t["width"]) not in untimed_shapes
    )


def _verdict(job, answer, timings: tuple[Timing, ...], slow: dict[str, Any]) -> Verdict:
    failure = answer if "why" in answer else slow
    about = {"op": job["op"], "backend": job["backend"], "dtype": job["dtype"]}
    if failure:
        report = [
            f"dreamlip_kernels {job['op']}, backend={job['backend']!r}, {job['dtype']} features: {failure['why']}"
        ]
        return Verdict(**about, why=failure["why"], report="\n".join([*report, *filter(None, [failure["report"]])]))
    numbers = {"error": round(answer["error"], 4), "cases": answer["cases"]}
    return Verdict(
        **about, **numbers, timings=timings, timed="run by Triton's interpreter" if job["interpreted"] else ""
    )


def _job(kind: str, device: torch.device, widths: tuple[int, ...], **about: Any) -> dict[str, Any]:
    name = " ".join(about.get(word, "") for word in ("op", "backend", "dtype")).strip() or kind
    return {
        "kind": kind,
        "name": name,
        "device": str(device),
        "widths": list(widths),
        "interpreted": False,
        "tiles": {},
    } | about


def _key(job: dict[str, Any]) -> tuple[str, str, str]:
    return job["op"], job["backend"], job["dtype"]
