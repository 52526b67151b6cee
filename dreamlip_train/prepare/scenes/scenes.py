"""The demo's world: pictures of several objects, each with a shape, color, texture, size and place,
and captions in DreamLIP's columns.

A scene is a pure function of (seed, split, index). Sentence j of each long caption describes the object that is value j
of the mask.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.scenes import painting

Split = Literal["train", "val"]

RADII = {"small": 12.5, "medium": 15.5, "large": 19.5}
"""Object radius in pixels of a 96-pixel picture."""
PLACES = (
    "upper left",
    "upper middle",
    "upper right",
    "middle left",
    "center",
    "middle right",
    "lower left",
    "lower middle",
    "lower right",
)

# How each MLLM of the demo speaks: words for sizes, shapes, textures and places, and its sentence forms.
_SIZE_WORDS = {
    "IB": {"small": "small", "medium": "medium-sized", "large": "large"},
    "SV": {"small": "little", "medium": "mid-sized", "large": "big"},
    "LLA": {"small": "small", "medium": "medium", "large": "large"},
}
_SHAPE_WORDS = {
    "IB": {
        "disc": "disc",
        "square": "square",
        "triangle": "triangle",
        "star": "star",
        "ring": "ring",
        "heart": "heart",
        "cross": "cross",
        "crescent": "crescent",
    },
    "SV": {
        "disc": "round disc",
        "square": "square tile",
        "triangle": "triangle",
        "star": "five-pointed star",
        "ring": "ring",
        "heart": "heart",
        "cross": "cross",
        "crescent": "crescent moon",
    },
    "LLA": {
        "disc": "circle",
        "square": "box",
        "triangle": "pyramid",
        "star": "star",
        "ring": "hoop",
        "heart": "heart shape",
        "cross": "plus sign",
        "crescent": "moon shape",
    },
}
_TEXTURE_WORDS = {
    "IB": {
        "plain": "plain",
        "striped": "striped",
        "dotted": "dotted",
        "checkered": "checkered",
        "speckled": "speckled",
        "fading": "fading",
    },
    "SV": {
        "plain": "with a smooth surface",
        "striped": "with stripes",
        "dotted": "with polka dots",
        "checkered": "with a checkered pattern",
        "speckled": "with tiny speckles",
        "fading": "with a color gradient",
    },
    "LLA": {
        "plain": "solid",
        "striped": "striped",
        "dotted": "spotted",
        "checkered": "checkered",
        "speckled": "speckled",
        "fading": "gradient",
    },
}
_PLACE_WORDS = {
    "IB": {p: f"in the {p}" for p in PLACES}
    | {
        "middle left": "on the left",
        "middle right": "on the right",
        "upper middle": "at the top",
        "lower middle": "at the bottom",
    },
    "SV": {p: f"in the {p} of the picture" for p in PLACES},
    "LLA": {p: f"at the {p.replace('upper', 'top').replace('lower', 'bottom')} of the image" for p in PLACES},
}
_LONG_FORMS = {
    "IB": ("A {size} {texture} {color} {shape} is {place}.", "There is a {size} {color} {texture} {shape} {place}."),
    "SV": (
        "{Place}, there is a {size} {color} {shape} {texture}.",
        "A {size} {color} {shape} {texture} can be seen {place}.",
    ),
    "LLA": (
        "The image shows a {texture} {color} {shape}, {size} in size, {place}.",
        "{Place} sits a {size} {color} {shape} that looks {texture}.",
    ),
}
_SHORT_FORMS = {
    "IB": ("a {color} {shape} and other objects on {ground}", "{number} objects on {ground}, one is a {color} {shape}"),
    "SV": (
        "A {color} {shape} and a {color2} {shape2} are shown on {ground}.",
        "The picture has {number} things, among them a {color} {shape}.",
    ),
    "LLA": (
        "An image of a {color} {shape} next to a {color2} {shape2}.",
        "{number} colorful objects placed on {ground}.",
    ),
}
_RAW_FORMS = (
    "a photo of some things",
    "stock photo: objects on {ground}",
    "{color} {shape} and more",
    "still life with {number} objects",
    "image {serial}",
    "colorful shapes on {ground} - free download",
    "{color} things, close up",
)
_GROUND_WORDS = {
    "wall": "a plain wall",
    "meadow": "a meadow",
    "beach": "a beach",
    "table": "a wooden table",
    "bricks": "a brick wall",
    "concrete": "concrete",
    "night": "a night sky",
}
_NUMBER_WORDS = {3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: what it is, and its center, radius (pixels) and rotation (radians)."""

    shape: str
    color: str
    texture: str
    size: str
    place: str
    center: tuple[float, float]
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What a scene holds; pictures and captions are drawn from it."""

    background: str
    objects: tuple[SceneObject, ...]
    image_size: int


def compose_scene(rng: np.random.Generator, image_size: int = 96) -> Scene:
    """3-5 objects in different ninths of the picture, none touching another, no two of the same color."""
    count = int(rng.integers(3, 6))
    colors = rng.choice(list(painting.COLORS), count, replace=False)
    background = str(rng.choice(painting.BACKGROUNDS))
    while True:
        cells = rng.choice(9, count, replace=False)
        objects = tuple(
            _compose_object(rng, str(color), int(cell), image_size) for color, cell in zip(colors, cells, strict=True)
        )
        if not _any_touch(objects):
            return Scene(background, objects, image_size)


def paint_scene(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The RGB picture, and the 8-bit mask: value j >= 1 is the j-th object, 0 the background."""
    size = scene.image_size
    image = painting.background(scene.background, size, rng)
    mask = np.zeros((size, size), np.uint8)
    light = rng.uniform(-2.6, -0.5)  # from above
    for j, thing in enumerate(scene.objects, start=1):
        cover = painting.coverage(thing.shape, thing.center, thing.radius, thing.angle, size)
        surface = painting.textured(thing.color, thing.texture, thing.center, thing.radius, size, rng)
        image = painting.place(image, surface, cover, thing.center, thing.radius, light)
        mask[cover >= 0.5] = j
    return painting.develop(image, rng), Image.fromarray(mask)


