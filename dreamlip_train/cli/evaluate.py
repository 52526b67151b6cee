"""The ``eval`` commands: their options, and the call each makes.

Each is: options parsed, --output tried, the set read, the model loaded, scored, written to --output, printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from dreamlip_train.cli.usage import require_writable
from dreamlip_train.jobs.user_error import UserError


@dataclass(kw_only=True)
class EvalOptions:
    """What every evaluation takes."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    model: str = ""
    """open_clip model name of a weights file."""
    batch_size: int = 64
    """Images per forward pass."""
    output: str = ""
    """Also write the numbers to this JSON file."""


Options = TypeVar("Options", bound=EvalOptions)


def _parse(kind: type[Options], arguments: list[str], program: str) -> Options:
    """The options, once it is sure that hours of evaluation will not end at a folder that is not there."""
    options = tyro.cli(kind, args=arguments, prog=program)
    if options.batch_size < 1:
        raise UserError(f"--batch-size: got {options.batch_size}; give at least 1")
    require_writable(options.output)
    return options


def _run(options: EvalOptions, score: Callable[[Any, Any, Any], Any], show: Callable[[Any], str]) -> Any:
    """Load the model, ``score(model, config, device)``, write and print what that gives."""
    import torch

    from dreamlip_train.checkpoint.weights import load_for_eval

    model, config = load_for_eval(options.checkpoint, options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = score(model.to(device), config, device)
    _write(options, scores)
    print(show(scores))
    return scores


def _write(options: EvalOptions, scores: Any) -> None:
    if options.output:
        from dreamlip_train.jobs.atomic_json import write_json

        told = {name: value for name, value in vars(options).items() if name != "output"}
        write_json(Path(options.output), {"evaluation": {"command": _COMMAND_OF[type(options)], **told}} | scores)


@dataclass(kw_only=True)
class HeldOutOptions(EvalOptions):
    """Evaluate a checkpoint on held-out shards."""

    val_shards: str = ""
    """Held-out shards; empty means those of the run."""
    source: str = ""
    """Caption column whose sentences are the queries; empty means the run's data.eval_source."""
    max_samples: int = 0
    """Evaluate on the first so many samples; 0 means all."""


def retrieval(arguments: list[str], program: str) -> None:
    """Text-to-image and image-to-text R@1/5/10 by long caption and by sentence"""
    _held_out(_parse(HeldOutOptions, arguments, program), localize=False)


def localize(arguments: list[str], program: str) -> None:
    """How well the patches each sub-caption selects agree with the masks"""
    _held_out(_parse(HeldOutOptions, arguments, program), localize=True)


def _held_out(options: HeldOutOptions, *, localize: bool) -> None:
    def score(model: Any, config: Any, device: Any) -> dict[str, Any]:
        from dreamlip_train.config.schema import EvalConfig
        from dreamlip_train.evaluation.held_out import evaluate

        data = dataclasses.replace(
            config.data,
            val_shards=options.val_shards or config.data.val_shards,
            eval_source=options.source or config.data.eval_source,
        )
        if not data.val_shards:
            raise UserError("--val-shards: the checkpoint's run had none; give held-out shards")
        settings = EvalConfig(batch_size=options.batch_size, max_samples=options.max_samples)
        report = evaluate(model, data, settings, device, **config.selection(), localize=localize)
        if localize and report["localization"] is None:
            raise UserError(
                "--val-shards: no sample has a mask (KEY.mask.png) and the model patch features, "
                "so there is nothing to compare the selected patches with"
            )
        return report

    from dreamlip_train.evaluation.held_out import format_report

    _run(options, score, format_report)


@dataclass(kw_only=True)
class RetrievalSetOptions(EvalOptions):
    """Recall on Flickr30k, COCO or a set in one of their layouts."""

    annotations: str
    """Karpathy's json, COCO's captions json, or a clip_benchmark webdataset folder."""
    images: str = ""
    """Folder of the json's images."""
    split: str = "test"
    """Split of a Karpathy json or a clip_benchmark folder."""
    captions_per_image: int = 5
    """The first so many captions of each image; 0 takes all."""


def retrieval_set(arguments: list[str], program: str) -> None:
    """Recall on Flickr30k or COCO: CHECKPOINT --annotations FILE --images DIR"""
    options = _parse(RetrievalSetOptions, arguments, program)
    from dreamlip_train.evaluation.retrieval.retrieval_sets import evaluate_retrieval, format_retrieval, read_set

    items = read_set(options.annotations, options.images, options.split)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_retrieval(
            model, items, device, captions_per_image=options.captions_per_image, batch_size=options.batch_size
        )

    _run(options, score, format_retrieval)


@dataclass(kw_only=True)
class ZeroShotOptions(EvalOptions):
    """Zero-shot classification on clip_benchmark's data sets. --output is written after each of them."""

    root: str
    """Where the data sets are or are downloaded to; "{dataset}" and "{dataset_cleaned}" in it stand for a name."""
    datasets: tuple[str, ...] = ()
    """clip_benchmark's names ("wds/NAME" for a webdataset folder); empty means the paper's eleven."""
    split: str = "test"
    """Split to evaluate."""
    workers: int = 2
    """Loader processes."""


def zeroshot(arguments: list[str], program: str) -> None:
    """Accuracy on ImageNet and ten other sets through clip_benchmark: CHECKPOINT --root DIR [--datasets NAME ...]"""
    options = _parse(ZeroShotOptions, arguments, program)
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
            keep=lambda so_far: _write(options, so_far),
        )

    scores = _run(options, score, format_zero_shot)
    failed = [name for name, row in scores.items() if "error" in row]
    if failed:
        raise UserError(
            f"--datasets: {len(failed)} of {len(scores)} could not be evaluated: {', '.join(failed)} (see the table)"
        )


