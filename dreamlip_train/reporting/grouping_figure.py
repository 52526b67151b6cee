"""``grouping.png``: where held-out sub-captions look, one row per picture.

Shapes: N pictures, K sub-captions of one picture, P patches, D embedding width, H x W pixels, C channels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dreamlip_train.config.schema import Normalization
from dreamlip_train.data.images import ImageError, decode_image, resize_center_crop
from dreamlip_train.evaluation.features import encode_batch, eval_mode, sub_caption_weights
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.reporting.style import COLORS, INK, MUTED, STYLE, save_figure

# Inches: a picture's side, the space between, the caption band under it, the page's margin.
_CELL, _GAP, _BAND, _MARGIN = 1.62, 0.10, 0.62, 0.12
_SHOWN_PIXELS = 320  # a picture is drawn with about so many pixels a side, so that patch edges stay sharp


def plot_grouping(
    model: Any,
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
    samples_to_draw = list(islice((sample for sample in samples if sample["sentences"]), rows))
    if not samples_to_draw:
        raise UserError("plot_grouping: samples: none has a sentence to draw; check data.eval_source")
    samples_to_draw = [sample | {"sentences": sample["sentences"][:columns]} for sample in samples_to_draw]
    with eval_mode(model), torch.no_grad():
        _, patch_nPD, text_KD = encode_batch(model, samples_to_draw, next(model.parameters()).device)
        if patch_nPD is None:
            raise UserError(
                "plot_grouping: the model gives no patch features, so nothing is selected; "
                "train with loss.grouping_weight > 0"
            )
        weights_KP = [weights.cpu() for weights in sub_caption_weights(patch_nPD, text_KD, threshold, normalization)]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure = _draw_rows(samples_to_draw, weights_KP, model.grid)
        save_figure(figure, png)


def plot_sentences(
    model: Any,
    name: str,
    data: bytes,
    sentences: list[str],
    png: str | Path,
    *,
    threshold: float | None = None,
    normalization: Normalization = "minmax",
) -> None:
    """The same figure of one picture file and any sentences, four in a row; ``name`` stands under the picture.

    Raises:
        UserError: the bytes are no whole picture, or the model gives no patch features.
    """
    try:
        image = resize_center_crop(decode_image(data), model.image_size)
    except ImageError as error:
        raise UserError(f"{name!r} is no picture that can be read: {error}") from error
    sample = {"key": name, "image": image, "raw": name, "mask": None}
    rows = [sample | {"sentences": sentences[i : i + 4]} for i in range(0, len(sentences), 4)]
    plot_grouping(model, rows, png, rows=len(rows), threshold=threshold, normalization=normalization)


def _draw_rows(samples: list[dict[str, Any]], weights: list[Tensor], grid: tuple[int, int]) -> Figure:
    """A figure on a fixed grid in inches: captions of any length leave the pictures aligned."""
    columns = 1 + max(len(sample["sentences"]) for sample in samples)
    width = 2 * _MARGIN + columns * (_CELL + _GAP) - _GAP
    height = 2 * _MARGIN + len(samples) * (_CELL + _BAND)
    figure = plt.figure(figsize=(width, height))
    for row, (sample, weights_KP) in enumerate(zip(samples, weights, strict=True)):
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
    one color per sub-caption.
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
    lines = textwrap.wrap(plain(caption), 27, max_lines=4, placeholder=" …")
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
