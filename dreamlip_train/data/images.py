"""From image bytes to uint8 tensors: the one place that opens pictures, the random crop of training,
the center crop of evaluation.

What is decoded is the picture as people see it: EXIF orientation applied, transparency over white,
16-bit channels scaled to 8.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""The formats that are read, whatever a file is called. Pillow knows 40 more, among them EPS, for which it runs
Ghostscript.
"""
# 300 MB decoded; a damaged or hostile header can claim gigabytes, and loader workers are killed for it.
MAX_PIXELS = 100_000_000
RATIOS = (3 / 4, 4 / 3)
_LONGEST_SIDES = (
    16  # beyond this ratio only the middle of a picture is resized: a row of 65,000 pixels would become gigabytes
)
_ORIENTATION = 0x0112


class ImageError(ValueError):
    """Bytes that are not a whole image; the message says what is wrong."""


def open_picture(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture of one of ``formats`` of which only the header is read; every picture of this project is opened here.

    Raises:
        ValueError: it is none of them, or has over ``MAX_PIXELS`` pixels.
        OSError and others: Pillow's, for damaged headers.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:  # it names an object in memory
        raise ValueError(f"no {', '.join(formats)}, or damaged where it begins") from error
    _check_size(*picture.size)
    return picture


@contextlib.contextmanager
def pillow_reads_known_formats() -> Iterator[None]:
    """Within it Pillow itself opens no other formats than ``FORMATS``, PPM and TIFF, whoever calls it: other packages'
    data sets open their own pictures. Workers that are forked meanwhile inherit it.
    """
    Image.init()
    every = list(Image.ID)
    Image.ID[:] = [name for name in every if name in (*FORMATS, "PPM", "TIFF")]
    try:
        yield
    finally:
        Image.ID[:] = every


def decode_image(data: bytes) -> Tensor:
    """[3, H, W] uint8 RGB from the bytes of a picture. JPEGs are decoded strictly: damage that other decoders paint
    over is an error.

    Raises:
        ImageError: the bytes are damaged, no image of ``FORMATS``, or claim over 100 million pixels.
    """
    try:
        height, width, colorspace = simplejpeg.decode_jpeg_header(data)[:3] if data[:2] == b"\xff\xd8" else (0, 0, "")
        _check_size(width, height)
        if colorspace not in ("", "CMYK", "YCCK"):
            array = _turned(simplejpeg.decode_jpeg(data), _jpeg_orientation(data))
        else:
            with open_picture(data) as picture:
                array = _turned(np.array(_rgb(picture)), _orientation(picture))
    except Exception as error:  # decoders raise everything from struct.error to SyntaxError
        raise ImageError(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def decode_labels(source: bytes | Path) -> np.ndarray:
    """[H, W] int64: the values of a one-channel picture as they are written, palette indices included.

    A file may be a TIFF too, as 16-bit label maps of segmentation sets are; bytes, of shards, may not.

    Raises:
        ImageError: the file is missing or damaged, or has several channels.
    """
    try:
        formats, data = (FORMATS, source) if isinstance(source, bytes) else ((*FORMATS, "TIFF"), source.read_bytes())
        with open_picture(data, formats) as picture:
            if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise ValueError(f"its mode is {picture.mode}, a label map is one channel")
            return np.asarray(picture).astype(np.int64)
    except Exception as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error


def media_type(data: bytes) -> str:
    """The MIME type of a picture that decodes, such as "image/jpeg".

    Raises:
        ImageError: as ``decode_image``.
    """
    decode_image(data)
    with open_picture(data) as picture:
        return f"image/{(picture.format or '').lower()}".replace("mpo", "jpeg")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")


def _rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, over white where it is transparent."""
    if picture.mode.startswith("I"):  # 16-bit gray; Pillow would clip it at 255
        return Image.fromarray(np.rint(np.asarray(picture, np.float32) / 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation; opening a file costs, and most have none."""
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return 1
    with open_picture(data) as picture:
        return _orientation(picture)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF of a whole picture: Pillow raises what struct, TIFF and its own parser do
        return 1


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as EXIF says it is to be seen."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def random_resized_crop(
    image: Tensor, size: int, scale: tuple[float, float], rng: random.Random, ratio: tuple[float, float] = RATIOS
) -> Tensor:
    """torchvision's bicubic RandomResizedCrop(size, scale, ratio) of a uint8 image, drawn from ``rng`` -> [3, size,
    size] uint8.
    """
    height, width = image.shape[-2:]
    top, left, crop_height, crop_width = _crop_box(height, width, scale, rng, ratio)
    return functional.resized_crop(
        image, top, left, crop_height, crop_width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )


def _crop_box(
    height: int, width: int, scale: tuple[float, float], rng: random.Random, ratios: tuple[float, float] = RATIOS
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    # No such box fits: the largest centered one within the ratios.
    crop_width, crop_height = width, height
    if width / height < ratios[0]:
        crop_height = min(height, round(width / ratios[0]))
    elif width / height > ratios[1]:
        crop_width = min(width, round(height * ratios[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_center_crop(image: Tensor, size: int, *, nearest: bool = False) -> Tensor:
    """open_clip's evaluation geometry: shorter side to ``size`` (bicubic, or nearest for labels),
    then the center -> [C, size, size].

    Of a picture longer than 16 times its width only the middle is resized, which the crop alone can show.
    """
    shorter = min(image.shape[-2:])
    image = functional.center_crop(image, [min(side, _LONGEST_SIDES * shorter) for side in image.shape[-2:]])
    height, width = image.shape[-2:]
    target = [max(size, round(height * size / shorter)), max(size, round(width * size / shorter))]
    mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BICUBIC
    return functional.center_crop(functional.resize(image, target, mode, antialias=not nearest), [size, size])
