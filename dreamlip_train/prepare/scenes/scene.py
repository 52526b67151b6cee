"""What a picture of the demo's world holds: several objects, each with a shape, color, texture, size and place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dreamlip_train.prepare.scenes import painting

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
