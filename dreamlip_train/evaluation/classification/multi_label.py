"""Multi-label recognition: the average precision of image and class-prompt similarities (the paper's Table 5).

The lists are those of the Recognize Anything benchmark, which DreamLIP uses (OpenImages common and rare,
ImageNet-Multi, HICO): a tag list, one class per line, and annotations, one image per line: ``IMAGE,tag,tag,...`` (tags
by name, or by their position in the list) or ``IMAGE,7 12 40`` (positions). A name that the list has twice, as
ImageNet-Multi's has two "missile" and two "sunglasses", can be given by position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.evaluation import defaults
from dreamlip_train.evaluation.classification.class_prompts import class_features
from dreamlip_train.evaluation.features import eval_mode
from dreamlip_train.evaluation.pictures import model_picture
from dreamlip_train.evaluation.set_files import require_all
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP

_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Labeled:
    """Image files and, for each, the positions of its classes."""

    images: list[Path]
    labels: list[list[int]]


def read_labels(annotations: str | Path, classes: Sequence[str], images: str | Path) -> Labeled:
    """The images and labels of an annotation file.

    Raises:
        UserError: the file can't be read or is empty, a tag is not in ``classes`` (it is named), an image comes twice,
            or images are missing.
    """
    path, folder = Path(annotations), Path(images)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--annotations: cannot read {str(path)!r}: {error}") from error
    if not lines:
        raise UserError(f"--annotations: {str(path)!r} has no image")
    if not folder.is_dir():
        raise UserError(f"--images: no folder {str(folder)!r}")
    position = {name: index for index, name in enumerate(classes) if classes.count(name) == 1}
    rows: list[tuple[str, list[int]]] = []
    for number, line in enumerate(lines, 1):
        name, *tags = (part.strip() for part in line.split(","))
        labels = []
        for tag in filter(None, _separated(tags, position)):
            index = position.get(tag, int(tag) if tag.isdecimal() and int(tag) < len(classes) else None)
            if index is None:
                raise UserError(
                    f"--annotations: {path.name} line {number}: the label {tag!r} is not among the {len(classes)} "
                    "classes; "
                    "give the tag list that belongs to these annotations"
                )
            labels.append(index)
        rows.append((name, labels))
    if len({name for name, _ in rows}) < len(rows):
        raise UserError(f"--annotations: {str(path)!r} lists an image twice")
    files = [
        next((file for ending in _ENDINGS if (file := folder / (name + ending)).is_file()), None) for name, _ in rows
    ]
    missing = [name for (name, _), file in zip(rows, files, strict=True) if file is None]
    require_all(missing, "--images", f"{len(rows)} images in {str(folder)!r}")
    return Labeled([file for file in files if file is not None], [labels for _, labels in rows])


def _separated(tags: list[str], position: dict[str, int]) -> list[str]:
    """The tags, positions that share one field apart: "7 12 40" is three unless a class is called so."""
    return [
        part
        for tag in tags
        for part in (tag.split() if tag not in position and tag.replace(" ", "").isdecimal() else [tag])
    ]


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """``AP = sum_t (R_t - R_{t-1}) P_t`` over the distinct scores t, descending; scikit-learn's definition,
    ties as one step.

    Args:
        scores: [N, C] floats.
        targets: [N, C] bool.
    Returns:
        [C] float64 in [0, 1]; NaN for a class without a positive.
    Raises:
        ValueError: shapes disagree or a score is not finite.
    """
    if scores.shape != targets.shape or scores.ndim != 2 or targets.dtype != torch.bool:
        raise ValueError(
            f"average_precision: scores [N, C] and targets [N, C] bool, got {tuple(scores.shape)} and "
            f"{tuple(targets.shape)} {targets.dtype}"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("average_precision: scores hold NaN or infinite values; check the weights")
    ordered_NC, order_NC = scores.sort(dim=0, descending=True, stable=True)
    hits_NC = targets.gather(0, order_NC).double().cumsum(dim=0)
    ranks_N1 = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    last_NC = torch.ones_like(targets)
    last_NC[:-1] = ordered_NC[:-1] != ordered_NC[1:]  # a threshold lies behind each group of equal scores
    # Hits at the threshold before: the running maximum of those at the thresholds so far, one row down.
    at_NC = torch.where(last_NC, hits_NC, 0.0).cummax(dim=0).values
    before_NC = torch.cat([torch.zeros_like(at_NC[:1]), at_NC[:-1]])
    steps_NC = torch.where(last_NC, hits_NC - before_NC, 0.0)
    return (steps_NC * hits_NC / ranks_N1).sum(dim=0) / hits_NC[-1]


def evaluate_multi_label(
    model: DreamLIP,
    label_set: Labeled,
    classes: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str,
    batch_size: int = defaults.BATCH_SIZE,
) -> dict[str, Any]:
    """Average precision of cosine similarity for each class.

    Returns:
        {"map": percent, the mean over the classes that have an image, "chance": percent, the mean share of images a
        class is in, "per_class": {class: percent or None}, "images", "classes", "without_images":
        classes that no image has}.
    Raises:
        UserError: an image is damaged, or no class has an image.
    """
    rows = []
    with eval_mode(model), torch.no_grad(), Progress("multilabel", len(label_set.images), "images") as progress:
        text_CD = class_features(model, classes, templates, device)
        for start in range(0, len(label_set.images), batch_size):
            files = label_set.images[start : start + batch_size]
            image_nD, _ = model.encode_images(
                torch.stack([model_picture(file, model.image_size, "--images") for file in files]).to(device)
            )
            rows.append((image_nD.float() @ text_CD.T).cpu())
            progress.advance(len(files))
    targets = torch.zeros(len(label_set.images), len(classes), dtype=torch.bool)
    for row, labels in enumerate(label_set.labels):
        targets[row, labels] = True
    precision = 100 * average_precision(torch.cat(rows), targets)
    has_images = targets.any(dim=0)
    if not bool(has_images.any()):
        raise UserError("--annotations: no image has a label")
    return {
        "map": float(precision[has_images].mean()),
        "chance": 100 * float(targets.double().mean(dim=0)[has_images].mean()),
        "per_class": {
            name: float(value) if has else None
            for name, value, has in zip(_distinct(classes), precision, has_images.tolist(), strict=True)
        },
        "images": len(label_set.images),
        "classes": len(classes),
        "without_images": int((~has_images).sum()),
    }


def _distinct(classes: Sequence[str]) -> list[str]:
    """The names; those that come twice with their position."""
    return [name if classes.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(classes)]


def format_multi_label(scores: dict[str, Any], count: int = 5) -> str:
    """The mean, chance, and the best and worst classes, as text to read."""
    by_score = sorted(((value, name) for name, value in scores["per_class"].items() if value is not None), reverse=True)
    lines = [
        f"{scores['images']} images, {scores['classes']} classes",
        f"mAP, % (chance)  {scores['map']:.1f} ({scores['chance']:.1f})",
    ]
    if scores["without_images"]:
        lines.append(f"left out of the mean: {scores['without_images']} classes that no image has")
    lines.append("best   " + ", ".join(f"{name} {value:.0f}" for value, name in by_score[:count]))
    lines.append("worst  " + ", ".join(f"{name} {value:.0f}" for value, name in reversed(by_score[-count:])))
    return "\n".join(lines)
