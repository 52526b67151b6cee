"""Decoding is strict, crops are torchvision's, and masks keep the image's geometry."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.augment import augment
from dreamlip_train.data.images import (
    ImageError,
    _crop_box,
    decode_image,
    decode_labels,
    media_type,
    random_resized_crop,
    resize_center_crop,
)


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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    """Trained on was the sensor's picture, seen by people and captioners the turned one."""
    image = Image.fromarray(np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    got = decode_image(data).permute(1, 2, 0).numpy()
    assert got.shape == upright.shape and np.abs(got - upright).max() <= 2


def test_damaged_exif_costs_nothing():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert decode_image(data).shape == (3, 60, 80)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    alpha = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 8, 4))
    image = alpha.quantize(4) if mode == "P" else alpha.convert(mode)
    got = decode_image(encoded(image, "PNG"))
    assert (got[:, :4] == 255).all() and (got[0, 4:] < 255).all()
    half = decode_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))
    assert (half.int() - 127).abs().max() <= 1


def test_transparent_color_of_rgb_and_gray_pngs_is_white():
    for mode, color in (("RGB", (0, 0, 0)), ("L", 0)):
        got = decode_image(encoded(Image.new(mode, (4, 4), color), "PNG", transparency=color))
        assert (got == 255).all(), mode


def test_sixteen_bits_are_scaled():
    """Everything above 255 of 65,535 was white."""
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = decode_image(encoded(Image.fromarray(values), "PNG"))
    assert np.array_equal(got[0].numpy(), np.rint(values / 257).astype(np.uint8)) and torch.equal(got[0], got[2])


def test_labels_are_the_values_that_are_written():
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = Image.fromarray(values, "P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    for image in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16) * 9)):
        factor = 9 if image.mode.startswith("I") else 1
        assert np.array_equal(decode_labels(encoded(image, "PNG")), values.astype(int) * factor)
    with pytest.raises(ImageError, match="one channel"):
        decode_labels(encoded(picture(), "PNG"))


def test_media_type():
    types = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp"}
    assert {format: media_type(encoded(picture(), format)) for format in types} == types


@pytest.mark.parametrize("shape", [(1, 65000), (65000, 1), (3, 20000)])
def test_a_thread_of_a_picture_is_evaluated_in_little_memory(shape):
    """1 x 65000 pixels, resized to 224 on the shorter side, were 9.8 GB."""
    row = torch.arange(max(shape), dtype=torch.float32).div(max(shape)).mul(255).byte()
    image = (row[None].expand(min(shape), -1) if shape[0] < shape[1] else row[:, None].expand(-1, min(shape)))[None]
    cropped = resize_center_crop(image.expand(3, -1, -1), 224)
    assert cropped.shape == (3, 224, 224) and (cropped.float() - 127.5).abs().max() < 3


def test_augmentations_are_torchvisions_and_off_draw_nothing():
    image = torch.from_numpy(np.asarray(picture())).permute(2, 0, 1).contiguous()
    rng = random.Random(0)
    before = rng.getstate()
    assert augment(image, DataConfig(), rng) is image and rng.getstate() == before
    assert torch.equal(augment(image, DataConfig(flip_prob=1.0), rng), image.flip(-1))
    gray = augment(image, DataConfig(gray_scale_prob=1.0), rng)
    assert torch.equal(gray, v2.functional.rgb_to_grayscale(image, 3)) and gray.shape == image.shape
    jittered = augment(image, DataConfig(color_jitter_prob=1.0), random.Random(1))
    assert jittered.dtype == torch.uint8 and not torch.equal(jittered, image)
    assert torch.equal(augment(image, DataConfig(color_jitter_prob=1.0), random.Random(1)), jittered)
    still = DataConfig(color_jitter_prob=1.0, color_jitter=(0.0, 0.0, 0.0, 0.0))
    assert (augment(image, still, rng).int() - image.int()).abs().max() <= 1
    drawn = [augment(image, DataConfig(flip_prob=0.25), random.Random(seed)) is not image for seed in range(400)]
    assert 70 < sum(drawn) < 130
    boxes = [_crop_box(60, 80, (0.2, 0.3), random.Random(seed), (2.0, 3.0)) for seed in range(50)]
    assert all(1.8 < width / height < 3.3 for _, _, height, width in boxes)


def test_erasing_fills_a_rectangle_with_noise_of_timms_shapes():
    image = torch.full((3, 64, 64), 7, dtype=torch.uint8)
    areas, ratios, values = [], [], []
    for seed in range(300):
        erased = augment(image, DataConfig(erase_prob=1.0), random.Random(seed))
        noisy = (erased != 7).any(0)
        rows, columns = noisy.any(1).nonzero().flatten(), noisy.any(0).nonzero().flatten()
        box = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert erased.dtype == torch.uint8 and (box != 7).float().mean() > 0.9
        areas.append(box[0].numel() / 64**2)
        ratios.append(box.shape[2] / box.shape[1])
        values.append(box.float().mean())
    assert 0.015 < min(areas) < 0.04 and 0.28 < max(areas) < 0.36 and min(ratios) < 0.5 and max(ratios) > 2
    assert torch.stack(values).mean() == pytest.approx(0.45 * 255, rel=0.05)
    again = [augment(image, DataConfig(erase_prob=0.3), random.Random(3)) for _ in range(2)]
    assert torch.equal(*again) and (image == 7).all()
