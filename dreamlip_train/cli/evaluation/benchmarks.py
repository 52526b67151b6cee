"""What ``eval all`` runs: each benchmark, where it lies below --root, and how to get it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlip_train.cli.evaluation.captions import (
    CompositionalOptions,
    LongRetrievalOptions,
    RetrievalSetOptions,
    compositional_job,
    long_retrieval_job,
    retrieval_set_job,
)
from dreamlip_train.cli.evaluation.labels import (
    MultiLabelOptions,
    SegmentationOptions,
    ZeroShotOptions,
    multilabel_job,
    segment_job,
    zeroshot_job,
)
from dreamlip_train.cli.evaluation.options import EvalOptions, Score, Show

Job = Callable[[Any], tuple[Score, Show]]


@dataclass(frozen=True)
class Benchmark:
    """One evaluation: its options without those that all share, and the job they describe."""

    name: str
    """Of its result's file, NAME.json."""
    there: bool
    """Whether its folder, or what only it has in a folder, is there."""
    source: str
    """How to get it."""
    options: type[EvalOptions]
    settings: dict[str, Any]
    job: Job


def benchmarks(root: Path) -> Iterator[Benchmark]:
    """All of them, with what is there below ``root``, in the order of the paper's tables."""
    yield from _retrieval(root)
    yield from _long_retrieval(root)
    yield from _compositional(root)
    yield from _zero_shot(root)
    yield from _multi_label(root)
    yield from _segmentation(root)


def _retrieval(root: Path) -> Iterator[Benchmark]:
    karpathy = "Karpathy's caption_datasets.zip (cs.stanford.edu/people/karpathy/deepimagesent)"
    sets = (
        (
            "flickr30k",
            root / "flickr30k" / "dataset_flickr30k.json",
            root / "flickr30k" / "flickr30k-images",
            f"flickr30k/dataset_flickr30k.json of {karpathy}; flickr30k/flickr30k-images/ on request from its authors",
        ),
        (
            "coco-karpathy",
            root / "coco" / "dataset_coco.json",
            root / "coco",
            f"coco/dataset_coco.json of {karpathy}; coco/val2014/ from cocodataset.org",
        ),
        (
            "coco-val2017",
            root / "coco" / "annotations" / "captions_val2017.json",
            root / "coco" / "val2017",
            "coco/annotations/captions_val2017.json (annotations_trainval2017.zip) and coco/val2017/, cocodataset.org",
        ),
    )
    for name, captions, images, source in sets:
        settings = {"annotations": str(captions), "images": str(images)}
        yield Benchmark(name, captions.is_file(), source, RetrievalSetOptions, settings, retrieval_set_job)


def _long_retrieval(root: Path) -> Iterator[Benchmark]:
    from dreamlip_train.evaluation.retrieval.long_caption_sets import SETS

    folders = {"iiw": "imageinwords", "urban1k": "Urban1k", "sharegpt4v": "share4v"}  # as FLAIR calls them
    for name, spec in SETS.items():
        kind = name.split("-")[0]
        folder = root / folders.get(kind, kind)
        source = f"{folder.name}/: {spec.source}"
        yield Benchmark(
            name,
            folder.is_dir(),
            source,
            LongRetrievalOptions,
            {"set": name, "root": str(folder)},
            long_retrieval_job,
        )


def _compositional(root: Path) -> Iterator[Benchmark]:
    from dreamlip_train.evaluation.compositional.sets import SETS

    folders = {"sugarcrepe": "sugar-crepe", "aro-relation": "ARO", "aro-attribution": "ARO", "mmvp": "MMVP_VLM"}
    for name, spec in SETS.items():
        folder = root / folders.get(name, name)
        settings = {"set": name, "root": str(folder)}
        if name == "sugarcrepe":
            settings["images"] = str(root / "coco" / "val2017")
        source = f"{folder.name}/: {spec.source}" + (" in coco/val2017/" if name == "sugarcrepe" else "")
        yield Benchmark(name, folder.is_dir(), source, CompositionalOptions, settings, compositional_job)


def _zero_shot(root: Path) -> Iterator[Benchmark]:
    from dreamlip_train.evaluation.classification.zero_shot import DATASETS

    by_hand = {"cars", "imagenet1k"}
    for name in DATASETS:
        source = f"zeroshot/{name}/: a folder of images by class, test/CLASS/*.jpg" + (
            "" if name in by_hand else f"; or make the folder and clip_benchmark downloads {name} into it"
        )
        settings = {"root": str(root / "zeroshot" / "{dataset}"), "datasets": (name,)}
        there = (root / "zeroshot" / name).is_dir()
        yield Benchmark(f"zeroshot-{name}", there, source, ZeroShotOptions, settings, zeroshot_job)


def _multi_label(root: Path) -> Iterator[Benchmark]:
    lists = {
        "imagenet_multi": "imagenet_multi_1000",
        "openimages_common_214": "openimages_common_214_ram",
        "openimages_rare_200": "openimages_rare_200_ram",
        "hico": "hico_600",
    }
    for name, stem in lists.items():
        folder = root / "ram" / name
        settings = {
            "annotations": str(folder / f"{stem}_annots.txt"),
            "classes": str(folder / f"{stem}_taglist.txt"),
            "images": str(folder / "imgs"),
        }
        source = (
            f"ram/{name}/: datasets/{name} of github.com/xinyu1205/recognize-anything, with the images its list names "
            "in imgs/"
        )
        yield Benchmark(f"multilabel-{name}", folder.is_dir(), source, MultiLabelOptions, settings, multilabel_job)


def _segmentation(root: Path) -> Iterator[Benchmark]:
    from dreamlip_train.evaluation.segmentation.segmentation_sets import LAYOUTS, source_of

    folders = {
        "voc20": "VOCdevkit/VOC2012",
        "voc21": "VOCdevkit/VOC2012",
        "pc59": "VOCdevkit/VOC2010",
        "pc60": "VOCdevkit/VOC2010",
        "pc459": "pcontext_full",
        "ade150": "ADEChallengeData2016",
        "ade847": "ADE20K_2021_17_01",
        "coco-stuff": "coco_stuff164k",
        "coco-object": "coco_stuff164k",
        "cityscapes": "cityscapes",
    }
    for name, layout in LAYOUTS.items():
        folder = root / folders[name]
        settings = {"root": str(folder), "layout": name}
        source = f"{folders[name]}/: {source_of(name)}"
        there = next((folder / layout.labels).rglob(f"*{layout.label_end}"), None) is not None
        yield Benchmark(f"segment-{name}", there, source, SegmentationOptions, settings, segment_job)
