"""Two pictures of a run: ``curves.png``, how training went, and ``grouping.png``, where held-out sub-captions look."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dreamlip_train.config.schema import Normalization
from dreamlip_train.evaluation.features import encode_batch, eval_mode, sub_caption_weights
from dreamlip_train.jobs.user_error import UserError

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = ("#2563eb", "#e8590c", "#0f9d76", "#c2255c", "#7048e8")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # captions and names are text: a "$" in them is a dollar
}


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Small multiples over training steps from a run's metrics.jsonl, one panel for each quantity that was logged.

    Panels: loss and its parts, held-out recall, learning rate, logit scales, throughput, share of time waiting for
    data. Steps that a resumed run logged again are drawn once, as logged last; a line cut off by a crash is passed
    over.

    Raises:
        UserError: the file has no logged step.
    """
    rows = _read_metrics(Path(metrics_jsonl))
    panels = [
        ("Loss", {name: name for name in ("loss", "contrastive_loss", "grouping_loss")}, "nats"),
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
        figure.savefig(png, dpi=150, facecolor="white")
        plt.close(figure)


# What runs are compared by: title, the quantity, unit.
_COMPARED = (
    ("Loss", "loss", "nats"),
    ("Held-out R@1, text to image", "t2i", "%"),
    ("Held-out R@1, image to text", "i2t", "%"),
    ("Contrastive loss", "contrastive_loss", "nats"),
    ("Grouping loss", "grouping_loss", "nats"),
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
        handles = [plt.Line2D([], [], color=color, label=label) for label, color in colors.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
        figure.savefig(png, dpi=150, facecolor="white")
        plt.close(figure)


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
        axis.plot(*zip(*points, strict=True), label=label, color=colors[label], marker=marker, markersize=4)
    axis.set(title=title, xlabel="step", ylabel=unit)
    axis.margins(x=0.02)
    highest = max(value for points in lines.values() for _, value in points)
    axis.set_ylim(bottom=0, top=highest * 1.08 if highest > 0 else 1)
    if legend and len(lines) > 1:
        axis.legend()


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged objects by ascending step; objects of the same step are merged, the later one's fields winning."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
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


def plot_grouping(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    png: str | Path,
    *,
    rows: int = 6,
    columns: int = 4,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
) -> None:
    """A row for each of the first samples with sentences: the picture, then for each sub-caption the patches its text
    selects.

    Selected patches show the picture in full color in proportion to their weight (the largest weight of a sub-caption
    is fully lit), everything else is dimmed. A sample's mask, where it has one, is drawn as an outline.

    Args:
        model: DreamLIP (model/dreamlip.py) with patch features.
        samples: what held_out.val_samples yields; only as many as are drawn are read.
        threshold, normalization: of the patch selection; pass the run's loss.threshold and loss.normalization.
    Raises:
        UserError: no sample has a sentence, or the model gives no patch features.
    """
    shown = list(islice((sample for sample in samples if sample["sentences"]), rows))
    if not shown:
        raise UserError("plot_grouping: samples: none has a sentence to draw; check data.eval_source")
    shown = [sample | {"sentences": sample["sentences"][:columns]} for sample in shown]
    with eval_mode(model), torch.no_grad():
        _, patch_nPD, text_KD = encode_batch(model, shown, next(model.parameters()).device)
        if patch_nPD is None:
            raise UserError(
                "plot_grouping: the model gives no patch features, so nothing is selected; "
                "train with loss.grouping_weight > 0"
            )
        weights_KP = [weights.cpu() for weights in sub_caption_weights(patch_nPD, text_KD, threshold, normalization)]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure = _draw_rows(shown, weights_KP, model.grid)
        figure.savefig(png, dpi=150, facecolor="white")
        plt.close(figure)


_CELL, _GAP, _BAND, _MARGIN = (
    1.62,
    0.10,
    0.62,
    0.12,
)  # inches: picture side, space between, caption band under it, page margin
_SHOWN_PIXELS = 320  # a picture is drawn with about so many pixels a side, so that patch edges stay sharp


def _draw_rows(shown: list[dict[str, Any]], weights: list[Tensor], grid: tuple[int, int]) -> Figure:
    """A figure on a fixed grid in inches: captions of any length leave the pictures aligned."""
    columns = 1 + max(len(sample["sentences"]) for sample in shown)
    width = 2 * _MARGIN + columns * (_CELL + _GAP) - _GAP
    height = 2 * _MARGIN + len(shown) * (_CELL + _BAND)
    figure = plt.figure(figsize=(width, height))
    for row, (sample, weights_KP) in enumerate(zip(shown, weights, strict=True)):
        bottom = height - _MARGIN - row * (_CELL + _BAND) - _CELL
        axes = []
        for column in range(1 + len(sample["sentences"])):
            left = _MARGIN + column * (_CELL + _GAP)
            axes.append(figure.add_axes((left / width, bottom / height, _CELL / width, _CELL / height)))
            axes[-1].set_axis_off()
        _draw_sample(axes, sample, weights_KP, grid)
    return figure


def _draw_sample(axes: list[Axes], sample: dict[str, Any], weights_KP: Tensor, grid: tuple[int, int]) -> None:
    """The picture with all outlines and the raw caption, then a spotlight for each sub-caption;
    one color a sub-caption.
    """
    side = sample["image"].shape[1]
    zoom = max(1, round(_SHOWN_PIXELS / side))
    picture_HWC = _enlarged(sample["image"], zoom)
    _show(axes[0], picture_HWC, sample["raw"] or "", MUTED)
    for slot, (axis, sentence, weights_P) in enumerate(zip(axes[1:], sample["sentences"], weights_KP, strict=True)):
        color = COLORS[slot % len(COLORS)]
        _show(axis, _spotlight(picture_HWC, weights_P, grid, side // grid[0] * zoom), sentence, color)
        if sample["mask"] is not None and bool((sample["mask"] == slot + 1).any()):
            for target in (axes[0], axis):
                _outline(target, sample["mask"] == slot + 1, zoom, color)


def _show(axis: Axes, picture_HWC: np.ndarray, caption: str, color: str) -> None:
    axis.imshow(picture_HWC, interpolation="antialiased")
    axis.autoscale(False)
    lines = textwrap.wrap(caption, 27, max_lines=4, placeholder=" …")
    style = {"transform": axis.transAxes, "va": "top", "fontsize": 7, "linespacing": 1.15}
    axis.text(
        0,
        -0.04,
        "\n".join(lines),
        color=MUTED if color == MUTED else INK,
        style="italic" if color == MUTED else "normal",
        **style,
    )
    if color != MUTED:
        axis.plot(
            [0, 1],
            [-0.012, -0.012],
            transform=axis.transAxes,
            color=color,
            linewidth=2.5,
            solid_capstyle="butt",
            clip_on=False,
        )


def _outline(axis: Axes, region_HW: Tensor, zoom: int, color: str) -> None:
    """The region's border, closed also where the region touches the edge of the picture;
    white under the color, to show on any ground.
    """
    padded = nn.functional.pad(region_HW.float(), (1, 1, 1, 1)).numpy()
    across, down = ((np.arange(size) - 0.5) * zoom - 0.5 for size in padded.shape[::-1])
    for ink, width in (("white", 2.4), (color, 1.3)):
        axis.contour(across, down, padded, levels=[0.5], colors=[ink], linewidths=width)


def _enlarged(image_CHW: Tensor, zoom: int) -> np.ndarray:
    """uint8 [3, H, W] -> float [zoom * H, zoom * W, 3] in [0, 1]."""
    large = nn.functional.interpolate(
        image_CHW[None].float() / 255, scale_factor=zoom, mode="bicubic", align_corners=False
    )
    return large[0].clamp(0, 1).permute(1, 2, 0).numpy()


def _spotlight(picture_HWC: np.ndarray, weights_P: Tensor, grid: tuple[int, int], patch_pixels: int) -> np.ndarray:
    """The picture, lit patch by patch in proportion to weight over a dimmed gray copy of itself;
    border pixels of no patch stay dim.
    """
    height, width, _ = picture_HWC.shape
    light = (
        (weights_P / weights_P.max()).reshape(grid).numpy().repeat(patch_pixels, axis=0).repeat(patch_pixels, axis=1)
    )
    light = np.pad(light, ((0, height - light.shape[0]), (0, width - light.shape[1])))[..., None]
    dimmed = 0.10 + 0.22 * picture_HWC.mean(axis=2, keepdims=True)
    return light * picture_HWC + (1 - light) * dimmed
