"""Real photographs whose contents are known, in the layout of ``dreamlip-train prepare scenes``:
``python benchmarks/grouping/photographs.py OUTPUT``.

The pictures that scikit-image and scikit-learn bring are cut at the labeled regions below. Most samples are collages: a
blurred photograph with crops of 3 to 5 regions on it, each in a ninth of the picture and in a shape of its own. The
others are one photograph cut at random, whose sentences are about the regions that are in the cut. Sentence j of the
long caption describes value j of the mask. The held-out samples are other cuts and collages of the same pictures: what
is new in them is where things are and what is beside them.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
import sklearn
import tyro
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.prepare.scenes.scene import PLACES, compose_scene

SIDE = 96
CUT_SHARE = 0.25  # of the samples, those that are one photograph
_FOLDERS = (
    Path(skimage.__file__).parent / "data",
    Path(sklearn.__file__).parent / "datasets" / "images",
)

# What is where: left, top, right, bottom in hundredths of the picture.
REGIONS: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    "astronaut.png": {
        "a smiling woman": ((30, 3, 60, 37),),
        "an American flag": ((0, 5, 20, 55),),
        "a model of a space shuttle": ((68, 0, 92, 55),),
        "an orange space suit": ((8, 50, 50, 92),),
        "a helmet with a black visor": ((54, 66, 100, 100),),
    },
    "chelsea.png": {
        "the green eye of a cat": ((28, 27, 46, 50), (63, 35, 79, 56)),
        "the pink nose of a cat": ((48, 70, 65, 90),),
        "the striped fur of a cat": ((5, 45, 40, 95),),
    },
    "coffee.png": {
        "a cup of coffee": ((28, 3, 70, 58),),
        "a silver spoon": ((53, 55, 70, 85),),
        "a wooden table": ((78, 5, 100, 60),),
        "a dark red saucer": ((13, 40, 33, 95),),
    },
    "motorcycle_left.png": {
        "the wheel of a motorcycle": ((10, 48, 38, 82), (68, 52, 94, 92)),
        "the engine of a motorcycle": ((42, 42, 68, 75),),
        "shelves full of boxes": ((64, 0, 100, 30),),
        "a wooden bench": ((5, 20, 28, 42),),
    },
    "rocket.jpg": {
        "a rocket on its launch pad": ((42, 28, 58, 100),),
        "a steel tower at dusk": ((0, 0, 14, 85), (88, 0, 100, 85)),
        "bright lamps at dusk": ((10, 78, 42, 100), (55, 80, 80, 100)),
    },
    "camera.png": {"a man with a camera": ((20, 10, 65, 60),), "a tripod": ((45, 58, 80, 100),)},
    "china.jpg": {
        "a Chinese pagoda": ((10, 5, 58, 95),),
        "green treetops": ((0, 78, 50, 100), (60, 68, 100, 100)),
        "a pale blue sky": ((60, 0, 100, 40),),
    },
    "flower.jpg": {"an orange dahlia": ((25, 18, 70, 88),), "dark green leaves": ((0, 0, 24, 100), (76, 0, 100, 100))},
    "hubble_deep_field.jpg": {"galaxies in a black sky": ((0, 0, 100, 100),)},
    "ihc.png": {"brown stained tissue": ((0, 0, 50, 50),)},
    "retina.jpg": {"the red retina of an eye": ((5, 20, 90, 80),)},
    "coins.png": {"rows of old coins": ((0, 0, 100, 100),)},
    "moon.png": {"craters on the moon": ((0, 0, 100, 60),)},
    "horse.png": {"the black silhouette of a horse": ((0, 0, 100, 100),)},
    "page.png": {"a page of text": ((0, 0, 100, 75),)},
    "color.png": {"a wheel of all colors": ((0, 0, 100, 100),)},
    "gravel.png": {"gray gravel": ((0, 0, 100, 100),)},
    "brick.png": {"a floor of bricks": ((0, 0, 100, 100),)},
}
_WHOLE = 0.85  # of a region's sides, the least that a crop shows: less of it need not show what it is
_SENTENCES = ("{Label} can be seen {place}.", "The picture shows {label} {place}.")
_RAW = ("a collection of photos", "photo", "free stock photos, high resolution", "my pictures - part {serial}")


@dataclass
class Options:
    """Where to, and how many samples."""

    output: tyro.conf.Positional[Path]
    num_train: int = 4000
    num_val: int = 300
    seed: int = 0


def main(options: Options) -> None:
    for number, (split, count) in enumerate({"train": options.num_train, "val": options.num_val}.items()):
        folder = options.output / split
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["Image Path", *CAPTION_COLUMNS], restval="")
            writer.writeheader()
            for index in range(count):
                rng = np.random.default_rng([options.seed, number, index])
                picture, mask, labels, places = cut(rng) if rng.random() < CUT_SHARE else collage(rng)
                picture.save(folder / "images" / f"{index:06d}.jpg", quality=90)
                mask.save(folder / "masks" / f"{index:06d}.png")
                writer.writerow({"Image Path": f"{index:06d}.jpg", **_captions(labels, places, index, rng)})


def collage(rng: np.random.Generator) -> tuple[Image.Image, Image.Image, list[str], list[str]]:
    """Crops of several regions on a blurred photograph, its mask, and what is where."""
    scene = compose_scene(rng, SIDE)  # its places and sizes; colors and shapes are the photographs'
    names = list(_regions())
    labels = [names[i] for i in rng.permutation(len(names))[: len(scene.objects)]]
    picture = _photograph(str(rng.choice(list(REGIONS)))).resize((SIDE, SIDE))
    picture = ImageEnhance.Color(picture.filter(ImageFilter.GaussianBlur(6))).enhance(0.6)
    mask = Image.new("L", (SIDE, SIDE))
    for value, (label, thing) in enumerate(zip(labels, scene.objects, strict=True), start=1):
        side = round(2 * thing.radius * 0.95)
        corner = tuple(round(middle - side / 2) for middle in thing.center)
        outline = _outline(side, rng)
        picture.paste(_crop(label, side, rng), corner, outline)
        mask.paste(value, (*corner, corner[0] + side, corner[1] + side), outline.point(lambda v: 255 * (v >= 128)))
    return picture, mask, labels, [thing.place for thing in scene.objects]


def cut(rng: np.random.Generator) -> tuple[Image.Image, Image.Image, list[str], list[str]]:
    """A square cut of one photograph with several regions, the mask of those that are in it, and what is where."""
    while True:
        name = str(rng.choice([name for name, regions in REGIONS.items() if len(regions) > 1]))
        photograph = _photograph(name)
        side = rng.uniform(0.55, 1.0) * min(photograph.size)
        left, top = (rng.uniform(0, size - side) for size in photograph.size)
        mask, labels, places = Image.new("L", (SIDE, SIDE)), [], []
        draw = ImageDraw.Draw(mask)
        for label, boxes in REGIONS[name].items():
            inside = [here for box in boxes if (here := _within(box, photograph.size, (left, top, side)))]
            if not inside or len(labels) == 5:
                continue
            labels.append(label)
            for box in inside:
                draw.rectangle(box, fill=len(labels))
            x, y = ((inside[0][i] + inside[0][i + 2]) / 2 / SIDE for i in (0, 1))
            places.append(PLACES[3 * min(2, int(3 * y)) + min(2, int(3 * x))])
        if len(labels) >= 2:
            window = tuple(round(edge) for edge in (left, top, left + side, top + side))
            picture = photograph.crop(window).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            return _in_another_light(picture, rng), mask, labels, places


def _within(
    box: tuple[int, int, int, int], size: tuple[int, int], window: tuple[float, float, float]
) -> tuple[float, float, float, float] | None:
    """A region in the pixels of a cut (left, top, side), or None where the cut has less than 60 % of it."""
    left, top, side = window
    edges = [box[i] / 100 * size[i % 2] for i in range(4)]
    moved = [(edge - (left, top)[i % 2]) / side for i, edge in enumerate(edges)]
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in moved)
    area = (moved[2] - moved[0]) * (moved[3] - moved[1])
    if max(0.0, x1 - x0) * max(0.0, y1 - y0) < 0.6 * area:
        return None
    return x0 * SIDE, y0 * SIDE, x1 * SIDE - 1, y1 * SIDE - 1


@functools.cache
def _regions() -> dict[str, list[tuple[str, tuple[int, int, int, int]]]]:
    """The pictures and boxes that show each label."""
    return {label: [(name, box) for box in boxes] for name, of in REGIONS.items() for label, boxes in of.items()}


@functools.cache
def _photograph(name: str) -> Image.Image:
    path = next(folder / name for folder in _FOLDERS if (folder / name).is_file())
    with Image.open(path) as picture:
        picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _crop(label: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A square of ``side`` pixels that shows most of a region, mirrored or not, in another light."""
    boxes = _regions()[label]
    name, box = boxes[rng.integers(len(boxes))]
    photograph = _photograph(name)
    left, top, right, bottom = (edge / 100 * photograph.size[i % 2] for i, edge in enumerate(box))
    width, height = ((end - start) * rng.uniform(_WHOLE, 1.0) for start, end in ((left, right), (top, bottom)))
    x, y = rng.uniform(left, right - width), rng.uniform(top, bottom - height)
    window = (round(x), round(y), round(x + width), round(y + height))
    crop = photograph.crop(window).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _in_another_light(crop, rng)


