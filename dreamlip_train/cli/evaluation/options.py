"""What every ``eval`` command takes and does: parse, try --output, load the model, score, write, print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from dreamlip_train.cli.usage import require_writable, say
from dreamlip_train.evaluation import defaults
from dreamlip_train.jobs.user_error import UserError

Score = Callable[[Any, Any, Any], Any]
"""(model, config, device) -> the numbers."""
Show = Callable[[Any], str]


@dataclass(kw_only=True)
class EvalOptions:
    """What every evaluation takes."""

    command: ClassVar[str]
    """The command that --output's file is of."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    model: str = ""
    """open_clip model name of a weights file."""
    weights: Literal["", "average", "raw"] = ""
    """"average": the moving average of a run with train.ema_decay; "raw": the weights of the last step; empty: what the
    run's eval.weights says, which is raw where nobody set it.
    """
    batch_size: int = defaults.BATCH_SIZE
    """Images per forward pass."""
    output: str = ""
    """Also write the numbers to this JSON file."""


Options = TypeVar("Options", bound=EvalOptions)


def parse(kind: type[Options], arguments: list[str], program: str) -> Options:
    """The options, once it is sure that hours of evaluation will not end at a folder that is not there."""
    options = tyro.cli(kind, args=arguments, prog=program)
    if options.batch_size < 1:
        raise UserError(f"--batch-size: got {options.batch_size}; give at least 1")
    require_writable(options.output)
    return options


def load(options: EvalOptions) -> tuple[Any, Any, Any]:
    """(model, config, device)."""
    import torch

    from dreamlip_train.checkpoint.weights import load_for_eval

    model, config = load_for_eval(options.checkpoint, options.model, options.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), config, device


def run(options: EvalOptions, score: Score, show: Show) -> Any:
    """Load the model, score it, write and print what that gives."""
    scores = score(*load(options))
    write(options, scores)
    say(show(scores))
    return scores


def write(options: EvalOptions, scores: Any) -> None:
    """The numbers to --output, with what they are of."""
    if options.output:
        from dreamlip_train.jobs.atomic_json import write_json

        settings = {name: value for name, value in vars(options).items() if name != "output"}
        write_json(Path(options.output), {"evaluation": {"command": options.command, **settings}} | scores)
