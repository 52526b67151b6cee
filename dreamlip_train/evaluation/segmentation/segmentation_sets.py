"""Where the images, label maps and class names of the segmentation sets are, and which label means what.

Every set is reduced to one convention: 255 is not scored, 0..C-1 are the classes. Folders as mmsegmentation prepares
them (docs/evaluation.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dreamlip_train.data.images import ImageError, decode_labels
from dreamlip_train.evaluation.classification.class_prompts import read_classes
from dreamlip_train.jobs.user_error import UserError

IGNORED = 255

_VOC = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike, person, "
    "potted plant, sheep, sofa, "
    "train, tv monitor"
)
_CONTEXT = (
    "aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat, "
    "ceiling, chair, cloth, computer, "
    "cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse, keyboard, light, motorbike, "
    "mountain, mouse, person, plate, "
    "platform, potted plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, "
    "truck, tv monitor, wall, water, "
    "window, wood"
)
_ADE = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, "
    "curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, "
    "rock, wardrobe, lamp, bathtub, "
    "railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, "
    "refrigerator, grandstand, path, "
    "stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, "
    "toilet, flower, book, hill, "
    "bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, "
    "towel, light, truck, tower, "
    "chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, "
    "bannister, escalator, ottoman, bottle, "
    "buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, "
    "barrel, basket, waterfall, tent, "
    "bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, "
    "dishwasher, screen, blanket, sculpture, "
    "hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, "
    "radiator, glass, clock, flag"
)


@dataclass(frozen=True)
class Layout:
    """Folders below the root, the split file ("" takes every label map), and whether label 0 is scored as background
    (else not at all).
    """

    images: str
    labels: str
    split: str
    classes: tuple[str, ...]
    background: bool = False


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


_VOC_FOLDERS = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt")
_CONTEXT_FOLDERS = ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext/val.txt")
LAYOUTS = {
    "voc20": Layout(*_VOC_FOLDERS, _names(_VOC)),
    "voc21": Layout(*_VOC_FOLDERS, _names(_VOC), background=True),
    "pc59": Layout(*_CONTEXT_FOLDERS, _names(_CONTEXT)),
    "pc60": Layout(*_CONTEXT_FOLDERS, _names(_CONTEXT), background=True),
    "ade150": Layout("images/validation", "annotations/validation", "", _names(_ADE)),
}
"""In all of them label 0 is the background or "other", 1..C are the classes and 255 is void."""


def layout_named(name: str, classes: str = "") -> Layout:
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


def read_segmentation(root: str | Path, layout: Layout) -> list[Segmented]:
    """The pairs of a set's validation split.

    Raises:
        UserError: a folder or the split file is not there, the split is empty, or files of it are missing (they are
            named).
    """
    root = Path(root)
    for folder in (root / layout.images, root / layout.labels):
        if not folder.is_dir():
            raise UserError(
                f"--root: no folder {str(folder)!r}; prepare the set as docs/evaluation.md says, or choose its --layout"
            )
    if layout.split:
        try:
            stems = (root / layout.split).read_text(encoding="utf-8").split()
        except OSError as error:
            raise UserError(f"--root: cannot read {str(root / layout.split)!r}: {error.strerror}") from error
    else:
        stems = sorted(path.stem for path in (root / layout.labels).glob("*.png"))
    if not stems:
        raise UserError(f"--root: no label map in {str(root / (layout.split or layout.labels))!r}")
    pairs = [Segmented(root / layout.images / f"{stem}.jpg", root / layout.labels / f"{stem}.png") for stem in stems]
    missing = [path for pair in pairs for path in (pair.image, pair.labels) if not path.is_file()]
    if missing:
        raise UserError(
            f"--root: {len(missing)} files of {len(pairs)} images are not there, such as {missing[0]}; "
            "mIoU over a part is another number"
        )
    return pairs


def read_label_map(path: Path, layout: Layout) -> np.ndarray:
    """[H, W] int64: classes 0..C-1, background C where the layout scores it, 255 for what is not scored.

    Raises:
        UserError: the file is damaged or no label map, or holds a label beyond the classes.
    """
    try:
        raw = decode_labels(path)
    except ImageError as error:
        raise UserError(f"--root: {path} is no label map: {error}") from error
    count = len(layout.classes)
    beyond = raw[(raw > count) & (raw != IGNORED)]
    if beyond.size:
        raise UserError(
            f"--root: {path} has label {int(beyond[0])}, the layout has {count} classes; "
            "choose the --layout these labels were made for"
        )
    labels = raw - 1
    labels[raw == 0] = count if layout.background else IGNORED
    labels[raw == IGNORED] = IGNORED
    return labels
