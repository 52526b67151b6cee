"""What a picture of the demo's world holds: several objects, each with a shape, color, texture, size and place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreamlip_train.prepare.scenes import painting

RADII = {"small": 14.0, "medium": 16.5, "large": 19.5}
"""Object radius in pixels of a 96-pixel picture. Below 14 most crescents and stars fill half of a single one of the
demo's 64 patches, or of none.
"""
_DRAWN_AT_ONCE = 64
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
    background = _one_of(rng, painting.BACKGROUNDS)
    colors = rng.permutation(len(painting.COLORS))[:count]
    sizes, radii, cells, centers = _layout(rng, count)
    unit = image_size / 96
    objects = tuple(
        SceneObject(
            shape=_one_of(rng, painting.SHAPES),
            color=tuple(painting.COLORS)[colors[i]],
            texture=_one_of(rng, painting.TEXTURES),
            size=sizes[i],
            place=PLACES[cells[i]],
            center=(float(centers[i, 0] * unit), float(centers[i, 1] * unit)),
            radius=float(radii[i] * unit),
            angle=float(rng.uniform(-0.25, 0.25)),
        )
        for i in range(count)
    )
    return Scene(background, objects, image_size)


def _one_of(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]  # rng.choice makes an array of strings first


def _layout(
    rng: np.random.Generator, count: int
) -> tuple[list[str], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Sizes, radii, ninths of the picture and centers [count, 2] (x, y; a picture of 96 pixels) in which no two objects
    touch: the first such of many drawn at once, for five objects seldom find room.
    """
    names, of_size = tuple(RADII), np.array(list(RADII.values()))
    while True:
        sizes = rng.integers(len(names), size=(_DRAWN_AT_ONCE, count))
        radii = of_size[sizes] * rng.uniform(0.94, 1.06, sizes.shape)
        cells = rng.permuted(np.tile(np.arange(9), (_DRAWN_AT_ONCE, 1)), axis=1)[:, :count]
        # A large object would leave the picture from the middle of an outer ninth: pull its center in.
        margin = (radii * 1.12 + 1)[:, :, None]
        middles = 16 + 32 * np.stack([cells % 3, cells // 3], -1)
        centers = np.clip(middles + rng.uniform(-4, 4, middles.shape), margin, 96 - margin)
        gaps = np.linalg.norm(centers[:, :, None] - centers[:, None], axis=-1)
        gaps -= 1.06 * (radii[:, :, None] + radii[:, None])
        fits = ((gaps >= 0) | np.eye(count, dtype=bool)).all((1, 2))
        if fits.any():
            first = fits.argmax()
            return [names[size] for size in sizes[first]], radii[first], cells[first], centers[first]


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
