"""Jobs over worker processes: a job whose worker crashes, hangs or cannot start has that as its answer,
and the next job a new worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from ..backends.child_process import PYTHON, environment

WORKER = [*PYTHON, "-m", "dreamlip_kernels.qualification.worker"]
START_LIMIT_S = 240.0  # torch's import, and a context on the device, beside as many others
_REPORT_LINES = 15
_STARTING = "its start"
Progress = Callable[[str], None]


class Worker:
    """One process, started when it gets its first job."""

    def __init__(self, environment: dict[str, str], limit_s: float):
        self.environment, self.limit_s = environment, limit_s
        self.process: subprocess.Popen[str] | None = None

    def run(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The worker's answer, or {"why", "report"} of its end."""
        reused = self.process is not None
        answer = self._attempt(job, progress)
        # A worker may have died of the job before, after its answer: a poisoned context shows itself late.
        return self._attempt(job, progress) if reused and answer.pop("unheard", False) else answer

    def _attempt(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        trying, process = _STARTING, self.process
        try:
            if process is None:
                process = self._start()
                self._event(START_LIMIT_S)
            assert process.stdin is not None
            process.stdin.write(json.dumps(job | {"limit": self.limit_s}) + "\n")
            process.stdin.flush()
            while True:
                event = self._event(self.limit_s)
                if "done" in event:
                    return event["done"]
                trying = event["trying"]
                progress(f"{job['name']}: {trying}")
        except TimeoutError:
            self.end(signal.SIGABRT)  # faulthandler then writes where it hung
            return {"why": f"hangs: no answer in {self.limit_s:.0f} s, in: {trying}", "report": self._last_words()}
        except (EOFError, BrokenPipeError):
            assert process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):  # its output ends before it does
                process.wait(timeout=self.limit_s)
            self.end()
            failure = {"why": f"{_ending(process.returncode or 0)}, in: {trying}", "report": self._last_words()}
            return failure | {"unheard": True} if trying == _STARTING else failure

    def _start(self) -> subprocess.Popen[str]:
        # It lives as long as the process.
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=self.environment,
            start_new_session=True,  # so that its own children, such as compilers, end with it
        )
        self.events: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, self.events), daemon=True).start()
        return process

    def _event(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self.events.get(timeout=limit_s)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise EOFError
        return json.loads(line)

    def end(self, first: signal.Signals = signal.SIGKILL) -> None:
        """End the process and its children, at once or after the time a ``first`` signal takes it."""
        process, self.process = self.process, None  # the thread that works and the one that stops it may both be here
        if process is None:
            return
        for number in (first, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        # Where faulthandler wrote a stack, innermost call first, its beginning; else the end of what was printed.
        stack = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        excerpt = lines[-_REPORT_LINES:] if stack is None else lines[stack : stack + _REPORT_LINES]
        return "\n".join(excerpt)


def run_jobs(
    jobs: list[dict[str, Any]],
    workers: int,
    limit_s: float,
    progress: Progress,
    finished: Callable[[dict[str, Any], dict[str, Any]], None] = lambda job, answer: None,
) -> list[dict[str, Any]]:
    """The answers in the jobs' order, by so many worker processes side by side. A job may take ``limit_s`` seconds
    between two signs of life.

    Args:
        jobs: what ``worker.run`` takes; "environment" holds variables for its process.
        finished: called with each job and its answer, from any thread.
    """
    answers: list[dict[str, Any]] = [{} for _ in jobs]
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    running: list[Worker] = []
    stopped = threading.Event()  # from here on a worker's end is this process's doing, and no answer

    def work() -> None:
        by_environment: dict[str, Worker] = {}
        while not stopped.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            extra = jobs[index].get("environment", {})
            key = json.dumps(extra, sort_keys=True)
            if key not in by_environment:
                by_environment[key] = Worker(environment(extra), limit_s)
                running.append(by_environment[key])
            try:
                answers[index] = by_environment[key].run(jobs[index], progress)
            except (OSError, ValueError, KeyError) as error:  # no more processes, or not an answer of a worker
                answers[index] = {"why": f"{type(error).__name__}: {error}", "report": ""}
                by_environment.pop(key).end()
            if stopped.is_set():
                return
            finished(jobs[index], answers[index])
            progress(f"{jobs[index]['name']}: {answers[index].get('why') or 'done'}")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(workers, len(jobs))))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopped.set()
        for worker in running:
            worker.end()
    return answers


def _read(stream, events: queue.Queue[str | None]) -> None:
    for line in stream:
        events.put(line)
    events.put(None)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    return f"killed by {name}" + (" (the system may be out of memory)" if code == -signal.SIGKILL else "")