def caption_scene(scene: Scene, rng: np.random.Generator, serial: int = 0) -> dict[str, str]:
    """DreamLIP's seven caption columns: a vague raw caption, and a short and a long one by each of three speakers."""
    captions = {CAPTION_COLUMNS[0]: _fill(rng.choice(_RAW_FORMS), scene, rng, "IB", serial)}
    for speaker in ("IB", "SV", "LLA"):
        captions[f"short{speaker}_captions"] = _fill(rng.choice(_SHORT_FORMS[speaker]), scene, rng, speaker, serial)
        captions[f"long{speaker}_captions"] = " ".join(
            _describe(thing, speaker, str(rng.choice(_LONG_FORMS[speaker]))) for thing in scene.objects
        )
    return captions


def write_scene(folder: Path, seed: int, split: Split, index: int) -> dict[str, str]:
    """Write images/KEY.jpg and masks/KEY.png of one scene below folder; returns its row of captions.csv."""
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    scene = compose_scene(rng)
    picture, mask = paint_scene(scene, rng)
    key = f"{index:06d}"
    picture.save(folder / "images" / f"{key}.jpg", quality=int(rng.integers(80, 96)))
    mask.save(folder / "masks" / f"{key}.png")
    return {"Image Path": f"{key}.jpg", **caption_scene(scene, rng, serial=1000 + index)}


def prepare_scenes(output: str | Path, num_train: int = 6000, num_val: int = 200, seed: int = 0) -> dict[str, Any]:
    """Render the demo world: output/{train,val}/{images/*.jpg, masks/*.png, captions.csv}.

    captions.csv has DreamLIP's columns and is what ``prepare folder`` takes. The files depend on the arguments alone.

    Returns:
        {"train": {"samples", "captions", "images", "masks"}, "val": {...}} with the paths as strings.
    Raises:
        UserError: a negative count.
    """
    if num_train < 0 or num_val < 0:
        raise UserError(f"prepare scenes: num_train and num_val must be >= 0, got {num_train} and {num_val}")
    started = time.monotonic()
    summary = {}
    for split, count in (("train", num_train), ("val", num_val)):
        folder = Path(output) / split
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows = _map_processes(partial(write_scene, folder, seed, split), count)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["Image Path", *CAPTION_COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
        captions, text = folder / "captions.csv", table.getvalue().encode()
        # Left alone where it is the same: shards know their table by its time too, and would be refused as another
        # one's.
        if not captions.is_file() or captions.read_bytes() != text:
            captions.write_bytes(text)
        summary[split] = (
            {"samples": count}
            | {name: str(folder / name) for name in ("images", "masks")}
            | {"captions": str(folder / "captions.csv")}
        )
    print(
        f"prepare scenes: {num_train} training and {num_val} held-out scenes in {output} "
        f"({time.monotonic() - started:.0f} s)"
    )
    return summary


def _map_processes(function: Any, count: int) -> list[Any]:
    processes = min(os.cpu_count() or 1, 16, count // 100)
    if processes < 2:
        return [function(i) for i in range(count)]
    # The children only paint: forking is safe on Linux whatever the parent has imported, and ten times quicker to
    # start.
    with multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Pool(processes) as pool:
        return pool.map(function, range(count), chunksize=32)


def _compose_object(rng: np.random.Generator, color: str, cell: int, image_size: int) -> SceneObject:
    unit = image_size / 96
    size = str(rng.choice(list(RADII)))
    radius = RADII[size] * float(rng.uniform(0.94, 1.06))
    row, column = divmod(cell, 3)
    # A large object would leave the picture from the middle of an outer ninth: pull its center in.
    margin = radius * 1.12 + 1
    x, y = (float(np.clip(16 + 32 * c + rng.uniform(-4, 4), margin, 96 - margin)) for c in (column, row))
    shape, texture = str(rng.choice(painting.SHAPES)), str(rng.choice(painting.TEXTURES))
    return SceneObject(
        shape, color, texture, size, PLACES[cell], (x * unit, y * unit), radius * unit, float(rng.uniform(-0.25, 0.25))
    )


def _any_touch(objects: tuple[SceneObject, ...]) -> bool:
    pairs = ((a, b) for i, a in enumerate(objects) for b in objects[:i])
    return any(
        np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]) < 1.06 * (a.radius + b.radius) for a, b in pairs
    )


def _describe(thing: SceneObject, speaker: str, form: str) -> str:
    place = _PLACE_WORDS[speaker][thing.place]
    return form.format(
        size=_SIZE_WORDS[speaker][thing.size],
        color=thing.color,
        texture=_TEXTURE_WORDS[speaker][thing.texture],
        shape=_SHAPE_WORDS[speaker][thing.shape],
        place=place,
        Place=place[0].upper() + place[1:],
    )


def _fill(form: str, scene: Scene, rng: np.random.Generator, speaker: str, serial: int) -> str:
    first, second = (scene.objects[i] for i in rng.choice(len(scene.objects), 2, replace=False))
    words = _SHAPE_WORDS[speaker]
    return form.format(
        color=first.color,
        shape=words[first.shape],
        color2=second.color,
        shape2=words[second.shape],
        ground=_GROUND_WORDS[scene.background],
        number=_NUMBER_WORDS[len(scene.objects)],
        serial=serial,
    )
