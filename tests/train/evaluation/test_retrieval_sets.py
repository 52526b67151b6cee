"""Flickr30k's and COCO's layouts give the same numbers as the dense computation; what is missing is named before
anything is computed.
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from shard_files import jpeg, write_tar
from tiny import tiny_model

from dreamlip_train import cli
from dreamlip_train.data.images import decode_image, resize_center_crop
from dreamlip_train.evaluation.retrieval.retrieval_sets import evaluate_retrieval, format_retrieval, read_set
from dreamlip_train.model.build import build_model

COUNT = 24
WORDS = "red green blue star moon tree car dog cat house left right above below".split()


def captions(i):
    """5 captions an image, the third image has 7."""
    return [
        f"a {WORDS[(i + 3 * j) % 14]} {WORDS[(5 * i + j) % 14]} near {i} {WORDS[(i * j) % 14]}s and {j}"
        for j in range(7 if i == 2 else 5)
    ]


@pytest.fixture
def layouts(tmp_path):
    """The same test images in three layouts: (annotations, images) by name."""
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    karpathy, coco, members = [], {"images": [], "annotations": []}, []
    for i in range(COUNT + 4):
        name, split = f"{i:04d}.jpg", "test" if i < COUNT else "train"
        (folder / "val2014" / name).write_bytes(jpeg(i, 50))
        karpathy.append(
            {
                "filepath": "val2014",
                "filename": name,
                "split": split,
                "sentences": [{"raw": text} for text in captions(i)],
            }
        )
        if split == "test":
            coco["images"].append({"id": 100 + i, "file_name": name})
            coco["annotations"] += [{"image_id": 100 + i, "caption": text} for text in captions(i)]
            members += [(f"{i:04d}.jpg", jpeg(i, 50)), (f"{i:04d}.txt", "\n".join(captions(i)).encode())]
    coco["annotations"].sort(key=lambda annotation: annotation["caption"][-1])  # in no order of images, as COCO's are
    order = {text: j for i in range(COUNT) for j, text in enumerate(captions(i))}
    coco["annotations"].sort(key=lambda annotation: order[annotation["caption"]])
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    (tmp_path / "captions_val2017.json").write_text(json.dumps(coco))
    write_tar(tmp_path / "wds" / "test" / "0.tar", members)
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("1")
    return {
        "karpathy": (tmp_path / "karpathy.json", folder),
        "coco": (tmp_path / "captions_val2017.json", folder / "val2014"),
        "wds": (tmp_path / "wds", ""),
    }


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_model(), seed=3).eval()


def dense(image_ND, text_MD, owner):
    """Recall from the whole similarity matrix, as clip_benchmark defines it."""
    similarity = (text_MD @ image_ND.T).numpy()
    found = {"t2i": {}, "i2t": {}}
    for k in (1, 5, 10):
        best = np.argsort(-similarity, axis=1)[:, :k]
        found["t2i"][f"r_at_{k}"] = 100 * np.mean([owner[m] in best[m] for m in range(len(owner))])
        best = np.argsort(-similarity.T, axis=1)[:, :k]
        found["i2t"][f"r_at_{k}"] = 100 * np.mean([any(owner[m] == n for m in best[n]) for n in range(len(image_ND))])
    return found


@pytest.mark.parametrize("layout", ["karpathy", "coco", "wds"])
@pytest.mark.parametrize("each", [5, 0])
def test_every_layout_gives_the_dense_numbers(layouts, model, layout, each):
    pictured = list(read_set(*layouts[layout]))
    assert len(pictured) == COUNT and sorted(pictured[2].captions) == sorted(captions(2))
    found = evaluate_retrieval(model, iter(pictured), "cpu", captions_per_image=each, batch_size=7)
    assert (found["images"], found["captions"]) == (COUNT, COUNT * 5 + (0 if each else 2))
    with torch.no_grad():
        images, texts, owner = [], [], []
        for i, one in enumerate(pictured):
            images.append(
                model.encode_images(
                    resize_center_crop(decode_image(one.data or Path(one.name).read_bytes()), 32)[None]
                )[0]
            )
            for text in one.captions[: each or None]:
                texts.append(model.encode_texts(model.tokenize([text])))
                owner.append(i)
    expected = dense(torch.cat(images), torch.cat(texts), owner)
    for way in ("t2i", "i2t"):
        for k in (1, 5, 10):
            assert found[way][f"r_at_{k}"] == pytest.approx(expected[way][f"r_at_{k}"], abs=1e-6), (way, k)
    assert found["chance"]["t2i"]["r_at_5"] == pytest.approx(100 * 5 / COUNT)


def test_the_command_prints_and_writes_the_numbers(layouts, tmp_path, capsys):
    big = open_clip.create_model("ViT-S-32-alt")
    torch.save({"state_dict": big.state_dict()}, tmp_path / "x.pt")
    annotations, images = layouts["karpathy"]
    words = [
        str(tmp_path / "x.pt"),
        "--model",
        "ViT-S-32-alt",
        "--annotations",
        str(annotations),
        "--images",
        str(images),
    ]
    cli.main(["eval", "retrieval-set", *words, "--output", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"{COUNT} images, {5 * COUNT} captions" in printed and f"{written['t2i']['r_at_10']:.1f}" in printed
    assert format_retrieval(written) in printed


def broken_layouts(layouts, tmp_path):
    annotations, images = layouts["karpathy"]
    coco = json.loads(layouts["coco"][0].read_text())
    coco["annotations"].append({"image_id": 7, "caption": "whose?"})
    (tmp_path / "orphan.json").write_text(json.dumps(coco))
    (tmp_path / "other.json").write_text('{"data": []}')
    (tmp_path / "cut.json").write_text('{"images": [')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (images / "val2014" / "0003.jpg").unlink()
    return {
        "missing image": ((annotations, images), "--images: 1 of 24 images are not there, such as .*0003.jpg"),
        "no folder": ((annotations, ""), "--images: no folder"),
        "split": ((annotations, images, "val"), "--split: got 'val'; the json has test, train"),
        "orphan": (
            (tmp_path / "orphan.json", images / "val2014"),
            "has captions of 1 images that it does not list, such as image_id 7",
        ),
        "other json": ((tmp_path / "other.json", images), "is neither Karpathy's json"),
        "cut json": ((tmp_path / "cut.json", images), "can't be read as json"),
        "deep json": ((tmp_path / "deep.json", images), "can't be read as json: its JSON is nested too deep"),
        "no tar": ((tmp_path / "wds", "", "val"), "has no .tar files"),
    }


@pytest.mark.parametrize(
    "problem", ["missing image", "no folder", "split", "orphan", "other json", "cut json", "deep json", "no tar"]
)
def test_what_is_wrong_with_a_set_is_named(layouts, tmp_path, problem):
    arguments, message = broken_layouts(layouts, tmp_path)[problem]
    with pytest.raises(ValueError, match=message):
        list(read_set(*arguments))


def test_a_damaged_image_is_named(layouts, model):
    annotations, images = layouts["karpathy"]
    (images / "val2014" / "0001.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(ValueError, match=r"--images: .*0001.jpg: .*; fetch it again"):
        evaluate_retrieval(model, read_set(annotations, images), "cpu")
