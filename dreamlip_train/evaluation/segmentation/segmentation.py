"""Training-free semantic segmentation: each patch takes the class whose prompt it is most similar to (the weights learn
nothing here).

Shapes: C classes, T windows, S side of the model's picture, g x g patches of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dreamlip_train.evaluation import defaults
from dreamlip_train.evaluation.classification.class_prompts import class_features
from dreamlip_train.evaluation.features import eval_mode
from dreamlip_train.evaluation.pictures import read_picture
from dreamlip_train.evaluation.segmentation.segmentation_sets import IGNORED, Segmented, SetFiles, read_label_map
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP

_HELD_ELEMENTS = 2**24  # of similarities at the size of the picture
_MOST_SIDES = 16
_LOGIT_SCALE = 100.0  # of the softmax that the background threshold applies to; CLIP's


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows that cover 0..length, the last one flush with the end."""
    return [*range(0, length - window, stride), length - window]


@torch.no_grad()
def similarity_map(
    model: DreamLIP, image: Tensor, text_CD: Tensor, *, stride: int, batch_size: int = defaults.WINDOWS
) -> Tensor:
    """Cosine similarity of every pixel's patch and every class, windows averaged where they overlap:
    [C, H, W] of an image [3, H, W] uint8.

    The image's sides must be at least model.image_size.
    """
    side, (height, width) = model.image_size, image.shape[-2:]
    corners = [
        (top, left) for top in window_starts(height, side, stride) for left in window_starts(width, side, stride)
    ]
    total = torch.zeros(len(text_CD), height, width, device=text_CD.device)
    seen = torch.zeros(height, width, device=text_CD.device)
    for start in range(0, len(corners), batch_size):
        part = corners[start : start + batch_size]
        crops = torch.stack([image[:, top : top + side, left : left + side] for top, left in part]).to(text_CD.device)
        _, patch_TPD = model.encode_images(crops)
        if patch_TPD is None:
            raise UserError("segmentation: the image tower of this model gives no patches; use a ViT")
        similarity = F.normalize(patch_TPD.float(), dim=-1) @ text_CD.T  # [T, P, C]
        grid = similarity.transpose(1, 2).unflatten(2, model.grid)
        for (top, left), pixels in zip(
            part, F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False), strict=True
        ):
            total[:, top : top + side, left : left + side] += pixels
            seen[top : top + side, left : left + side] += 1
    return total / seen


