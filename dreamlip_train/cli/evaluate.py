"""The ``eval`` commands: their options, and the call each makes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass
class EvalOptions:
    """Evaluate a checkpoint on held-out shards."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    val_shards: str = ""
    """Held-out shards; empty means those of the run."""
    source: str = ""
    """Caption column whose sentences are the queries; empty means the run's data.eval_source."""
    model: str = ""
    """open_clip model name of a weights file."""
    max_samples: int = 0
    """Evaluate on the first so many samples; 0 means all."""
    batch_size: int = 64
    """Images a forward pass."""
    output: str = ""
    """Also write the numbers to this JSON file."""


def retrieval(arguments: list[str], program: str) -> None:
    """Text-to-image and image-to-text R@1/5/10 by long caption and by sentence"""
    report = _evaluate(arguments, program)
    report["localization"] = None
    _show(report)


def localize(arguments: list[str], program: str) -> None:
    """How well the patches each sub-caption selects agree with the masks"""
    report = _evaluate(arguments, program)
    if report["localization"] is None:
        raise ValueError(
            "--val-shards: no sample has a mask (KEY.mask.png), so there is nothing to compare the selected patches with"
        )
    _show(report)


def _evaluate(arguments: list[str], program: str) -> dict[str, Any]:
    """The report of evaluate() for the checkpoint and shards in ``arguments``, written to --output if given."""
    options = tyro.cli(EvalOptions, args=arguments, prog=program)
    _must_be_writable(options.output)
    import torch

    from dreamlip_train.checkpoint.weights import load_for_eval
    from dreamlip_train.config.schema import EvalConfig
    from dreamlip_train.evaluation.held_out import evaluate

    model, config = load_for_eval(options.checkpoint, options.model)
    data = dataclasses.replace(
        config.data,
        val_shards=options.val_shards or config.data.val_shards,
        eval_source=options.source or config.data.eval_source,
    )
    if not data.val_shards:
        raise ValueError("--val-shards: the checkpoint's run had none; give held-out shards")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = EvalConfig(batch_size=options.batch_size, max_samples=options.max_samples)
    selection = config.selection()
    report = evaluate(model.to(device), data, settings, device, **selection)
    if options.output:
        _write(options.output, report)
    return report


def _show(report: dict[str, Any]) -> None:
    from dreamlip_train.evaluation.held_out import format_report

    print(format_report(report))


@dataclass
class SetOptions:
    """Recall on Flickr30k, COCO or a set in one of their layouts."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    annotations: str
    """Karpathy's json, COCO's captions json, or a clip_benchmark webdataset folder."""
    images: str = ""
    """Folder of the json's images."""
    split: str = "test"
    """Split of a Karpathy json or a clip_benchmark folder."""
    captions_per_image: int = 5
    """The first so many captions of each image; 0 takes all."""
    model: str = ""
    """open_clip model name of a weights file."""
    batch_size: int = 64
    """Images a forward pass."""
    output: str = ""
    """Also write the numbers to this JSON file."""


def retrieval_set(arguments: list[str], program: str) -> None:
    """Recall on Flickr30k or COCO: CHECKPOINT --annotations FILE --images DIR"""
    options = tyro.cli(SetOptions, args=arguments, prog=program)
    _must_be_writable(options.output)
    from dreamlip_train.evaluation.retrieval_sets import evaluate_set, format_set, read_set

    pictured = read_set(options.annotations, options.images, options.split)
    model, device = _load(options.checkpoint, options.model)
    found = evaluate_set(
        model, pictured, device, captions_per_image=options.captions_per_image, batch_size=options.batch_size
    )
    if options.output:
        _write(options.output, found)
    print(format_set(found))


@dataclass
class ZeroShotOptions:
    """Zero-shot classification on clip_benchmark's data sets."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    root: str
    """Where the data sets are or are downloaded to; "{dataset}" and "{dataset_cleaned}" in it stand for a name."""
    datasets: tuple[str, ...] = ()
    """clip_benchmark's names ("wds/NAME" for a webdataset folder); empty means the paper's eleven."""
    split: str = "test"
    """Split to evaluate."""
    model: str = ""
    """open_clip model name of a weights file."""
    batch_size: int = 64
    """Images a forward pass."""
    workers: int = 2
    """Loader processes."""
    output: str = ""
    """Also write the numbers to this JSON file, after each data set."""


def zeroshot(arguments: list[str], program: str) -> None:
    """Accuracy on ImageNet and ten other sets through clip_benchmark: CHECKPOINT --root DIR [--datasets NAME ...]"""
    options = tyro.cli(ZeroShotOptions, args=arguments, prog=program)
    from dreamlip_train.evaluation.zero_shot import DATASETS, format_zero_shot, zero_shot

    _must_be_writable(options.output)
    model, device = _load(options.checkpoint, options.model)
    found = zero_shot(
        model,
        options.datasets or DATASETS,
        options.root,
        device,
        split=options.split,
        batch_size=options.batch_size,
        workers=options.workers,
        keep=lambda so_far: _write(options.output, so_far) if options.output else None,
    )
    print(format_zero_shot(found))
    failed = [name for name, row in found.items() if "error" in row]
    if failed:
        raise ValueError(
            f"--datasets: {len(failed)} of {len(found)} could not be evaluated: {', '.join(failed)} (see the table)"
        )


@dataclass
class MultiLabelOptions:
    """Multi-label recognition: mean average precision over classes."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    annotations: str
    """One image a line: IMAGE,tag,tag,... (tags by name or by position in the class list)."""
    classes: str
    """The class (tag) list, one a line; "a; b" are two names of one class."""
    images: str
    """Folder the annotations' images are below, with or without their file ending."""
    templates: str = "photo"
    """"photo" (a photo of a {c}.), "imagenet" (CLIP's 80), or a file with a template a line."""
    model: str = ""
    """open_clip model name of a weights file."""
    batch_size: int = 64
    """Images a forward pass."""
    output: str = ""
    """Also write the numbers, with every class's, to this JSON file."""


