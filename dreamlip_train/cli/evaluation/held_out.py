"""``eval retrieval`` and ``eval localize``: a run on its held-out shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from dreamlip_train.cli.evaluation.options import EvalOptions, parse, run
from dreamlip_train.config.schema import EvalConfig
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError


@dataclass(kw_only=True)
class HeldOutOptions(EvalOptions):
    """Evaluate a checkpoint on held-out shards."""

    command: ClassVar[str] = "retrieval"

    val_shards: str = ""
    """Held-out shards; empty means those of the run."""
    source: str = ""
    """Caption column whose sentences are the queries; empty means the run's data.eval_source."""
    max_samples: int = 0
    """Evaluate on the first so many samples; 0 means all."""


def retrieval(arguments: list[str], program: str) -> None:
    """Text-to-image and image-to-text R@1/5/10 by long caption and by sentence"""
    _held_out(parse(HeldOutOptions, arguments, program), localize=False)


def localize(arguments: list[str], program: str) -> None:
    """How well the patches each sub-caption selects agree with the masks"""
    _held_out(parse(HeldOutOptions, arguments, program), localize=True)


def _held_out(options: HeldOutOptions, *, localize: bool) -> None:
    def score(model: Any, config: Any, device: Any) -> dict[str, Any]:
        from dreamlip_train.evaluation.held_out import count_held_out, evaluate

        data = dataclasses.replace(
            config.data,
            val_shards=options.val_shards or config.data.val_shards,
            eval_source=options.source or config.data.eval_source,
        )
        if not data.val_shards:
            raise UserError("--val-shards: the checkpoint's run had none; give held-out shards")
        settings = EvalConfig(batch_size=options.batch_size, max_samples=options.max_samples)
        with Progress(options.command, count_held_out(data, options.max_samples), "images") as progress:
            report = evaluate(
                model, data, settings, device, **config.selection(), localize=localize, on_batch=progress.advance
            )
        if localize and report["localization"] is None:
            raise UserError(
                "--val-shards: no sample has a mask (KEY.mask.png) and the model patch features, "
                "so there is nothing to compare the selected patches with"
            )
        return report

    from dreamlip_train.evaluation.held_out import format_held_out

    run(options, score, format_held_out)
