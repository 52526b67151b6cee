"""What is changed of a training picture after its crop, as in open_clip's AugmentationCfg: flips, color jitter and
gray, each drawn from the sample's own generator. What is off draws nothing.
"""

from __future__ import annotations

import random

from torch import Tensor
from torchvision.transforms.v2 import functional

from dreamlip_train.config.schema import DataConfig


def augment(image: Tensor, data: DataConfig, rng: random.Random) -> Tensor:
    """A uint8 picture [3, S, S], mirrored, recolored and grayed with the probabilities of ``data``."""
    if data.flip_prob and rng.random() < data.flip_prob:
        image = functional.horizontal_flip(image)
    if data.color_jitter_prob and rng.random() < data.color_jitter_prob:
        image = _color_jitter(image, data.color_jitter, rng)
    if data.gray_scale_prob and rng.random() < data.gray_scale_prob:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    return image


def _color_jitter(image: Tensor, strengths: tuple[float, float, float, float], rng: random.Random) -> Tensor:
    """torchvision's ColorJitter(*strengths): brightness, contrast, saturation and hue in random order."""
    changes = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    steps = [
        (change, rng.uniform(max(0.0, 1 - strength), 1 + strength))
        for change, strength in zip(changes, strengths, strict=False)
    ]
    steps.append((functional.adjust_hue, rng.uniform(-strengths[3], strengths[3])))
    rng.shuffle(steps)
    for change, amount in steps:
        image = change(image, amount)
    return image
