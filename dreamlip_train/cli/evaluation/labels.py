"""``eval zeroshot``, ``multilabel`` and ``segment``: images, and patches, compared with the prompts of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dreamlip_train.cli.evaluation.options import EvalOptions, Score, Show, parse, run, write
from dreamlip_train.evaluation import defaults
from dreamlip_train.jobs.user_error import UserError


@dataclass(kw_only=True)
class ZeroShotOptions(EvalOptions):
    """Zero-shot classification on clip_benchmark's data sets. --output is written after each of them."""

    command: ClassVar[str] = "zeroshot"

    root: str
    """Where the data sets are or are downloaded to; "{dataset}" and "{dataset_cleaned}" in it stand for a name."""
    datasets: tuple[str, ...] = ()
    """clip_benchmark's names ("wds/NAME" for a webdataset folder); empty means the paper's eleven."""
    split: str = defaults.SPLIT
    """Split to evaluate."""
    workers: int = defaults.WORKERS
    """Loader processes."""


def zeroshot(arguments: list[str], program: str) -> None:
    """Accuracy on ImageNet and ten other sets through clip_benchmark: CHECKPOINT --root DIR [--datasets NAME ...]"""
    options = parse(ZeroShotOptions, arguments, program)
    scores = run(options, *zeroshot_job(options))
    errors = [name for name, row in scores.items() if "error" in row]
    if errors:
        raise UserError(
            f"--datasets: {len(errors)} of {len(scores)} could not be evaluated: {', '.join(errors)} (see the table)"
        )


def zeroshot_job(options: ZeroShotOptions) -> tuple[Score, Show]:
    """How the sets are scored and shown."""
    from dreamlip_train.evaluation.classification.zero_shot import DATASETS, evaluate_zero_shot, format_zero_shot

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_zero_shot(
            model,
            options.datasets or DATASETS,
            options.root,
            device,
            split=options.split,
            batch_size=options.batch_size,
            workers=options.workers,
            keep=lambda so_far: write(options, so_far),
        )

    return score, format_zero_shot


@dataclass(kw_only=True)
class MultiLabelOptions(EvalOptions):
    """Multi-label recognition: mean average precision over classes."""

    command: ClassVar[str] = "multilabel"

    annotations: str
    """One image per line: IMAGE,tag,tag,... (tags by name or by position in the class list) or IMAGE,7 12 40."""
    classes: str
    """The class (tag) list, one per line; "a; b" are two names of one class."""
    images: str
    """Folder the annotations' images are below, with or without their file ending."""
    templates: str = "photo"
    """"photo" (a photo of a {c}.), "imagenet" (CLIP's 80), or a file with a template per line."""


def multilabel(arguments: list[str], program: str) -> None:
    """mAP on OpenImages, ImageNet-Multi or HICO lists: CHECKPOINT --annotations FILE --classes FILE --images DIR"""
    options = parse(MultiLabelOptions, arguments, program)
    run(options, *multilabel_job(options))


def multilabel_job(options: MultiLabelOptions) -> tuple[Score, Show]:
    """Read the lists; how they are scored and shown."""
    from dreamlip_train.evaluation.classification.class_prompts import read_classes, read_templates
    from dreamlip_train.evaluation.classification.multi_label import (
        evaluate_multi_label,
        format_multi_label,
        read_labels,
    )

    classes, templates = read_classes(options.classes, repeated_allowed=True), read_templates(options.templates)
    label_set = read_labels(options.annotations, classes, options.images)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_multi_label(model, label_set, classes, templates, device, options.batch_size)

    return score, format_multi_label


@dataclass(kw_only=True)
class SegmentationOptions(EvalOptions):
    """Training-free segmentation by the class-prompt similarity of patches."""

    command: ClassVar[str] = "segment"

    root: str
    """Folder of the set."""
    layout: Literal[
        "voc20", "voc21", "pc59", "pc60", "pc459", "ade150", "ade847", "coco-stuff", "coco-object", "cityscapes"
    ]
    """The set; voc21, pc60 and coco-object score the background too."""
    classes: str = ""
    """Other names for the layout's classes, one per line in its order; "a; b" are two names of one class."""
    templates: str = "imagenet"
    """"photo" (a photo of a {c}.), "imagenet" (CLIP's 80), or a file with a template per line."""
    batch_size: int = defaults.WINDOWS
    """Windows per forward pass."""
    resize: int = defaults.RESIZE
    """Shorter side of each image in pixels; 0 takes one and a half windows (the model's picture)."""
    stride: int = defaults.STRIDE
    """Pixels between windows; 0 takes half a window."""
    background_threshold: float = defaults.BACKGROUND_THRESHOLD
    """A pixel whose best class has a lower probability (softmax of 100 x cosine) is background."""


def segment(arguments: list[str], program: str) -> None:
    """mIoU on VOC, Context, ADE, COCO, Cityscapes without training: CHECKPOINT --root DIR --layout NAME"""
    options = parse(SegmentationOptions, arguments, program)
    run(options, *segment_job(options))


def segment_job(options: SegmentationOptions) -> tuple[Score, Show]:
    """Read the set; how it is scored and shown."""
    from dreamlip_train.evaluation.classification.class_prompts import read_templates
    from dreamlip_train.evaluation.segmentation.segmentation import evaluate_segmentation, format_segmentation
    from dreamlip_train.evaluation.segmentation.segmentation_sets import layout_named, read_segmentation

    layout = layout_named(options.layout, options.classes)
    pairs, templates = read_segmentation(options.root, layout), read_templates(options.templates)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_segmentation(
            model,
            pairs,
            layout,
            templates,
            device,
            batch_size=options.batch_size,
            resize=options.resize,
            stride=options.stride,
            background_threshold=options.background_threshold,
        )

    return score, format_segmentation
