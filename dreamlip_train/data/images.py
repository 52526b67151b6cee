"""From image bytes to uint8 tensors: strict decoding, the random crop of training, the centre crop of evaluation."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

RATIOS = (3 / 4, 4 / 3)
MAX_PIXELS = (
    100_000_000  # 300 MB decoded; a damaged or hostile header can claim gigabytes, and loader workers are killed for it
)


class ImageError(ValueError):
    """Bytes that are not a whole image; the message says what is wrong."""


def decode_image(data: bytes) -> Tensor:
    """[3, H, W] uint8 RGB from JPEG, PNG or WebP bytes. JPEGs are decoded strictly: damage that other decoders paint over is an error.

    Raises:
        ImageError: the bytes are damaged or no image, or claim over 100 million pixels.
    """
    try:
        height, width, colorspace = simplejpeg.decode_jpeg_header(data)[:3] if data[:2] == b"\xff\xd8" else (0, 0, "")
        _check_size(width, height)
        if colorspace not in ("", "CMYK", "YCCK"):
            array = simplejpeg.decode_jpeg(data)
        else:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size)
                array = np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise everything from struct.error to SyntaxError
        raise ImageError(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")


def random_resized_crop(image: Tensor, size: int, scale: tuple[float, float], rng: random.Random) -> Tensor:
    """torchvision's bicubic RandomResizedCrop(size, scale) of a uint8 image, drawn from ``rng`` -> [3, size, size] uint8."""
    height, width = image.shape[-2:]
    top, left, crop_height, crop_width = _crop_box(height, width, scale, rng)
    return functional.resized_crop(
        image, top, left, crop_height, crop_width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )


def _crop_box(height: int, width: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    # No such box fits: the largest centred one within the ratios.
    crop_width, crop_height = width, height
    if width / height < RATIOS[0]:
        crop_height = min(height, round(width / RATIOS[0]))
    elif width / height > RATIOS[1]:
        crop_width = min(width, round(height * RATIOS[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_center_crop(image: Tensor, size: int, *, nearest: bool = False) -> Tensor:
    """open_clip's evaluation geometry: shorter side to ``size`` (bicubic, or nearest for labels), then the centre -> [C, size, size]."""
    height, width = image.shape[-2:]
    shorter = min(height, width)
    target = [max(size, round(height * size / shorter)), max(size, round(width * size / shorter))]
    mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BICUBIC
    return functional.center_crop(functional.resize(image, target, mode, antialias=not nearest), [size, size])
