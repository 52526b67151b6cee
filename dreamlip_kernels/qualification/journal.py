"""The answers of a qualification under way, on disk after each one: one that is killed resumes from there."""

from __future__ import annotations

import json
import threading
from typing import Any

from ..backends import cache
from .supervisor import Progress, run_jobs

FORMAT = 1


class Journal:
    """Answers by job, in a file beside the verdict ``name``, of the same device, versions and kernels.

    Whoever holds the verdict's lock may use it."""

    def __init__(self, name: str):
        self.name = f"{name}.unfinished"
        file = cache.read(self.name)
        content = file[0] if file is not None and isinstance(file[0], dict) else {}
        answers = content.get("answers") if content.get("format") == FORMAT else None
        self.answers: dict[str, Any] = answers if isinstance(answers, dict) else {}
        self._lock = threading.Lock()

    def run(self, jobs: list[dict[str, Any]], workers: int, limit_s: float, progress: Progress) -> list[dict[str, Any]]:
        """``run_jobs`` of those that have no answer yet; the answers of all."""
        todo = [job for job in jobs if _text(job) not in self.answers]
        if len(todo) < len(jobs):
            progress(f"{len(jobs) - len(todo)} of {len(jobs)} answers are there, of a qualification that did not end")
        run_jobs(todo, workers, limit_s, progress, self._note)
        return [self.answers[_text(job)] for job in jobs]

    def _note(self, job: dict[str, Any], answer: dict[str, Any]) -> None:
        with self._lock:
            self.answers[_text(job)] = answer
            cache.write(self.name, {"format": FORMAT, "answers": self.answers})

    def end(self) -> None:
        """The verdict is stored: nobody needs the answers any more."""
        cache.remove(self.name)


def _text(job: dict[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)
