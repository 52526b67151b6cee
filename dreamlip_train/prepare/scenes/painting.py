"""Paints one scene of the demo world: textured, shaded objects with soft shadows on a photograph-like background.

Colors are float32 RGB in [0, 1], images [S, S, 3], coverage maps [S, S] in [0, 1]; lengths are in pixels unless they
say "radii".
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.floating]  # float32, which some of numpy's declared results are not

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "orange": (240, 135, 25),
    "yellow": (245, 215, 40),
    "green": (50, 150, 55),
    "teal": (20, 175, 175),
    "blue": (40, 75, 205),
    "purple": (125, 50, 160),
    "pink": (245, 130, 185),
    "white": (243, 243, 240),
    "black": (28, 28, 32),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "speckled", "fading")
SHAPES = ("disc", "square", "triangle", "star", "ring", "heart", "cross", "crescent")
BACKGROUNDS = ("wall", "meadow", "beach", "table", "bricks", "concrete", "night")

_OVERSAMPLE = 4


def shape_polygons(shape: str) -> list[NDArray[np.float64]]:
    """Outline of a shape of about unit radius, y down: [[n, 2] points]; a second outline is a hole."""
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "disc":
        return [circle]
    if shape == "ring":
        return [circle * 1.05, circle * 0.5]
    if shape == "square":
        return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86]
    if shape == "triangle":
        return [np.array([(0, -1.12), (1.1, 0.85), (-1.1, 0.85)])]
    if shape == "star":
        spikes = np.arange(10) * math.pi / 5 - math.pi / 2
        return [np.stack([np.cos(spikes), np.sin(spikes)], 1) * np.where(np.arange(10) % 2, 0.5, 1.2)[:, None]]
    if shape == "heart":
        x, y = (
            16 * np.sin(turn) ** 3,
            13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn),
        )
        return [np.stack([x, -y - 2], 1) / 15.5]
    if shape == "cross":
        a, b = 0.38, 1.05
        return [
            np.array(
                [
                    (-a, -b),
                    (a, -b),
                    (a, -a),
                    (b, -a),
                    (b, a),
                    (a, a),
                    (a, b),
                    (-a, b),
                    (-a, a),
                    (-b, a),
                    (-b, -a),
                    (-a, -a),
                ]
            )
        ]
    if shape == "crescent":
        outer, inner = np.linspace(0.6, 2 * math.pi - 0.6, 32), np.linspace(2 * math.pi - 1.02, 1.02, 32)
        edge = np.stack([np.cos(outer), np.sin(outer)], 1) * 1.1
        bite = np.stack([np.cos(inner) * 0.95 + 0.42, np.sin(inner) * 0.73], 1)
        return [np.concatenate([edge, bite])]
    raise ValueError(f"shape: got {shape!r}; one of {SHAPES}")


def coverage(shape: str, center: tuple[float, float], radius: float, angle: float, size: int) -> Array:
    """[size, size] share of each pixel inside the shape at center (x, y), turned by angle radians."""
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    canvas = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for fill, outline in zip((255, 0), shape_polygons(shape), strict=False):
        draw.polygon([tuple(p) for p in ((outline @ turn) * radius + center) * _OVERSAMPLE], fill=fill)
    return np.asarray(canvas.reduce(_OVERSAMPLE), np.float32) / 255


@functools.cache
def _grid(size: int) -> tuple[Array, Array]:
    """x [1, size] and y [size, 1] of the pixels."""
    ramp = np.arange(size, dtype=np.float32)
    return ramp[None, :], ramp[:, None]


def smooth_noise(rng: np.random.Generator, size: int, cells: int, stretch: int = 1) -> Array:
    """[size, size] noise in about [0, 1], smooth over size / cells pixels; stretch > 1 draws it out along x."""
    coarse = Image.fromarray((rng.random((cells, max(2, cells // stretch))) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def background(kind: str, size: int, rng: np.random.Generator) -> Array:
    """[size, size, 3] background; kinds are muted so that objects stand out."""
    y = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, size, dtype=np.float32)[None, :]
    grain = smooth_noise(rng, size, 8) - 0.5
    fine = rng.standard_normal((size, size), dtype=np.float32)
    tint = rng.uniform(-0.06, 0.06, 3).astype(np.float32)
    if kind == "wall":
        base = (
            np.array(((0.72, 0.70, 0.64), (0.58, 0.64, 0.68), (0.66, 0.62, 0.66))[rng.integers(3)], np.float32) + tint
        )
        light = 1.1 - 0.45 * np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.0, 0.5)) + 0.05 * grain
        return base * light[..., None]
    if kind == "concrete":
        clouds = (
            0.5 * smooth_noise(rng, size, 5) + 0.3 * smooth_noise(rng, size, 12) + 0.2 * smooth_noise(rng, size, 32)
        )
        return np.array((0.62, 0.61, 0.60), np.float32) + tint + (0.5 * (clouds - 0.5) + 0.03 * fine)[..., None]
    if kind == "table":
        plank = np.floor(y * 5 + rng.uniform(0, 1))
        shade = 0.06 * np.sin(plank * 2.7 + rng.uniform(0, 6)) + 0.30 * (smooth_noise(rng, size, 48, stretch=12) - 0.5)
        gap = np.where((y * 5 + rng.uniform(0, 1)) % 1 < 0.05, -0.14, 0)
        return np.array((0.62, 0.46, 0.31), np.float32) + tint + (shade + gap + 0.05 * grain)[..., None]
    if kind == "bricks":
        row = np.floor(y * 9)
        column = x * 5 + 0.5 * (row % 2)
        mortar = ((y * 9) % 1 < 0.14) | (column % 1 < 0.08)
        shade = 0.09 * np.sin(row * 5.1 + np.floor(column) * 3.3 + rng.uniform(0, 6)) + 0.10 * grain + 0.02 * fine
        brick = np.array((0.55, 0.36, 0.31), np.float32) + tint
        return np.where(mortar[..., None], np.float32(0.70), brick) + shade[..., None]
    if kind == "night":
        sky = np.array((0.10, 0.12, 0.24), np.float32) + np.array((0.16, 0.12, 0.16), np.float32) * y[..., None]
        stars = np.where(rng.random((size, size)) > 0.993, rng.uniform(0.3, 0.7), 0)
        return sky + (0.10 * grain + stars)[..., None].astype(np.float32)
    horizon = rng.uniform(0.3, 0.55)
    sky = np.array((0.50, 0.68, 0.88), np.float32) + np.array((0.30, 0.20, 0.06), np.float32) * (y / horizon)[..., None]
    sky = sky + (0.22 * np.clip(smooth_noise(rng, size, 6, stretch=2) - 0.5, 0, 1))[..., None]
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    if kind == "meadow":
        blades = 0.20 * (smooth_noise(rng, size, 40) - 0.5) + 0.04 * fine
        ground = (
            np.array((0.46, 0.55, 0.28), np.float32)
            + tint * 0.5
            - 0.14 * depth[..., None]
            + (blades + 0.08 * grain)[..., None]
        )
        return np.where((y < horizon + 0.03 * (smooth_noise(rng, size, 6) - 0.5))[..., None], sky, ground)
    if kind == "beach":
        waves = 0.06 * np.sin(y * 130 + 6 * grain)
        sea = np.array((0.28, 0.50, 0.60), np.float32) + waves[..., None]
        sand = np.array((0.83, 0.75, 0.58), np.float32) + tint * 0.5 + (0.12 * grain + 0.03 * fine)[..., None]
        shore = horizon + 0.18 + 0.06 * grain
        return np.where((y < horizon)[..., None], sky, np.where((y < shore)[..., None], sea, sand))
    raise ValueError(f"background: got {kind!r}; one of {BACKGROUNDS}")


def textured(
    color: str, texture: str, center: tuple[float, float], radius: float, size: int, rng: np.random.Generator
) -> Array:
    """[size, size, 3] surface of an object: its color and pattern, in coordinates of its own center and radius."""
    main = np.array(COLORS[color], np.float32) / 255 + rng.uniform(-0.03, 0.03, 3).astype(np.float32)
    # The second tone stays in the color's family, so that the color's name remains true of the whole object.
    other = main + 0.62 * (1 - main) if main.mean() < 0.45 else main * 0.38
    x, y = _grid(size)
    x, y = (x - center[0]) / radius, (y - center[1]) / radius
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    phase = rng.uniform(0, 1)
    if texture == "plain":
        share = np.zeros((size, size), np.float32)
    elif texture == "striped":
        share = np.clip(4 * np.sin(2 * math.pi * (along * 1.25 + phase)) + 0.5, 0, 1) * 0.9
    elif texture == "dotted":
        cell = 1.45
        u, v = (along * cell + phase) % 1 - 0.5, (across * cell + phase) % 1 - 0.5
        share = np.clip((0.30 - np.hypot(u, v)) * 12 + 0.5, 0, 1)
    elif texture == "checkered":
        share = (
            np.clip(9 * np.sin(math.pi * (along * 1.5 + phase)) * np.sin(math.pi * (across * 1.5 + phase)) + 0.5, 0, 1)
            * 0.9
        )
    elif texture == "speckled":
        specks = smooth_noise(rng, size, max(8, int(size / 2.2)))
        share = np.clip((specks - 0.62) * 8, 0, 1) * 0.95
    elif texture == "fading":
        share = np.clip(0.5 + 0.62 * along, 0, 1)
    else:
        raise ValueError(f"texture: got {texture!r}; one of {TEXTURES}")
    return main + share[..., None].astype(np.float32) * (other - main)


def place(
    image: Array, surface: Array, cover: Array, center: tuple[float, float], radius: float, light: float
) -> Array:
    """The image with a shaded surface and its soft shadow laid over it; light is the direction the light comes from,
    in radians.
    """
    size = image.shape[0]
    x, y = _grid(size)
    dx, dy = math.cos(light), math.sin(light)
    shift = max(2, round(0.22 * radius))
    shadow = Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.16 * radius + 1))
    shadow = np.roll(np.asarray(shadow, np.float32) / 255, (round(-dy * shift), round(-dx * shift)), axis=(0, 1))
    image = image * (1 - 0.5 * shadow * (1 - cover))[..., None]
    toward = ((x - center[0]) * dx + (y - center[1]) * dy) / radius
    inner = (
        np.asarray(
            Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.12 * radius + 0.5)),
            np.float32,
        )
        / 255
    )
    shade = (0.94 + 0.16 * toward) * (0.72 + 0.28 * np.clip(inner * 1.6 - 0.5, 0, 1))
    gloss = 0.22 * np.exp(
        -(((x - center[0]) / radius - 0.45 * dx) ** 2 + ((y - center[1]) / radius - 0.45 * dy) ** 2) / 0.09
    )
    lit = surface * shade[..., None] + gloss[..., None]
    return image * (1 - cover[..., None]) + lit * cover[..., None]


def develop(image: Array, rng: np.random.Generator) -> Image.Image:
    """The picture as a camera would give it: exposure, mild blur, sensor noise, 8 bits."""
    image = image * np.float32(rng.uniform(0.9, 1.08)) + rng.standard_normal(
        image.shape, dtype=np.float32
    ) * np.float32(rng.uniform(0.005, 0.02))
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
