"""What a run says while it runs: a progress bar or plain lines, a log of every rank, ``metrics.jsonl``, TensorBoard files and W&B. Rank 0 alone prints."""

from __future__ import annotations

import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamlip_train.jobs.user_error import UserError


class RunLog:
    """Opens (appends to) the files of ``run_dir``: ``log.txt`` for rank 0, ``logs/rank-NNNN.txt`` for another, which prints nothing and keeps no metrics.

    Raises:
        UserError: ``wandb_project`` is given and wandb is not installed.
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
        raise UserError(
            "logging.wandb_project: wandb is not installed; pip install 'dreamlip[wandb]', or leave the project empty"
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