@dataclass(kw_only=True)
class MultiLabelOptions(EvalOptions):
    """Multi-label recognition: mean average precision over classes."""

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
    options = _parse(MultiLabelOptions, arguments, program)
    from dreamlip_train.evaluation.classification.class_prompts import read_classes, read_templates
    from dreamlip_train.evaluation.classification.multi_label import (
        evaluate_multi_label,
        format_multi_label,
        read_labels,
    )

    classes, templates = read_classes(options.classes, repeated_allowed=True), read_templates(options.templates)
    labeled = read_labels(options.annotations, classes, options.images)

    def score(model: Any, _: Any, device: Any) -> dict[str, Any]:
        return evaluate_multi_label(model, labeled, classes, templates, device, options.batch_size)

    _run(options, score, format_multi_label)


@dataclass(kw_only=True)
class SegmentationOptions(EvalOptions):
    """Training-free segmentation by the class-prompt similarity of patches."""

    root: str
    """Folder of the set."""
    layout: Literal["voc20", "voc21", "pc59", "pc60", "ade150"]
    """The set; voc21 and pc60 score the background too."""
    classes: str = ""
    """Other names for the layout's classes, one per line in its order; "a; b" are two names of one class."""
    templates: str = "imagenet"
    """"photo" (a photo of a {c}.), "imagenet" (CLIP's 80), or a file with a template per line."""
    batch_size: int = 16
    """Windows per forward pass."""
    resize: int = 0
    """Shorter side of each image in pixels; 0 takes one and a half windows (the model's picture)."""
    stride: int = 0
    """Pixels between windows; 0 takes half a window."""
    background_threshold: float = 0.5
    """A pixel whose best class has a lower probability (softmax of 100 x cosine) is background."""


def segment(arguments: list[str], program: str) -> None:
    """mIoU on VOC, Pascal Context or ADE without training: CHECKPOINT --root DIR --layout NAME"""
    options = _parse(SegmentationOptions, arguments, program)
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

    _run(options, score, format_segmentation)


_COMMAND_OF = {
    HeldOutOptions: "retrieval",
    RetrievalSetOptions: "retrieval-set",
    ZeroShotOptions: "zeroshot",
    MultiLabelOptions: "multilabel",
    SegmentationOptions: "segment",
}
COMMANDS: dict[str, Any] = {
    "retrieval": retrieval,
    "localize": localize,
    "retrieval-set": retrieval_set,
    "zeroshot": zeroshot,
    "multilabel": multilabel,
    "segment": segment,
}
