"""What is changed of a training picture after its crop, as in open_clip's AugmentationCfg: flips, color jitter, gray,
an erased rectangle, each drawn from the sample's own generator. What is off draws nothing.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dreamlip_train.config.schema import DataConfig

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, of pixels in 0..1


def augment(image: Tensor, data: DataConfig, rng: random.Random) -> Tensor:
    """A uint8 picture [3, S, S], mirrored, recolored, grayed and erased with the probabilities of ``data``."""
    if data.flip_prob and rng.random() < data.flip_prob:
        image = functional.horizontal_flip(image)
    if data.color_jitter_prob and rng.random() < data.color_jitter_prob:
        image = _color_jitter(image, data.color_jitter, rng)
    if data.gray_scale_prob and rng.random() < data.gray_scale_prob:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if data.erase_prob and rng.random() < data.erase_prob:
        image = _erase(image, rng)
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


def _erase(image: Tensor, rng: random.Random) -> Tensor:
    """timm's RandomErasing(mode="pixel"): noise in a rectangle of 1/50 to 1/3 of the area, 0.3 to 1/0.3 as wide as
    high. timm's noise has the mean and deviation of normalized pixels; so has this, in uint8.
    """
    height, width = image.shape[-2:]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows < height and 0 < columns < width:
            break
    else:
        return image
    top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal((3, rows, columns), dtype=np.float32)
    pixels = torch.from_numpy(noise) * torch.tensor(_STD)[:, None, None] + torch.tensor(_MEAN)[:, None, None]
    image = image.clone()
    image[:, top : top + rows, left : left + columns] = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return image
