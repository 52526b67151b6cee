"""What a run says while it runs: a progress bar or plain lines, a log of every rank, ``metrics.jsonl``, TensorBoard files and W&B. Rank 0 alone prints."""

from __future__ import annotations

import json
import logging
import resource
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Below this share of waiting the loader keeps up; the first windows are left out, in which the workers start.
_SLOW_DATA = 0.5
_WINDOWS_BEFORE_ADVICE = 3


class RunLog:
    """Opens (appends to) the files of ``run_dir``: ``log.txt`` for rank 0, ``logs/rank-NNNN.txt`` for another, which prints nothing and keeps no metrics.

    Raises:
        ValueError: ``wandb_project`` is given and wandb is not installed.
    """

    def __init__(self, run_dir: Path, rank: int, total_steps: int, wandb_project: str = "") -> None:
        self.first, self.total_steps = rank == 0, total_steps
        path = run_dir / "log.txt" if self.first else run_dir / "logs" / f"rank-{rank:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.text = path.open("a", encoding="utf-8")
        self.handler = _ToRunLog(self)
        for name in ("dreamlip_kernels", "dreamlip_train"):
            logger = logging.getLogger(name)
            logger.addHandler(self.handler)
            logger.setLevel(logging.INFO)
        self.bar = self.tensorboard = self.wandb = None
        if self.first:
            self.console = Console(highlight=False, soft_wrap=True)
            self.metrics = _open_lines(run_dir / "metrics.jsonl")
            self.tensorboard = _tensorboard(run_dir)
            self.wandb = _wandb(run_dir, wandb_project) if wandb_project else None

    def begin(self, step: int) -> None:
        """Show the bar, on a terminal, from ``step`` on."""
        if self.first and self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("starting", total=self.total_steps, completed=step)
            self.bar.start()

    def message(self, text: str, *, shown: bool = True, loud: bool = False) -> None:
        """Keep ``text`` with the time in this rank's log; rank 0 also prints it, ``loud`` in red."""
        if self.first and shown:
            self.console.print(text, markup=False, style="bold red" if loud else None)
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.text.flush()

    def traceback(self) -> None:
        """Keep the exception that is being handled in this rank's log."""
        self.message(traceback.format_exc(), shown=False)

    def row(self, row: dict[str, Any], summary: str) -> None:
        """One object of metrics.jsonl, its numbers to TensorBoard and W&B, ``summary`` to the bar or as a line."""
        if not self.first:
            self.message(summary)
            return
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        numbers = dict(_numbers(row))
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], description=summary)
        self.message(summary, shown=self.bar is None)

    def advance(self, step: int) -> None:
        """Move the bar between logged rows."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self.bar is not None:
            self.bar.stop()
        for name in ("dreamlip_kernels", "dreamlip_train"):
            logging.getLogger(name).removeHandler(self.handler)
        self.text.close()
        if self.first:
            self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class Stopwatch:
    """Counts images, tokens and captions cut at the context's end, and splits the time since the last ``window`` into waiting for data and the rest."""

    def __init__(self) -> None:
        self.slow_windows = self.windows = 0
        self.advised = False
        self.restart()

    def restart(self) -> None:
        """Start a window now."""
        self.began = time.perf_counter()
        self.waited = 0.0
        self.images = self.tokens = self.cut = 0

    def window(self) -> dict[str, float]:
        """{"seconds", "images", "tokens", "cut", "data_wait" (a share of the time)} of the window that ends here."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        result = {
            "seconds": seconds,
            "images": self.images,
            "tokens": self.tokens,
            "cut": self.cut,
            "data_wait": self.waited / seconds,
        }
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


def _wandb(run_dir: Path, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "engine.wandb_project: wandb is not installed; pip install 'dreamlip[wandb]', or leave the project empty"
        ) from error
    return wandb.init(project=project, name=run_dir.name, id=run_dir.absolute().name, dir=str(run_dir), resume="allow")


def _numbers(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number in the nested ``row`` by its path, the step aside."""
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "chance"):
            found.append((prefix + key, float(value)))
    return found
