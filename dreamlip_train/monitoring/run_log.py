"""What a run says while it runs: a progress bar or plain lines, a log of every rank, ``metrics.jsonl``,
TensorBoard files and W&B. Rank 0 alone prints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamlip_train.jobs.line_file import LineFile
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.monitoring.dashboards import TensorBoard, start_wandb


class RunLog:
    """Opens (appends to) the files of ``run_dir``: ``log.txt`` for rank 0, ``logs/rank-NNNN.txt`` for another,
    which prints nothing and keeps no metrics.

    A full disk ends no run: what could not be written is kept, and written when there is room.

    Raises:
        UserError: ``wandb_project`` is given and wandb is not installed.
    """

    def __init__(self, run_dir: Path, rank: int, total_steps: int, wandb_project: str = "", config: Any = None) -> None:
        self.first, self.total_steps = rank == 0, total_steps
        path = run_dir / "log.txt" if self.first else run_dir / "logs" / f"rank-{rank:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files and samples may hold anything: never markup, never ":emoji:".
        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not self.first)
        self.text = LineFile(path, self._print_loudly)
        self.handler = _ToRunLog(self)
        for name in ("dreamlip_kernels", "dreamlip_train"):
            logger = logging.getLogger(name)
            logger.addHandler(self.handler)
            logger.setLevel(logging.INFO)
        self.bar = self.metrics = self.tensorboard = self.wandb = None
        if self.first:
            self.metrics = LineFile(run_dir / "metrics.jsonl", lambda text: self.message(text, loud=True))
            self.tensorboard = TensorBoard(run_dir / "tensorboard", lambda text: self.message(text, loud=True))
            self.wandb = start_wandb(run_dir, wandb_project, config) if wandb_project else None

    def begin(self, step: int) -> None:
        """Show the bar, on a terminal, from ``step`` on."""
        if self.first and self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("starting", total=self.total_steps, completed=step)
            self.bar.start()

    def message(self, text: str, *, on_terminal: bool = True, loud: bool = False) -> None:
        """Keep ``text`` with the time in this rank's log; rank 0 also prints it, ``loud`` in red."""
        text = plain(text)
        if on_terminal:
            self._print(text, "bold red" if loud else None)
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def traceback(self) -> None:
        """Keep the exception that is being handled in this rank's log."""
        self.message(traceback.format_exc(), on_terminal=False)

    def row(self, row: dict[str, Any], summary: str) -> None:
        """One object of metrics.jsonl, its numbers to TensorBoard and W&B, ``summary`` to the bar or as a line."""
        if not self.first:
            self.message(summary)
            return
        assert self.metrics is not None and self.tensorboard is not None  # the first rank's
        self.metrics.write(json.dumps(row))
        numbers = dict(_numbers(row))
        self.tensorboard.add(row["step"], numbers)
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], description=summary)
        self.message(summary, on_terminal=self.bar is None)

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
        if self.metrics is not None:
            self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.text.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _print(self, text: str, style: str | None = None) -> None:
        with contextlib.suppress(OSError):  # standard output may be a file on the full disk
            self.console.print(text, style=style)

    def _print_loudly(self, text: str) -> None:
        self._print(text, "bold red")


class EarlyLines(logging.Handler):
    """A context in which what is logged before a run's log is open goes to standard error and is kept for that log:
    that a checkpoint was put aside, a lock taken over, shards set aside. Where no log opens (a start that is refused)
    rank 0's lines are appended to ``run_dir``/log.txt at the end.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = plain(record.getMessage())
        self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)

    def hand_over(self, log: RunLog) -> None:
        """The lines so far into ``log``, with the times at which they came; further ones are the log's own."""
        logging.getLogger("dreamlip_train").removeHandler(self)
        for line in self.lines:
            log.text.write(line)
        self.lines = []

    def __enter__(self) -> EarlyLines:
        logging.getLogger("dreamlip_train").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("dreamlip_train").removeHandler(self)
        if self.lines and self.run_dir.is_dir() and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                file = LineFile(self.run_dir / "log.txt", lambda text: None)
                for line in self.lines:
                    file.write(line)
                file.close()


class _ToRunLog(logging.Handler):
    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.message(record.getMessage())


def _numbers(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number in the nested ``row`` by its path, the step aside."""
    numbers = []
    for key, value in row.items():
        if isinstance(value, dict):
            numbers += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "chance"):
            numbers.append((prefix + key, float(value)))
    return numbers
