"""Segmentation: made masks whose answer is known, every layout's convention of labels, windows that cover the image,
and errors that name the file.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import jpeg
from torch import nn

from dreamlip_train import cli
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.evaluation.segmentation.segmentation import (
    confusion,
    evaluate_segmentation,
    format_segmentation,
    intersection_over_union,
    predict,
    similarity_map,
    window_starts,
)
from dreamlip_train.evaluation.segmentation.segmentation_sets import (
    IGNORED,
    LAYOUTS,
    SetFiles,
    read_label_map,
    read_segmentation,
    source_of,
)
from dreamlip_train.model.build import build_model

THREE = SetFiles("images", "labels", "", ("red", "green", "blue"))


class ByColor(nn.Module):
    """A stand-in whose patch features are the patch's mean color and whose class features are the pure colors:
    segmentation by eye.
    """

    image_size, grid = 32, (4, 4)

    def encode_images(self, images):
        patches = nn.functional.avg_pool2d(images.float() / 255, 8)  # [T, 3, 4, 4]
        return patches.mean(dim=(2, 3)), patches.flatten(2).transpose(1, 2)

    def tokenize(self, texts):
        return torch.tensor([[THREE.classes.index(text.split()[-1].rstrip("."))] for text in texts])

    def encode_texts(self, tokens):
        return torch.eye(3)[tokens[:, 0]]


def write_pair(root, stem, labels, image=None, layout=THREE):
    """``labels`` [H, W] as a PNG, and the picture of their colors (or ``image``)."""
    for folder in (layout.images, layout.labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(root / layout.labels / f"{stem}.png")
    if image is None:
        image = np.zeros((*labels.shape, 3), np.uint8)
        for c in range(3):
            image[labels == c + 1, c] = 255
    Image.fromarray(image).save(root / layout.images / f"{stem}.jpg", quality=95, subsampling=0)


def quarters(height=48, width=80):
    """Label 0 in the upper left, 1 upper right, 2 lower left, 3 lower right; the borders on patch borders of a 48-pixel
    picture.
    """
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2, width // 2 :] = 1
    labels[height // 2 :, : width // 2] = 2
    labels[height // 2 :, width // 2 :] = 3
    return labels


def test_a_picture_of_pure_colors_is_segmented_right(tmp_path):
    write_pair(tmp_path, "a", quarters())
    write_pair(tmp_path, "b", quarters(96, 64))
    found = evaluate_segmentation(
        ByColor(), read_segmentation(tmp_path, THREE), THREE, ("{c}",), "cpu", resize=48, stride=16
    )
    assert found["miou"] > 90 and found["pixel_accuracy"] > 95 and set(found["per_class"]) == set(THREE.classes)
    assert f"mIoU {found['miou']:.1f} %" in format_segmentation(found)


def test_a_row_of_pixels_does_not_become_gigabytes(tmp_path):
    """1 x 65,000 pixels were resized to 48 x 3,120,000."""
    labels = np.zeros((1, 65_000), np.uint8)
    labels[:, 30_000:] = 1
    write_pair(tmp_path, "a", labels)
    found = evaluate_segmentation(
        ByColor(), read_segmentation(tmp_path, THREE), THREE, ("{c}",), "cpu", resize=48, stride=32
    )
    assert found["pixel_accuracy"] > 90


def test_swapped_classes_score_zero(tmp_path):
    labels = np.full((48, 48), 1, np.uint8)
    labels[:, 24:] = 2
    write_pair(tmp_path, "a", labels)
    write_pair(tmp_path, "a", np.where(labels == 1, 2, 1), np.array(Image.open(tmp_path / "images" / "a.jpg")))
    found = evaluate_segmentation(
        ByColor(), read_segmentation(tmp_path, THREE), THREE, ("{c}",), "cpu", resize=48, stride=16
    )
    assert found["miou"] < 5 and found["per_class"]["blue"] is None, "a class nowhere to be seen is not in the mean"


def test_background_is_where_no_class_is_likely(tmp_path):
    layout = SetFiles("images", "labels", "", THREE.classes, background=True)
    labels, image = quarters(96, 160), np.zeros((96, 160, 3), np.uint8)
    image[labels == 0] = 128  # gray: equally like every class
    for c in range(3):
        image[labels == c + 1, c] = 255
    write_pair(tmp_path, "a", labels, image)
    pairs = read_segmentation(tmp_path, layout)
    found = evaluate_segmentation(
        ByColor(), pairs, layout, ("{c}",), "cpu", resize=96, stride=16, background_threshold=0.6
    )
    assert found["per_class"]["background"] > 80 and found["miou"] > 80
    without = evaluate_segmentation(
        ByColor(), pairs, layout, ("{c}",), "cpu", resize=96, stride=16, background_threshold=0.0
    )
    assert without["per_class"]["background"] == 0


def test_iou_by_hand_and_ignored_pixels():
    labels = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 255]])
    labels[labels == 255] = IGNORED
    predicted = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 1]])
    overlap = intersection_over_union(confusion(predicted, labels, 4))
    assert overlap[:3].tolist() == pytest.approx([1 / 4, 2 / 4, 0]) and overlap[3].isnan()


def test_windows_cover_every_pixel_once_or_more_and_average():
    for length in (32, 33, 47, 48, 64, 79):
        starts = window_starts(length, 32, 16)
        covered = np.zeros(length, int)
        for start in starts:
            assert 0 <= start <= length - 32
            covered[start : start + 32] += 1
        assert covered.min() >= 1 and starts == sorted(set(starts))
    image = torch.full((3, 50, 70), 255, dtype=torch.uint8)
    similarity = similarity_map(ByColor(), image, torch.eye(3), stride=16)
    torch.testing.assert_close(similarity, torch.full((3, 50, 70), 3**-0.5)), "the mean of equal windows is their value"
    assert predict(similarity, (25, 35), None).shape == (25, 35)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_label_convention_of_each_layout(tmp_path, name):
    layout = LAYOUTS[name]
    count = len(layout.classes)
    raw = np.array([[0, 1, layout.first + count - 1, layout.void]])
    image = Image.fromarray(raw.astype(np.uint16 if layout.void > 255 else np.uint8))
    if name.startswith("voc"):  # VOC's maps are palette pictures
        image = image.convert("P")
        image.putdata(raw.flatten().tolist())
    image.save(tmp_path / f"a{layout.label_end}")
    zero = (count if layout.background else IGNORED) if layout.first == 1 else 0
    assert read_label_map(tmp_path / f"a{layout.label_end}", layout).tolist() == [
        [zero, 1 - layout.first, count - 1, IGNORED]
    ]
    sizes = {"voc20": 20, "voc21": 20, "pc59": 59, "pc60": 59, "pc459": 459, "ade150": 150, "ade847": 847}
    sizes |= {"coco-stuff": 171, "coco-object": 80, "cityscapes": 19}
    assert count == sizes[name] == len(set(layout.classes)) and source_of(name)
    if name != "ade847":  # whose 255 is a class
        assert not any(";" in one for one in layout.classes)


@pytest.mark.parametrize(
    ("name", "image", "labels"),
    [
        (
            "cityscapes",
            "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png",
            "gtFine/val/ulm/ulm_000000_000019_gtFine_labelTrainIds.png",
        ),
        ("coco-stuff", "images/val2017/000000000139.jpg", "annotations/val2017/000000000139_labelTrainIds.png"),
        ("coco-object", "images/val2017/000000000139.jpg", "annotations/val2017/000000000139_instanceTrainIds.png"),
        (
            "ade847",
            "images_detectron2/validation/ADE_val_00000001.jpg",
            "annotations_detectron2/validation/ADE_val_00000001.tif",
        ),
        ("pc459", "val/image/2008_000002.jpg", "val/label/2008_000002.tif"),
    ],
)
def test_the_published_trees_are_found(tmp_path, name, image, labels):
    for file in (image, labels, labels.replace("TrainIds.png", "Color.png")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    (pair,) = read_segmentation(tmp_path, LAYOUTS[name])
    assert (pair.image, pair.labels) == (tmp_path / image, tmp_path / labels)


def test_mean_over_labeled_classes_is_detectron2s(tmp_path):
    """Half of a red picture is labeled red, half green: green is never predicted, blue in neither."""
    labels = np.full((32, 32), 1, np.uint8)
    labels[:, 16:] = 2
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 2] = 255
    write_pair(tmp_path, "a", labels, image)
    found = evaluate_segmentation(
        ByColor(), read_segmentation(tmp_path, THREE), THREE, ("{c}",), "cpu", resize=32, stride=16
    )
    assert found["miou"] == found["miou_labeled"] == 0 and found["per_class"]["blue"] == 0
    image[:, :, :] = (255, 0, 0)
    image[:, 24:] = (0, 0, 255)
    write_pair(tmp_path, "a", labels, image)
    found = evaluate_segmentation(
        ByColor(), read_segmentation(tmp_path, THREE), THREE, ("{c}",), "cpu", resize=32, stride=16
    )
    red = found["per_class"]["red"]
    assert found["miou"] == pytest.approx(red / 3) and found["miou_labeled"] == pytest.approx(red / 2) and red > 50


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_many_classes_are_compared_some_at_a_time(threshold, monkeypatch):
    """The same classes as all at once, which for 847 classes and a photograph are 10 GB."""
    similarity = torch.randn(20, 5, 7, generator=torch.Generator().manual_seed(0)) / 10
    whole = nn.functional.interpolate(similarity[None], size=(9, 12), mode="bilinear", align_corners=False)[0]
    expected = whole.argmax(dim=0)
    if threshold is not None:
        expected[(100 * whole).softmax(dim=0).amax(dim=0) < threshold] = 20
    for held in (1, 300, 2**24):
        monkeypatch.setattr("dreamlip_train.evaluation.segmentation.segmentation._HELD_ELEMENTS", held)
        assert torch.equal(predict(similarity, (9, 12), threshold), expected)


def test_the_command_reads_vocs_folders(tmp_path, capsys):
    layout = LAYOUTS["voc20"]
    for stem in ("2007_000001", "2007_000002", "not_in_val"):
        write_pair(tmp_path, stem, quarters(40, 60), np.array(Image.open(_photo(tmp_path))), layout)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_000001\n2007_000002\n")
    torch.save(
        {"state_dict": build_model(ModelConfig(name="ViT-S-32-alt", local_logit_scale=False), 0).clip.state_dict()},
        tmp_path / "x.pt",
    )
    model = [
        "eval",
        "segment",
        str(tmp_path / "x.pt"),
        "--model",
        "ViT-S-32-alt",
        "--templates",
        "photo",
        "--resize",
        "224",
        "--stride",
        "112",
    ]
    cli.main([*model, "--root", str(tmp_path), "--layout", "voc20", "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert written["images"] == 2 and f"mIoU {written['miou']:.1f} %" in printed and "2 images" in printed
    with pytest.raises(SystemExit):
        cli.main([*model, "--root", str(tmp_path), "--layout", "ade150"])
    assert "--root: no folder" in capsys.readouterr().err


def _photo(folder):
    path = folder / "photo.jpg"
    path.write_bytes(jpeg(1, 64))
    Image.open(path).convert("RGB").resize((60, 40)).save(path)
    return path


def test_what_is_wrong_with_a_set_is_named(tmp_path):
    write_pair(tmp_path, "a", quarters())
    write_pair(tmp_path, "b", np.full((48, 80), 4))
    pairs = read_segmentation(tmp_path, THREE)
    with pytest.raises(ValueError, match=r"b.png has label 4, the layout has 3 classes"):
        evaluate_segmentation(ByColor(), pairs, THREE, ("{c}",), "cpu", resize=48, stride=16)
    write_pair(tmp_path, "b", quarters(), np.zeros((48, 70, 3), np.uint8))
    with pytest.raises(ValueError, match="b.jpg is .48, 70. pixels, its label map .48, 80."):
        evaluate_segmentation(ByColor(), pairs, THREE, ("{c}",), "cpu", resize=48, stride=16)
    (tmp_path / "labels" / "b.png").write_bytes(b"cut")
    with pytest.raises(ValueError, match="b.png is no label map"):
        read_label_map(tmp_path / "labels" / "b.png", THREE)
    Image.new("RGB", (4, 4)).save(tmp_path / "labels" / "b.png")
    with pytest.raises(ValueError, match="its mode is RGB"):
        read_label_map(tmp_path / "labels" / "b.png", THREE)
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(ValueError, match="1 of 4 files are not there, such as .*a.jpg"):
        read_segmentation(tmp_path, THREE)
    with pytest.raises(ValueError, match="--resize, --stride: got 16 and 16; windows have 32 pixels"):
        evaluate_segmentation(ByColor(), pairs, THREE, ("{c}",), "cpu", resize=16, stride=16)
