"""Long-caption retrieval: every published layout gives the numbers of FLAIR's definition, written here on its own, and
what is wrong with a set is named with where to get it.
"""

import json
import re

import pytest
import torch
from shard_files import jpeg
from tiny import tiny_model
from torch.nn.functional import normalize

from dreamlip_train import cli
from dreamlip_train.data.images import decode_image, resize_center_crop
from dreamlip_train.evaluation.retrieval import long_caption_sets
from dreamlip_train.evaluation.retrieval.long_caption_sets import SETS, flair_sentences, read_long_captions
from dreamlip_train.evaluation.retrieval.long_captions import evaluate_long_captions, format_long_captions
from dreamlip_train.evaluation.set_files import first_records
from dreamlip_train.model.build import build_model

COUNT = 12
WORDS = "red green blue star moon tree car dog cat house left right above below".split()


def caption(i):
    """Three sentences, of which the whole is longer than the tiny model's context of 16 tokens."""
    return (
        f"A {WORDS[i % 14]} {WORDS[(3 * i + 1) % 14]} stands here. It is 3.5 m from the {WORDS[(5 * i) % 14]}"
        f"{' and a ' + WORDS[(7 * i) % 14] if i % 2 else ''}.\nBelow is {WORDS[(i * i) % 14]} {i}."
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")


def docci(root):
    rows = []
    for i in range(COUNT + 2):
        split = "test" if i < COUNT else "train"
        write(root / "images" / f"{split}_{i:05d}.jpg", jpeg(i))
        rows.append({"example_id": f"{split}_{i}", "split": split, "image_file": f"{split}_{i:05d}.jpg"})
        rows[-1]["description"] = caption(i)
    write(root / "docci_descriptions.jsonlines", "".join(json.dumps(row) + "\n" for row in rows))


def iiw(root):
    for part, (name, folder, key, end) in enumerate(
        (
            ("DOCCI_Test", "docci", "image", ""),
            ("IIW-400", "docci_aar", "image/key", ""),
            ("DCI_Test", "dci", "image", ".jpg"),
        )
    ):
        rows = []
        for i in range(part * COUNT // 3, (part + 1) * COUNT // 3):
            write(root / folder / f"one_{i}.jpg", jpeg(i))
            rows.append({key: f"one_{i}{end}", "IIW": caption(i), "metrics/Specificity": "Neutral"})
        write(root / name / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def dci(root):
    base, splits = root / "densely_captioned_images", {"train": [], "valid": [], "test": []}
    for i in range(COUNT):
        write(base / "photos" / f"sa_{i}.jpg", jpeg(i))
        short, extra = caption(i).split("\n")
        write(
            base / "annotations" / f"{i}-data.json",
            json.dumps({"image": f"sa_{i}.jpg", "short_caption": short, "extra_caption": extra, "mask_data": {}}),
        )
        splits[("train", "valid", "test")[i // 4]].append(f"{i}-data.json")
    write(base / "splits.json", json.dumps(splits))


def urban1k(root):
    for i in range(COUNT):
        write(root / "image" / f"{i + 1}.jpg", jpeg(i))
        write(root / "caption" / f"{i + 1}.txt", caption(i).replace("\n", " ") + "\na second line is not read")


def sharegpt4v(root):
    rows = []
    for i in range(COUNT + 2):
        write(root / "sam" / ("images" if i % 2 else "") / f"sa_{i}.jpg", jpeg(i))
        human, answer = {"from": "human", "value": "<image>\nDescribe"}, {"from": "gpt", "value": caption(i)}
        rows.append({"id": i, "image": f"sam/images/sa_{i}.jpg", "conversations": [human, answer]})
    write(root / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(rows))


def flair_lists(path, images, folder):
    """FLAIR's own annotation files: a row a sentence; image ids in no order."""
    rows = []
    for i in range(COUNT):
        write(images / folder / f"{i}.jpg", jpeg(i))
        for text in flair_sentences(caption(i)):
            rows.append({"image_id": 100 - i, "image": f"{folder}{i}.jpg", "caption": text, "caption_id": len(rows)})
    write(path, json.dumps({"annotations": rows}))


WRITERS = {
    "docci": docci,
    "docci-fine": docci,
    "iiw": iiw,
    "iiw-fine": iiw,
    "dci": dci,
    "urban1k": urban1k,
    "sharegpt4v-1k": sharegpt4v,
    "docci-fine of FLAIR": lambda root: flair_lists(root / "annotations/test_annotations.json", root / "images", ""),
    "iiw-fine of FLAIR": lambda root: flair_lists(root / "test_annotations.json", root, "dci/"),
    "urban1k of FLAIR": lambda root: flair_lists(root / "annotations/annotations.json", root / "images", ""),
}


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
    """Sets of 12 images instead of 1,000."""
    spec = SETS["sharegpt4v-1k"]
    monkeypatch.setitem(SETS, "sharegpt4v-1k", long_caption_sets._SetSpec(spec.read, spec.source, False, True, COUNT))


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_model(), seed=3).eval()


def flair_recall(image_ND, text_MD, text_to_image):
    """FLAIR's definition: the rank of a text's image; of an image the best rank of any of its texts."""
    similarity_NM = image_ND @ text_MD.T
    t2i = [int((row.argsort(descending=True) == text_to_image[m]).nonzero()) for m, row in enumerate(similarity_NM.T)]
    i2t = []
    for n, row in enumerate(similarity_NM):
        order = row.argsort(descending=True).tolist()
        i2t.append(min(order.index(m) for m in range(len(text_to_image)) if text_to_image[m] == n))
    percent = lambda ranks, k: 100 * sum(rank < k for rank in ranks) / len(ranks)  # noqa: E731
    return {way: {f"r_at_{k}": percent(ranks, k) for k in (1, 5, 10)} for way, ranks in (("t2i", t2i), ("i2t", i2t))}


def encoded(model, texts):
    with torch.no_grad():
        return torch.cat([model.encode_texts(model.tokenize([text])) for text in texts])


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_flairs_numbers(tmp_path, model, layout):
    WRITERS[layout](tmp_path)
    name = layout.split(" of ")[0]
    found = evaluate_long_captions(model, read_long_captions(name, tmp_path), "cpu", batch_size=5)
    with torch.no_grad():
        pictures = torch.stack([resize_center_crop(decode_image(jpeg(i)), 32) for i in range(COUNT)])
        image_ND = model.encode_images(pictures)[0]
    split = [[piece.strip() for piece in re.split(r"\n|</s>|[.]", caption(i)) if piece.strip()] for i in range(COUNT)]
    many = [piece for own in split for piece in own if len(piece) > 1]
    owner = [i for i, own in enumerate(split) for piece in own if len(piece) > 1]
    if name.endswith("-fine") or layout == "urban1k of FLAIR":
        expected = {"sentence" if name.endswith("-fine") else "whole": (encoded(model, many), owner)}
    else:
        rejoined = name in ("iiw", "dci", "sharegpt4v-1k")
        whole = [". ".join(split[i]) if rejoined else caption(i) for i in range(COUNT)]
        sentences = [re.split(r"(?<=[a-z0-9]\.)\s", caption(i)) for i in range(COUNT)]
        assert all(len(own) == 3 for own in sentences)
        means = torch.stack([normalize(encoded(model, own).mean(dim=0), dim=0) for own in sentences])
        expected = {"whole": (encoded(model, whole), range(COUNT)), "sentence_mean": (means, range(COUNT))}
    for reading, (text_MD, text_to_image) in expected.items():
        got = found["readings"][reading]
        for way, recall in flair_recall(image_ND, text_MD, text_to_image).items():
            assert got[way] == pytest.approx(recall), (reading, way)
        assert got["chance"]["t2i"]["r_at_5"] == pytest.approx(100 * 5 / COUNT)
    assert found["images"] == COUNT and found["captions"] == len(text_to_image)
    if "whole" in expected and layout != "urban1k of FLAIR":
        whole, mean = found["readings"]["whole"], found["readings"]["sentence_mean"]
        assert (whole["texts"], whole["cut"], mean["texts"], mean["cut"]) == (COUNT, COUNT, 3 * COUNT, 0)
        assert f"{COUNT} of {COUNT} texts were longer than 16 tokens and were cut" in format_long_captions(found)


def test_flairs_published_sentences():
    """As in FLAIR's imageinwords/test_annotations.json: a piece of one character is none."""
    text = 'Some black marks are in the "B." Dirt is between the wall and “B.” The dappled shadows lie across it.'
    made = [
        'Some black marks are in the "B',
        '" Dirt is between the wall and “B',
        "” The dappled shadows lie across it",
    ]
    assert flair_sentences(text) == made
    assert flair_sentences('The text "W. H. BRADY CO." is small. ”') == ['The text "W', "BRADY CO", '" is small']


def broken(root, problem):
    """A set with one fault, the set's name, and what the error must say."""
    if problem == "no folder":
        return root / "none", "dci", "--root: no folder '.*none'. DCI is dci.tar.gz of github.com/facebookresearch/DCI"
    if problem == "another folder":
        return root, "docci", r"--root: no file .*docci_descriptions.jsonlines or .*\. DOCCI is docci_descriptions"
    if problem == "missing image":
        urban1k(root)
        (root / "image" / "3.jpg").unlink()
        return root, "urban1k", "1 of urban1k's 12 images are not there, such as .*3.jpg; fetch them"
    if problem == "empty":
        write(root / "docci_descriptions.jsonlines", '{"split": "train"}\n')
        return root, "docci", "has no image of docci with a text"
    if problem == "cut json":
        write(root / "share4v_sam_10k.json", '[{"image"')
        return (
            root,
            "sharegpt4v-10k",
            "a json list of at least 10000 records, got 0 records, then '.\"image\"'",
        )
    if problem == "short":
        sharegpt4v(root)
        return root, "sharegpt4v-10k", "expected a json list of at least 10000 records, got 14 records, then '.'"
    if problem == "other keys":
        iiw(root)
        write(root / "IIW-400/data.jsonl", '{"image/key": "a", "caption": "b"}\n')
        return root, "iiw", 'expected "IIW", a text, in record 1, which has the keys image/key, caption'
    if problem == "no caption":
        urban1k(root)
        write(root / "caption" / "7.txt", "\n")
        return root, "urban1k", "7.txt has no caption in its first line"
    write(root / "annotations/annotations.json", "[]")
    return root, "urban1k", 'annotations.json has another layout: expected "annotations", a list'


PROBLEMS = "no folder,another folder,missing image,empty,cut json,short,other keys,no caption,a list".split(",")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_wrong_with_a_set_is_named(tmp_path, problem):
    root, name, message = broken(tmp_path, problem)
    with pytest.raises(ValueError, match=message):
        read_long_captions(name, root)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_only_the_first_records_are_read(tmp_path, monkeypatch, chunk):
    """ShareGPT4V's json has 1.2 million records and 1.5 GB, of which the first 1,000 or 10,000 are the set."""
    monkeypatch.setattr("dreamlip_train.evaluation.set_files._CHUNK", chunk)
    write(tmp_path / "a.json", '[{"a": "]}, {"}, {"b": [1, "é"]} ,\n {"c": 3}, then what is never read')
    assert first_records(tmp_path / "a.json", 3, "") == [{"a": "]}, {"}, {"b": [1, "é"]}, {"c": 3}]
    for content, message in (('{"a": 1}', "a json list"), ("[" * 100_000, "recursion"), ("", "a json list")):
        write(tmp_path / "a.json", content)
        with pytest.raises(ValueError, match=message):
            first_records(tmp_path / "a.json", 3, "")


def test_one_image_and_a_strip_of_pixels(tmp_path, model):
    """One image is found by every text; a picture of 1 x 65,000 pixels costs no gigabytes."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (65000, 1)).save(file, "PNG")
    write(tmp_path / "image" / "1.jpg", file.getvalue())
    write(tmp_path / "caption" / "1.txt", "…")
    found = evaluate_long_captions(model, read_long_captions("urban1k", tmp_path), "cpu")
    assert all(found["readings"][reading]["i2t"]["r_at_1"] == 100 for reading in ("whole", "sentence_mean"))


def test_the_command_prints_and_writes_the_numbers(tmp_path, capsys):
    urban1k(tmp_path / "urban")
    torch.save({"state_dict": build_model(_small(), 0).clip.state_dict()}, tmp_path / "x.pt")
    words = ["eval", "long-retrieval", str(tmp_path / "x.pt"), "--model", "ViT-S-32-alt", "--set", "urban1k"]
    cli.main([*words, "--root", str(tmp_path / "urban"), "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.pop("evaluation")["command"] == "long-retrieval"
    assert format_long_captions(written) in capsys.readouterr().out


def _small():
    from dreamlip_train.config.schema import ModelConfig

    return ModelConfig(name="ViT-S-32-alt", local_logit_scale=False)