def multilabel(arguments: list[str], program: str) -> None:
    """mAP on OpenImages, ImageNet-Multi or HICO lists: CHECKPOINT --annotations FILE --classes FILE --images DIR"""
    options = tyro.cli(MultiLabelOptions, args=arguments, prog=program)
    from dreamlip_train.evaluation.class_prompts import read_classes, read_templates
    from dreamlip_train.evaluation.multi_label import evaluate_labels, format_labels, read_labels

    _must_be_writable(options.output)
    classes, templates = read_classes(options.classes), read_templates(options.templates)
    labelled = read_labels(options.annotations, classes, options.images)
    model, device = _load(options.checkpoint, options.model)
    found = evaluate_labels(model, labelled, classes, templates, device, options.batch_size)
    if options.output:
        _write(options.output, found)
    print(format_labels(found))


@dataclass
class SegmentOptions:
    """Training-free segmentation by the class-prompt similarity of patches."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a folder checkpoints/step-NNNNNNNN, or an open_clip weights file (with --model)."""
    root: str
    """Folder of the set."""
    layout: Literal["voc20", "voc21", "pc59", "pc60", "ade150"]
    """The set; voc21 and pc60 score the background too."""
    classes: str = ""
    """Other names for the layout's classes, one a line in its order; "a; b" are two names of one class."""
    templates: str = "imagenet"
    """"photo" (a photo of a {c}.), "imagenet" (CLIP's 80), or a file with a template a line."""
    resize: int = 0
    """Shorter side of each image in pixels; 0 takes one and a half windows (the model's picture)."""
    stride: int = 0
    """Pixels between windows; 0 takes half a window."""
    background_threshold: float = 0.5
    """A pixel whose best class has a lower probability (softmax of 100 x cosine) is background."""
    model: str = ""
    """open_clip model name of a weights file."""
    output: str = ""
    """Also write the numbers, with every class's, to this JSON file."""


def segment(arguments: list[str], program: str) -> None:
    """mIoU on VOC, Pascal Context or ADE without training: CHECKPOINT --root DIR --layout NAME"""
    options = tyro.cli(SegmentOptions, args=arguments, prog=program)
    from dreamlip_train.evaluation import segmentation
    from dreamlip_train.evaluation.class_prompts import read_classes, read_templates
    from dreamlip_train.evaluation.segmentation_sets import LAYOUTS, read_segmentation

    _must_be_writable(options.output)
    layout = LAYOUTS[options.layout]
    if options.classes:
        named = tuple(read_classes(options.classes))
        if len(named) != len(layout.classes):
            raise ValueError(
                f"--classes: {options.classes!r} has {len(named)} classes, the layout {options.layout} has {len(layout.classes)}"
            )
        layout = dataclasses.replace(layout, classes=named)
    pairs, templates = read_segmentation(options.root, layout), read_templates(options.templates)
    model, device = _load(options.checkpoint, options.model)
    settings = {name: getattr(options, name) for name in ("resize", "stride", "background_threshold")}
    found = segmentation.segment(model, pairs, layout, templates, device, **settings)
    if options.output:
        _write(options.output, found)
    print(segmentation.format_segmentation(found))


def _load(checkpoint: str, name: str) -> tuple[Any, Any]:
    """The model on the device there is, and that device."""
    import torch

    from dreamlip_train.checkpoint.weights import load_for_eval

    model, _ = load_for_eval(checkpoint, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), device


def _write(path: str, content: Any) -> None:
    from dreamlip_train.jobs.atomic_json import write_json

    write_json(Path(path), content)


def _must_be_writable(output: str) -> None:
    """Hours of evaluation must not end at a folder that is not there."""
    if output and not Path(output).absolute().parent.is_dir():
        raise ValueError(f"--output: no folder {str(Path(output).absolute().parent)!r}; make it first")


COMMANDS: dict[str, Any] = {
    "retrieval": retrieval,
    "localize": localize,
    "retrieval-set": retrieval_set,
    "zeroshot": zeroshot,
    "multilabel": multilabel,
    "segment": segment,
}
