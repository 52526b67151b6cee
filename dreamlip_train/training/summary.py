"""The end of a run: held-out numbers, ``summary.json``, ``curves.png``, ``grouping.png`` and a printed table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreamlip_train.config.schema import Config
from dreamlip_train.data.validation import val_samples
from dreamlip_train.evaluation.held_out import evaluate, format_report
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.monitoring.run_log import RunLog


def final_report(
    model: DreamLIP,
    config: Config,
    run_dir: Path,
    log: RunLog,
    facts: dict[str, Any],
    device: torch.device,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Evaluate on data.val_shards where given, draw the pictures, write summary.json (``facts`` and the numbers), print the table."""
    from dreamlip_train.reporting.curves import plot_curves, plot_grouping

    summary = dict(facts)
    selection = config.selection()
    if config.data.val_shards:
        report = evaluate(model, config.data, config.eval, device, **selection, should_stop=should_stop)
        summary |= report
        recall = report["retrieval"]["long_caption"]
        log.row(
            {"step": facts["steps"], **report},
            f"held-out R@1 {recall['t2i']['r_at_1']:.1f} / {recall['i2t']['r_at_1']:.1f}",
        )
        if config.loss.grouping_weight > 0:
            samples = val_samples(config.data, image_size=model.image_size)
            plot_grouping(model, samples, run_dir / "grouping.png", **selection)
    plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    write_json(run_dir / "summary.json", summary)
    if config.data.val_shards:
        log.message(format_report(report))
    log.message(f"{facts['steps']} steps in {facts['seconds']:.0f} s; everything is in {run_dir}")
    return summary
