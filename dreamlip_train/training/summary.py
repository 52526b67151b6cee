"""The end of a run: held-out numbers, ``summary.json``, ``curves.png``, ``grouping.png`` and a printed table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamlip_train.config.schema import Config
from dreamlip_train.data.validation import val_samples
from dreamlip_train.evaluation.held_out import format_held_out
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.user_error import RunError
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.monitoring.run_log import RunLog
from dreamlip_train.training.evaluation import headline


def final_report(
    model: DreamLIP,
    config: Config,
    run_dir: Path,
    log: RunLog,
    facts: dict[str, Any],
    report: dict[str, Any],
) -> dict[str, Any]:
    """Write summary.json (``facts`` and the numbers of the last evaluation, ``report``), print the table, draw the
    pictures.

    A picture that can't be drawn is a line in the log: no number is lost to it.
    """
    summary = facts | report
    if report:
        log.row({"step": facts["steps"], **report}, headline(report))
    if "retrieval" in report:
        log.message(format_held_out(report))
    path = run_dir / "summary.json"
    try:
        write_json(path, summary)
    except OSError as error:
        raise RunError(
            f"{path} can't be written: {error.strerror}. Make room and give the same command again"
        ) from error
    _draw(model, config, run_dir, log)
    log.message(f"{facts['steps']} steps in {facts['seconds']:.0f} s; everything is in {run_dir}")
    return summary


def _draw(model: DreamLIP, config: Config, run_dir: Path, log: RunLog) -> None:
    from dreamlip_train.reporting.curves import plot_curves
    from dreamlip_train.reporting.grouping_figure import plot_grouping

    def grouping(path: Path) -> None:
        samples = val_samples(config.data, image_size=model.image_size)
        plot_grouping(model, samples, path, **config.selection())

    pictures: dict[str, Callable[[Path], None]] = {
        "curves.png": lambda path: plot_curves(run_dir / "metrics.jsonl", path)
    }
    if config.data.val_shards and config.loss.grouping_weight > 0:
        pictures["grouping.png"] = grouping
    for name, draw in pictures.items():
        try:
            draw(run_dir / name)
        except Exception as error:  # whatever a drawing library makes of names, captions and a full disk
            log.message(f"{name} could not be drawn: {type(error).__name__}: {error}")
            log.traceback()
