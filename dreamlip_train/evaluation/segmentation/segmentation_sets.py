"""Where the images, label maps and class names of the segmentation sets are, and which label means what.

Every set is reduced to one convention: 0..C-1 are the classes, C the background where it is scored, ``IGNORED`` is not
scored. Folders as mmsegmentation, SCLIP (COCO-Object) and SAN (ADE-847, PC-459) prepare them (docs/evaluation.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from dreamlip_train.data.images import ImageError, decode_labels
from dreamlip_train.evaluation.classification.class_prompts import read_classes
from dreamlip_train.evaluation.set_files import require_all
from dreamlip_train.jobs.user_error import UserError

IGNORED = -1


@dataclass(frozen=True)
class SetFiles:
    """Folders below the root, the split file ("" takes every label map), and what the labels mean."""

    images: str
    labels: str
    split: str
    classes: tuple[str, ...]
    background: bool = False
    """Whether labels below ``first`` are scored as background (else not at all)."""
    image_end: str = ".jpg"
    label_end: str = ".png"
    first: int = 1
    """The label of the first class."""
    void: int = 255
    """The label of pixels that are not scored."""


@cache
def class_names(file: str) -> tuple[str, ...]:
    """The names in class_names/``file``.txt, in the order of the labels; "a; b" are two names of one class."""
    names = resources.files("dreamlip_train.evaluation.segmentation") / "class_names" / f"{file}.txt"
    return tuple(names.read_text(encoding="utf-8").splitlines())


_VOC_FOLDERS = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt")
_CONTEXT_FOLDERS = ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext/val.txt")
_COCO_FOLDERS = ("images/val2017", "annotations/val2017", "")
_16_BIT = {"label_end": ".tif", "first": 0, "void": 65535}
LAYOUTS = {
    "voc20": SetFiles(*_VOC_FOLDERS, class_names("voc20")),
    "voc21": SetFiles(*_VOC_FOLDERS, class_names("voc20"), background=True),
    "pc59": SetFiles(*_CONTEXT_FOLDERS, class_names("pc59")),
    "pc60": SetFiles(*_CONTEXT_FOLDERS, class_names("pc59"), background=True),
    "pc459": SetFiles("val/image", "val/label", "", class_names("pc459"), **_16_BIT),
    "ade150": SetFiles("images/validation", "annotations/validation", "", class_names("ade150")),
    "ade847": SetFiles(
        "images_detectron2/validation", "annotations_detectron2/validation", "", class_names("ade847"), **_16_BIT
    ),
    "coco-stuff": SetFiles(*_COCO_FOLDERS, class_names("coco_stuff171"), label_end="_labelTrainIds.png", first=0),
    "coco-object": SetFiles(
        *_COCO_FOLDERS, class_names("coco_object80"), background=True, label_end="_instanceTrainIds.png"
    ),
    "cityscapes": SetFiles(
        "leftImg8bit/val",
        "gtFine/val",
        "",
        class_names("cityscapes19"),
        image_end="_leftImg8bit.png",
        label_end="_gtFine_labelTrainIds.png",
        first=0,
    ),
}
SOURCES = {
    "voc": "VOC2012 is VOCtrainval_11-May-2012.tar, unpacked to VOCdevkit/VOC2012",
    "pc": "Pascal Context is VOCdevkit/VOC2010 with the label maps of mmsegmentation's tools/dataset_converters/"
    "pascal_context.py; PC-459 is pcontext_full/val/{image,label} of SAN's datasets/prepare_pcontext_sem_seg_459cls.py",
    "ade": "ADE-150 is ADEChallengeData2016.zip; ADE-847 is ADE20K_2021_17_01 with the 16-bit label maps of "
    "Mask2Former's datasets/prepare_ade20k_full_sem_seg.py",
    "coco": "COCO's val2017 and stuffthingmaps_trainval2017.zip as coco_stuff164k/{images,annotations}/val2017, with "
    "the label maps of mmsegmentation's coco_stuff164k.py (COCO-Stuff) or SCLIP's convert_coco_object.py (COCO-Object)",
    "cityscapes": "Cityscapes is leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, with the "
    "*_labelTrainIds.png of cityscapesscripts",
}
"""Where the sets come from, by how their layout's name begins."""


def source_of(name: str) -> str:
    """Where the set of a layout comes from."""
    return next(source for start, source in SOURCES.items() if name.startswith(start))


def layout_named(name: str, classes: str = "") -> SetFiles:
    """The layout of that name, with the names in the file ``classes`` in place of its own where one is given.

    Raises:
        UserError: the file can't be read, or has another number of classes.
    """
    layout = LAYOUTS[name]
    if not classes:
        return layout
    names = tuple(read_classes(classes))
    if len(names) != len(layout.classes):
        raise UserError(f"--classes: {classes!r} has {len(names)} classes, the layout {name} has {len(layout.classes)}")
    return replace(layout, classes=names)


@dataclass(frozen=True)
class Segmented:
    """One image file and its label map's."""

    image: Path
    labels: Path


def read_segmentation(root: str | Path, layout: SetFiles) -> list[Segmented]:
    """The pairs of a set's validation split.

    Raises:
        UserError: a folder or the split file is not there, the split is empty, or files of it are missing (they are
            named).
    """
    root = Path(root)
    images, labels = root / layout.images, root / layout.labels
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(
                f"--root: no folder {str(folder)!r}; prepare the set as docs/evaluation.md says, or choose its --layout"
            )
    if layout.split:
        try:
            stems = (root / layout.split).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--root: cannot read {str(root / layout.split)!r}: {error}") from error
    else:
        maps = sorted(labels.rglob(f"*{layout.label_end}"))
        stems = [path.relative_to(labels).as_posix().removesuffix(layout.label_end) for path in maps]
    if not stems:
        raise UserError(f"--root: no label map *{layout.label_end} in {str(root / (layout.split or layout.labels))!r}")
    pairs = [Segmented(images / (stem + layout.image_end), labels / (stem + layout.label_end)) for stem in stems]
    missing = [path for pair in pairs for path in (pair.image, pair.labels) if not path.is_file()]
    require_all(missing, "--root", f"{2 * len(pairs)} files")
    return pairs


def read_label_map(path: Path, layout: SetFiles) -> np.ndarray:
    """[H, W] int64: classes 0..C-1, background C where the layout scores it, ``IGNORED`` for what is not scored.

    Raises:
        UserError: the file is damaged or no label map, or holds a label beyond the classes.
    """
    try:
        raw = decode_labels(path)
    except ImageError as error:
        raise UserError(f"--root: {path} is no label map: {error}") from error
    count = len(layout.classes)
    void = raw == layout.void
    beyond = raw[(raw >= layout.first + count) & ~void]
    if beyond.size:
        raise UserError(
            f"--root: {path} has label {int(beyond[0])}, the layout has {count} classes; "
            "choose the --layout these labels were made for"
        )
    labels = raw - layout.first
    labels[raw < layout.first] = count if layout.background else IGNORED
    labels[void] = IGNORED
    return labels
