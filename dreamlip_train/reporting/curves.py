"""How training went: the curves of one run, and of several over one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dreamlip_train.jobs.atomic_json import read_json_lines
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.reporting.style import COLORS, STYLE, legend_label, save_figure

_NATS = "nats"


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Small multiples over training steps from a run's metrics.jsonl, one panel for each quantity that was logged.

    Panels: loss and each of its parts, on scales of their own; held-out recall, learning rate, logit scales,
    throughput, share of time waiting for data. Steps that a resumed run logged again are drawn once, as logged last; a
    line cut off by a crash is passed over.

    Raises:
        UserError: the file has no logged step.
    """
    rows = _read_metrics(Path(metrics_jsonl))
    panels = [
        ("Loss", {"loss": "loss"}, _NATS),
        ("Contrastive loss", {"contrastive_loss": "contrastive loss"}, _NATS),
        ("Grouping loss", {"grouping_loss": "grouping loss"}, _NATS),
        ("Held-out R@1 by long caption", {"t2i": "text to image", "i2t": "image to text"}, "%"),
        ("Learning rate", {"lr": "lr"}, ""),
        ("Logit scales", {"logit_scale": "logit_scale", "logit_scale_local": "logit_scale_local"}, "multiplier"),
        ("Logit bias", {"logit_bias": "logit_bias"}, ""),
        ("Throughput", {"images_per_s": "images/s"}, "images/s"),
        ("Time waiting for data", {"data_wait": "data wait"}, "% of the step"),
    ]
    series = {name: _series(rows, name) for _, names, _ in panels for name in names}
    panels = [panel for panel in panels if any(series[name] for name in panel[1])]
    columns = min(3, len(panels))
    with plt.rc_context(STYLE):
        shape = (-(-len(panels) // columns), columns)
        figure, axes = plt.subplots(
            *shape, figsize=(4.0 * shape[1], 2.7 * shape[0]), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (title, names, unit) in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, title, unit, {label: series[name] for name, label in names.items() if series[name]})
        save_figure(figure, png)


# What runs are compared by: title, the quantity, unit.
_COMPARED = (
    ("Loss", "loss", _NATS),
    ("Held-out R@1, text to image", "t2i", "%"),
    ("Held-out R@1, image to text", "i2t", "%"),
    ("Contrastive loss", "contrastive_loss", _NATS),
    ("Grouping loss", "grouping_loss", _NATS),
    ("Gradient norm", "grad_norm", ""),
    ("Logit scale", "logit_scale", "multiplier"),
    ("Learning rate", "lr", ""),
    ("Throughput", "images_per_s", "images/s"),
    ("Time waiting for data", "data_wait", "% of the step"),
)


def plot_runs(metrics: dict[str, Path], png: str | Path) -> None:
    """Runs over one another, one panel for each quantity that any of them logged.

    Args:
        metrics: each run's label and its metrics.jsonl.
    Raises:
        UserError: a file has no logged step.
    """
    runs = {label: _read_metrics(path) for label, path in metrics.items()}
    panels = [
        (title, unit, {label: _series(rows, name) for label, rows in runs.items()}) for title, name, unit in _COMPARED
    ]
    panels = [
        (title, unit, {label: points for label, points in lines.items() if points}) for title, unit, lines in panels
    ]
    panels = [panel for panel in panels if panel[2]]
    colors = dict(
        zip(
            runs,
            (plt.get_cmap("turbo")(x) for x in np.linspace(0.08, 0.92, len(runs)))
            if len(runs) > len(COLORS)
            else COLORS,
            strict=False,
        )
    )
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.0 * columns, 2.7 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (title, unit, lines) in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, title, unit, lines, colors, legend=False)
        handles = [Line2D([], [], color=color, label=legend_label(label)) for label, color in colors.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
        save_figure(figure, png)


def _draw_panel(
    axis: Axes,
    title: str,
    unit: str,
    lines: dict[str, list[tuple[float, float]]],
    colors: dict[str, Any] | None = None,
    *,
    legend: bool = True,
) -> None:
    colors = colors or dict(zip(lines, COLORS, strict=False))
    for label, points in lines.items():
        marker = "o" if len(points) < 15 else None
        axis.plot(
            *zip(*points, strict=True), label=legend_label(label), color=colors[label], marker=marker, markersize=4
        )
    axis.set(title=title, xlabel="step", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.margins(x=0.02)
    values = [value for points in lines.values() for _, value in points]
    if unit == _NATS and min(values) < max(values):  # from 8.2 to 7.9 is a fall, not a line at the top
        axis.margins(y=0.08)
    else:
        axis.set_ylim(bottom=min(0, 1.08 * min(values)), top=max(values) * 1.08 if max(values) > 0 else 1)
    if legend and len(lines) > 1:
        axis.legend()


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged objects by ascending step; objects of the same step are merged, the later one's fields winning."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_json_lines(path):
        if "step" in row:
            by_step.setdefault(row["step"], {}).update(row)
    if not by_step:
        raise UserError(f"{path}: has no line with a step; train at least logging.every_steps steps")
    return [by_step[step] for step in sorted(by_step)]


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever the quantity was logged and finite."""
    points = []
    for row in rows:
        if name in ("t2i", "i2t"):
            value = row["retrieval"]["long_caption"][name]["r_at_1"] if "retrieval" in row else None
        else:
            value = row.get(name)
        if isinstance(value, int | float) and np.isfinite(value):
            points.append((row["step"], 100 * value if name == "data_wait" else value))
    return points