def predict(similarity: Tensor, size: tuple[int, int], background_threshold: float | None) -> Tensor:
    """Class of each pixel of a [C, H, W] similarity map resized to ``size``; C where the softmax's largest probability
    is below the threshold.

    Some classes at a time: 847 of them at the size of a photograph are gigabytes.
    """
    best = torch.full(size, -torch.inf, device=similarity.device)
    class_of = torch.zeros(size, dtype=torch.long, device=similarity.device)
    total = torch.full_like(best, -torch.inf)
    step = max(1, _HELD_ELEMENTS // best.numel())
    for start in range(0, len(similarity), step):
        part = similarity[start : start + step]
        resized = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0]
        value, place = resized.max(dim=0)
        class_of = torch.where(value > best, start + place, class_of)
        best = torch.maximum(best, value)
        if background_threshold is not None:
            total = torch.logaddexp(total, (_LOGIT_SCALE * resized).logsumexp(dim=0))
    if background_threshold is not None:
        confident = (_LOGIT_SCALE * best - total).exp() >= background_threshold
        class_of = torch.where(confident, class_of, len(similarity))
    return class_of


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes, classes] int64 counts, row the label, column the prediction, without pixels labeled ``IGNORED``."""
    labeled = labels != IGNORED
    return torch.bincount(labels[labeled] * classes + predicted[labeled], minlength=classes**2).view(classes, classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """[classes] float64; NaN for a class that is neither labeled nor predicted anywhere."""
    counts = counts.double()
    hits = counts.diagonal()
    return hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)


def evaluate_segmentation(
    model: DreamLIP,
    pairs: Sequence[Segmented],
    layout: SetFiles,
    templates: Sequence[str],
    device: torch.device | str,
    *,
    batch_size: int = defaults.WINDOWS,
    resize: int = defaults.RESIZE,
    stride: int = defaults.STRIDE,
    background_threshold: float = defaults.BACKGROUND_THRESHOLD,
) -> dict[str, Any]:
    """mIoU of ``predict`` over the pairs.

    Args:
        batch_size: windows per forward pass.
        resize: the shorter side of each image in pixels before windows are cut; 0 takes one and a half windows.
        stride: pixels between windows; 0 takes half a window.
        background_threshold: for layouts that score the background.
    Returns:
        {"miou", "miou_labeled", "pixel_accuracy" in percent, "per_class": {class: percent or None}, "images",
        "settings"}. "miou" is the mean over the classes that are labeled or predicted anywhere, as mmsegmentation has
        it, "miou_labeled" that over the labeled ones, as Detectron2 and with it SAN have it.
    Raises:
        UserError: an image or label map can't be read, or their sizes differ (they are named).
    """
    side = model.image_size
    resize, stride = resize or side * 3 // 2, stride or side // 2
    if resize < side or not 0 < stride <= side:
        raise UserError(
            f"--resize, --stride: got {resize} and {stride}; windows have {side} pixels: "
            f"give resize >= {side} and 0 < stride <= {side}"
        )
    names = [*layout.classes, *(["background"] if layout.background else [])]
    threshold = background_threshold if layout.background else None
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    with eval_mode(model), torch.no_grad(), Progress("segment", len(pairs), "images") as progress:
        text_CD = class_features(model, layout.classes, templates, device)
        for image, labels in _pictures(pairs, layout):
            height, width = image.shape[-2:]
            shorter = min(height, width)
            # A row of 65,000 pixels would become gigabytes: what is longer than this is squeezed.
            scaled = [
                min(max(resize, round(length * resize / shorter)), _MOST_SIDES * resize) for length in (height, width)
            ]
            large = functional.resize(image, scaled, InterpolationMode.BICUBIC, antialias=True)
            predicted = predict(
                similarity_map(model, large, text_CD, stride=stride, batch_size=batch_size), (height, width), threshold
            ).cpu()
            counts += confusion(predicted, labels, len(names))
            progress.advance(text=f"mIoU so far {100 * _mean(intersection_over_union(counts)):.1f} %")
    overlap = intersection_over_union(counts)
    return {
        "miou": 100 * _mean(overlap),
        "miou_labeled": 100 * _mean(overlap[counts.sum(dim=1) > 0]),
        "pixel_accuracy": 100 * float(counts.diagonal().sum() / counts.sum().clamp(min=1)),
        "per_class": {
            name: None if torch.isnan(value) else 100 * float(value) for name, value in zip(names, overlap, strict=True)
        },
        "images": len(pairs),
        "settings": {
            "resize": resize,
            "stride": stride,
            "background_threshold": threshold,
            "templates": len(templates),
        },
    }


def _pictures(pairs: Sequence[Segmented], layout: SetFiles) -> Iterator[tuple[Tensor, Tensor]]:
    for pair in pairs:
        image = read_picture(pair.image, "--root")
        labels = torch.from_numpy(read_label_map(pair.labels, layout))
        if image.shape[-2:] != labels.shape:
            raise UserError(
                f"--root: {pair.image} is {tuple(image.shape[-2:])} pixels, its label map {tuple(labels.shape)}; "
                "they belong to different images"
            )
        yield image, labels


def _mean(values: Tensor) -> float:
    return float(values[~torch.isnan(values)].mean()) if not bool(torch.isnan(values).all()) else 0.0


def format_segmentation(result: dict[str, Any]) -> str:
    """mIoU, accuracy and every class, as text to read."""
    by_score = sorted(((value, name) for name, value in result["per_class"].items() if value is not None), reverse=True)
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
    lines = [
        f"{result['images']} images ({settings})",
        f"mIoU {result['miou']:.1f} % ({result['miou_labeled']:.1f} % over the classes that are labeled), "
        f"pixel accuracy {result['pixel_accuracy']:.1f} %",
    ]
    cells = [f"{name} {value:.1f}" for value, name in by_score]
    lines += ["  " + ", ".join(cells[start : start + 8]) for start in range(0, len(cells), 8)]
    return "\n".join(lines)
