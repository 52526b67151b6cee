"""The numbers of a run to TensorBoard and to Weights & Biases, where those are installed."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.user_error import UserError

_KEPT_ROWS = 100_000


class TensorBoard:
    """Event files in ``folder``; nothing where TensorBoard is not installed.

    Rows that could not be written (a full disk) are kept and written to a new event file when there is room.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say, self.writer = folder, say, None
        self.waiting: deque[tuple[int, dict[str, float]]] = deque(maxlen=_KEPT_ROWS)
        self.failing = False
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.make = None
        else:
            self.make = SummaryWriter
            if not isinstance(threading.excepthook, _QuietAboutFullDisks):
                threading.excepthook = _QuietAboutFullDisks(threading.excepthook)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """``numbers`` by name at ``step``, in the file when this returns."""
        if self.make is None:
            return
        self.waiting.append((step, numbers))
        try:
            self.writer = self.writer or self.make(str(self.folder))
            for at, row in self.waiting:
                for name, value in row.items():
                    self.writer.add_scalar(name, value, at)
            self.writer.flush()
        except OSError as error:
            self.writer = None  # its thread has ended
            if not self.failing:
                self.failing = True
                self.say(
                    f"{self.folder} CAN'T BE WRITTEN: {error.strerror}. Training continues and writes it when there is "
                    "room"
                )
            return
        self.waiting.clear()
        self.failing = False

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


class _QuietAboutFullDisks:
    """A ``threading.excepthook`` without the traceback that each of TensorBoard's writer threads ends with on a full
    disk: ``TensorBoard.add`` gets the same error, and says it once.
    """

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self.hook = hook

    def __call__(self, arguments: Any) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread" or not issubclass(arguments.exc_type, OSError):
            self.hook(arguments)


def start_wandb(run_dir: Path, project: str, config: Any) -> Any:
    """A W&B run with the settings of ``config``; the same run folder resumes it, another one of the same name is
    another run.

    Raises:
        UserError: wandb is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise UserError(
            "logging.wandb_project: wandb is not installed; pip install 'dreamlip[wandb]', or leave the project empty"
        ) from error
    path = run_dir.absolute()
    identity = f"{path.name[:40]}-{hashlib.sha256(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in identity)
    return wandb.init(
        project=project,
        name=plain(path.name),
        id=safe,
        config=None if config is None else config.to_dict(),
        dir=str(run_dir),
        resume="allow",
    )