def _in_another_light(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brighter or darker, and of another contrast."""
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Contrast(picture).enhance(rng.uniform(0.8, 1.2))


def _outline(side: int, rng: np.random.Generator) -> Image.Image:
    """Where a crop covers the collage: a square or a disc with a soft edge."""
    outline = Image.new("L", (4 * side, 4 * side))
    draw, edges = ImageDraw.Draw(outline), (8, 8, 4 * side - 8, 4 * side - 8)
    draw.ellipse(edges, fill=255) if rng.random() < 0.5 else draw.rectangle(edges, fill=255)
    return outline.reduce(4)


def _captions(labels: list[str], places: list[str], serial: int, rng: np.random.Generator) -> dict[str, str]:
    """A vague raw caption, a short one of two of the things, and a long one with a sentence about each."""
    first, second = (labels[i] for i in rng.permutation(len(labels))[:2])
    long = []
    for label, place in zip(labels, places, strict=True):
        form = str(rng.choice(_SENTENCES))
        where = "in the center" if place == "center" else f"in the {place}"
        long.append(form.format(label=label, Label=label[0].upper() + label[1:], place=where))
    return {
        "raw_caption": str(rng.choice(_RAW)).format(serial=serial),
        "shortIB_captions": f"{first[0].upper() + first[1:]} and {second}.",
        "longIB_captions": " ".join(long),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
