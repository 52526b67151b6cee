"""Decoding is strict, crops are torchvision's, and masks keep the image's geometry."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dreamlip_train.data.images import ImageError, _crop_box, decode_image, random_resized_crop, resize_center_crop


def picture(width=80, height=60, mode="RGB"):
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack([3 * x % 256, 4 * y % 256, (x + y) % 256], -1).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "format, mode",
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")],
)
def test_formats(format, mode):
    got = decode_image(encoded(picture(mode=mode), format))
    assert got.shape == (3, 60, 80) and got.dtype == torch.uint8
    reference = np.asarray(Image.open(io.BytesIO(encoded(picture(mode=mode), format))).convert("RGB"))
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - reference).mean() < 1


def test_png_named_jpg_is_read_by_its_bytes():
    assert decode_image(encoded(picture(), "PNG")).shape == (3, 60, 80)


DAMAGED = {
    "empty": lambda d: b"",
    "truncated": lambda d: d[: len(d) // 2],
    "zero-filled tail": lambda d: d[: len(d) // 2] + b"\0" * (len(d) - len(d) // 2),
    "random middle": lambda d: (
        d[: len(d) // 2] + bytes(random.Random(0).randrange(256) for _ in range(200)) + d[len(d) // 2 + 200 :]
    ),
    "HTML": lambda d: b"<html>404</html>",
    "header alone": lambda d: d[:20],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_an_error(damage):
    """PIL paints over a zero-filled tail without a word; a model would learn from it."""
    with pytest.raises(ImageError):
        decode_image(DAMAGED[damage](encoded(picture(400, 300), "JPEG", quality=95)))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_header_that_claims_gigabytes_is_refused_before_they_are_allocated(format):
    data = bytearray(encoded(picture(), format))
    place = data.index(b"\xff\xc0") + 5 if format == "JPEG" else data.index(b"IHDR") + 4
    claim = struct.pack(">HH", 65000, 65000) if format == "JPEG" else struct.pack(">II", 65000, 65000)
    data[place : place + len(claim)] = claim
    if format == "PNG":
        data[place + 13 : place + 17] = struct.pack(">I", zlib.crc32(bytes(data[place - 4 : place + 13])))
    with pytest.raises(ImageError, match="65000 x 65000 pixels are more than 100,000,000|decompression bomb"):
        decode_image(bytes(data))


@pytest.mark.parametrize("height, width", [(60, 80), (1, 1), (10, 300), (300, 10)])
def test_crop_boxes_have_torchvision_s_distribution(height, width):
    scale = (0.4, 1.0)
    image = torch.zeros(3, height, width)
    torch.manual_seed(0)
    theirs = torch.tensor(
        [
            v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(8, scale), [image])[k]
            for _ in range(1500)
            for k in ("top", "left", "height", "width")
        ]
    )
    rng = random.Random(0)
    ours = torch.tensor([_crop_box(height, width, scale, rng) for _ in range(1500)])
    theirs = theirs.view(-1, 4)
    assert (
        (ours[:, 0] + ours[:, 2] <= height).all()
        and (ours[:, 1] + ours[:, 3] <= width).all()
        and (ours[:, 2:] > 0).all()
    )
    for a, b, span in zip(ours.double().T, theirs.double().T, (height, width, height, width), strict=True):
        assert abs(a.mean() - b.mean()) < 0.03 * span + 0.05
        assert abs(a.std() - b.std()) < 0.03 * span + 0.05


def test_crop_is_bicubic_and_full_scale_keeps_the_picture():
    image = decode_image(encoded(picture(64, 64), "PNG"))
    out = random_resized_crop(image, 64, (1.0, 1.0), random.Random(1))
    assert out.shape == (3, 64, 64) and out.dtype == torch.uint8
    assert (out.float() - image.float()).abs().mean() < 40
    assert torch.equal(out, random_resized_crop(image, 64, (1.0, 1.0), random.Random(1)))


@pytest.mark.parametrize("height, width", [(60, 80), (80, 60), (61, 97), (32, 32)])
def test_evaluation_geometry_is_open_clip_s_and_masks_follow(height, width):
    from open_clip.transform import image_transform

    image = decode_image(encoded(picture(width, height), "PNG"))
    got = resize_center_crop(image, 32)
    theirs = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture(width, height)) * 255
    assert (got.float() - theirs).abs().mean() < 2.5
    label = torch.zeros(1, height, width, dtype=torch.uint8)
    label[:, : height // 2] = 7
    mask = resize_center_crop(label, 32, nearest=True)
    assert set(mask.unique().tolist()) <= {0, 7} and (mask[0, :15] == 7).all() and (mask[0, 17:] == 0).all()
