"""What a run says while it runs: a progress bar or plain lines, ``log.txt``, ``metrics.jsonl`` and TensorBoard files. Only rank 0 speaks."""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Below this share of waiting the loader keeps up; the first windows are left out, in which the workers start.
_SLOW_DATA = 0.5
_WINDOWS_BEFORE_ADVICE = 3


class RunLog:
    """Opens (appends to) the files of ``run_dir``; on a rank other than 0 every method does nothing."""

    def __init__(self, run_dir: Path, rank: int, total_steps: int, start_step: int) -> None:
        self.active = rank == 0
        if not self.active:
            return
        self.console = Console(highlight=False, soft_wrap=True)
        self.text = (run_dir / "log.txt").open("a", encoding="utf-8")
        self.metrics = _open_lines(run_dir / "metrics.jsonl")
        self.tensorboard = _tensorboard(run_dir)
        self.handler = _ToRunLog(self)
        for name in ("dreamlip_kernels", "dreamlip_train"):
            logger = logging.getLogger(name)
            logger.addHandler(self.handler)
            logger.setLevel(logging.INFO)
        self.bar = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("starting", total=total_steps, completed=start_step)
            self.bar.start()

    def message(self, text: str) -> None:
        """Print ``text`` and keep it, with the time, in log.txt."""
        if self.active:
            self.console.print(text, markup=False)
            self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.text.flush()

    def row(self, row: dict[str, Any], summary: str) -> None:
        """One object of metrics.jsonl, its numbers to TensorBoard, ``summary`` to the bar or as a line."""
        if not self.active:
            return
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        if self.tensorboard is not None:
            for name, value in _numbers(row):
                self.tensorboard.add_scalar(name, value, row["step"])
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], description=summary)
        else:
            self.message(summary)

    def advance(self, step: int) -> None:
        """Move the bar between logged rows."""
        if self.active and self.bar is not None:
            self.bar.update(self.task, completed=step)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.stop()
        for name in ("dreamlip_kernels", "dreamlip_train"):
            logging.getLogger(name).removeHandler(self.handler)
        self.metrics.close()
        self.text.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


class Stopwatch:
    """Splits the time since the last ``window`` into waiting for data and the rest."""

    def __init__(self) -> None:
        self.slow_windows = self.windows = 0
        self.advised = False
        self.restart()

    def restart(self) -> None:
        """Start a window now."""
        self.began = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def window(self) -> dict[str, float]:
        """{"images_per_s", "data_wait"} (a share of the time) of the window that ends here."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        result = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.windows += 1
        self.slow_windows += self.windows > 1 and result["data_wait"] > _SLOW_DATA
        self.restart()
        return result

    def advice(self, data_wait: float, workers: int, cores: int) -> str | None:
        """Once, when the step keeps waiting for data: what to change."""
        if self.advised or self.slow_windows < _WINDOWS_BEFORE_ADVICE:
            return None
        self.advised = True
        remedy = (
            f"raise --data.workers (now {workers}; {cores} cores here)"
            if workers < cores
            else "all cores are loading: store smaller pictures, or move the shards to a faster disk"
        )
        return f"training waits for data {data_wait:.0%} of the time: {remedy}"


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: what torch allocated on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class _ToRunLog(logging.Handler):
    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.message(record.getMessage())


def _open_lines(path: Path) -> Any:
    """``path`` for appending whole lines: a line that a crash cut off gets its end first."""
    cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if cut_off:
        file.write("\n")
    return file


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"))


def _numbers(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number in the nested ``row`` by its path, the step aside."""
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "chance"):
            found.append((prefix + key, float(value)))
    return found
