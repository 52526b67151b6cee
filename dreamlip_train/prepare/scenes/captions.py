"""What the demo's three speakers say of a scene, in DreamLIP's caption columns."""

from __future__ import annotations

import numpy as np

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.prepare.scenes.scene import PLACES, Scene, SceneObject

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


def caption_scene(scene: Scene, rng: np.random.Generator, serial: int = 0) -> dict[str, str]:
    """DreamLIP's seven caption columns: a vague raw caption, and a short and a long one by each of three speakers."""
    captions = {CAPTION_COLUMNS[0]: _fill(rng.choice(_RAW_FORMS), scene, rng, "IB", serial)}
    for speaker in ("IB", "SV", "LLA"):
        captions[f"short{speaker}_captions"] = _fill(rng.choice(_SHORT_FORMS[speaker]), scene, rng, speaker, serial)
        captions[f"long{speaker}_captions"] = " ".join(
            _describe(thing, speaker, str(rng.choice(_LONG_FORMS[speaker]))) for thing in scene.objects
        )
    return captions


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
