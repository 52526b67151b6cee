"""SugarCrepe, Winoground, ARO and MMVP-VLM in their published layouts: scores against the sets' own definitions,
written out here from a table of similarities; a tie is never right; what is wrong with a set is named.
"""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shard_files import jpeg
from tiny import tiny_model
from torch import nn

from dreamlip_train import cli
from dreamlip_train.data.images import decode_image, resize_center_crop
from dreamlip_train.evaluation.compositional.scoring import evaluate_cases, format_cases
from dreamlip_train.evaluation.compositional.sets import KINDS, SETS, Case, Picture, read_cases, symmetric_relations
from dreamlip_train.model.build import build_model

COUNT = 8
WORDS = "red green blue star moon tree car dog cat house left right above below".split()


def text(i):
    return f"a {WORDS[i % 14]} {WORDS[(3 * i + 1) % 14]} {i} near the {WORDS[(5 * i) % 14]}"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def sugarcrepe(root):
    """Seven files; of kind k there are k + 1 cases, on shared pictures."""
    triples = []
    for k, kind in enumerate(KINDS):
        rows = {}
        for i in range(k + 1):
            write(root / "val2017" / f"{i:012d}.jpg", jpeg(i))
            rows[str(i)] = {"filename": f"{i:012d}.jpg", "caption": text(i), "negative_caption": text(10 * k + i + 20)}
            triples.append((kind, jpeg(i), text(i), text(10 * k + i + 20)))
        write(root / "data" / f"{kind}.json", json.dumps(rows))
    return triples


def winoground(root, parquet=False):
    rows, pairs = [], []
    for i in range(COUNT):
        pairs.append((jpeg(2 * i), jpeg(2 * i + 1), text(i), text(i + 30)))
        rows.append({"id": i, "caption_0": text(i), "caption_1": text(i + 30), "collapsed_tag": "Object"})
        for place in (0, 1):
            name = f"ex_{i}_img_{place}"
            if parquet:
                rows[-1][f"image_{place}"] = {"bytes": jpeg(2 * i + place), "path": f"{name}.png"}
            else:
                rows[-1][f"image_{place}"] = name
                write(root / "images" / f"{name}.png", jpeg(2 * i + place))
    if parquet:
        (root / "data").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "data" / "test-00000-of-00001.parquet")
    else:
        write(root / "examples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return pairs


def mmvp(root):
    pairs, lines = [], ["Question ID,Type,Statement"]
    for i in range(COUNT):
        pattern = "Orientation" if i < 5 else "Camera_Perspective"
        pairs.append((jpeg(2 * i), jpeg(2 * i + 1), f"a photo of {text(i)}", f"a photo of {text(i + 30)}"))
        for place, said in enumerate((text(i), text(i + 30))):
            write(root / "MLLM_VLM Images" / pattern / f"{2 * i + place + 1}.jpg", jpeg(2 * i + place))
            lines.append(f'{2 * i + place + 1},{pattern},"{said}"')
    write(root / "Questions.csv", "\n".join(lines) + "\n")
    return pairs


def aro(root):
    """30 cases of one pair of attributes and 5 of another; relations of three kinds, one of them symmetric."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    write(root / "images" / "1.jpg", file.getvalue())
    relations, attributes, cases = [], [], []
    for i in range(35):
        box = {"bbox_x": i, "bbox_y": 2 * i % 40, "bbox_w": 30 + i, "bbox_h": 40}
        said = {"image_path": "1.jpg", "true_caption": text(i), "false_caption": text(i + 50)} | box
        relation = ("on", "riding", "next to")[i % 3]
        relations.append(said | {"relation_name": relation})
        pair = ["white", "open"] if i < 30 else ["red", "wet"]
        attributes.append(said | {"attributes": pair})
        crop = torch.from_numpy(pixels).permute(2, 0, 1)[:, 2 * i % 40 : 2 * i % 40 + 40, i : i + 30 + i]
        cases.append((relation, "_".join(pair), crop, text(i), text(i + 50)))
    write(root / "visual_genome_relation.json", json.dumps(relations))
    write(root / "visual_genome_attribution.json", json.dumps(attributes))
    return cases


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_model(), seed=3).eval()


def cosines(model, pictures, texts):
    pictures = [decode_image(one) if isinstance(one, bytes) else one for one in pictures]
    with torch.no_grad():
        images = torch.cat([model.encode_images(resize_center_crop(one, 32)[None])[0] for one in pictures])
        return (images @ torch.cat([model.encode_texts(model.tokenize([one])) for one in texts]).T).tolist()


def test_sugarcrepe_is_the_mean_of_its_seven_kinds(tmp_path, model):
    triples = sugarcrepe(tmp_path)
    found = evaluate_cases(model, "sugarcrepe", read_cases("sugarcrepe", tmp_path), "cpu", batch_size=5)
    right = {kind: [] for kind in KINDS}
    for kind, data, good, bad in triples:
        ((a, b),) = cosines(model, [data], [good, bad])
        right[kind].append(a > b)
    for kind, own in right.items():
        assert found["kinds"][kind] == {"accuracy": pytest.approx(100 * np.mean(own)), "cases": len(own)}
    assert found["accuracy"] == pytest.approx(100 * np.mean([np.mean(own) for own in right.values()]))
    assert found["accuracy_of_all"] == pytest.approx(100 * np.mean([one for own in right.values() for one in own]))
    assert "28 cases" in format_cases(found) and "chance 50.0" in format_cases(found)


@pytest.mark.parametrize("layout", ["winoground", "winoground in parquet", "mmvp"])
def test_pairs_have_text_image_and_group_scores(tmp_path, model, layout):
    pairs = mmvp(tmp_path) if layout == "mmvp" else winoground(tmp_path, parquet="parquet" in layout)
    name = layout.split()[0]
    found = evaluate_cases(model, name, read_cases(name, tmp_path), "cpu", batch_size=3)
    scores = {"text": [], "image": [], "group": []}
    for *pictures, c0, c1 in pairs:
        (c0_i0, c1_i0), (c0_i1, c1_i1) = cosines(model, pictures, [c0, c1])
        scores["text"].append(c0_i0 > c1_i0 and c1_i1 > c0_i1)
        scores["image"].append(c0_i0 > c0_i1 and c1_i1 > c1_i0)
        scores["group"].append(scores["text"][-1] and scores["image"][-1])
    assert {score: found[score] for score in scores} == {
        score: pytest.approx(100 * np.mean(own)) for score, own in scores.items()
    }
    assert found["cases"] == COUNT
    if layout == "mmvp":
        assert found["kinds"]["Orientation"]["cases"] == 5
        assert found["kinds"]["Orientation"]["image"] == pytest.approx(100 * np.mean(scores["image"][:5]))


def test_aro_looks_at_the_box_and_leaves_symmetric_relations_and_rare_attributes_out(tmp_path, model):
    cases = aro(tmp_path)
    right = []
    for *_, crop, good, bad in cases:
        ((a, b),) = cosines(model, [crop], [good, bad])
        right.append(a > b)
    relation = evaluate_cases(model, "aro-relation", read_cases("aro-relation", tmp_path), "cpu")
    attribute = evaluate_cases(model, "aro-attribution", read_cases("aro-attribution", tmp_path), "cpu")
    by = {
        name: 100 * np.mean([r for r, case in zip(right, cases, strict=True) if case[0] == name])
        for name in ("on", "riding")
    }
    assert relation["accuracy"] == pytest.approx(np.mean(list(by.values()))) and relation["kinds"]["next to"]["cases"]
    assert attribute["accuracy"] == pytest.approx(100 * np.mean(right[:30]))
    assert relation["accuracy_of_all"] == attribute["accuracy_of_all"] == pytest.approx(100 * np.mean(right))
    assert (
        len(symmetric_relations()) == 157 and "next to" in symmetric_relations() and "on" not in symmetric_relations()
    )


class OnePoint(nn.Module):
    """Maps everything to one point: nothing is told apart."""

    image_size = 32

    def encode_images(self, images):
        return torch.ones(len(images), 4) / 2, None

    def tokenize(self, texts):
        return torch.zeros(len(texts), 3)

    def encode_texts(self, tokens):
        return torch.ones(len(tokens), 4) / 2


def test_a_tie_is_never_right(tmp_path):
    for name, make in (("sugarcrepe", sugarcrepe), ("winoground", winoground), ("mmvp", mmvp)):
        make(tmp_path / name)
        found = evaluate_cases(OnePoint(), name, read_cases(name, tmp_path / name), "cpu")
        assert all(found[score] == 0 for score in found["chance"])


def test_what_is_wrong_is_named(tmp_path, capsys):
    def refused(name, message):
        with pytest.raises(ValueError, match=message):
            read_cases(name, tmp_path)

    refused("sugarcrepe", r"--root: no file .*add_obj.json or .*\. SugarCrepe is data/\*.json of github.com/RAIVNLab")
    refused("winoground", "no file .*examples.jsonl")
    sugarcrepe(tmp_path)
    (tmp_path / "val2017" / f"{0:012d}.jpg").unlink()
    refused("sugarcrepe", "--root: 1 of sugarcrepe's 7 images are not there, such as .*000000000000.jpg")
    write(tmp_path / "data" / "swap_att.json", '{"0": {"filename": "a.jpg", "caption": "b"}}')
    refused("sugarcrepe", 'swap_att.json has another layout: expected "negative_caption", a text, in record 1')
    write(tmp_path / "Questions.csv", "Question ID,Type,Statement\n1,a,b\n")
    refused("mmvp", "Questions.csv has another layout: expected pairs of rows")
    write(tmp_path / "Questions.csv", "Question ID,Type,Statement\n")
    refused("mmvp", "has no case of mmvp")
    write(tmp_path / "visual_genome_relation.json", '[{"image_path": "a", "true_caption": "b", "false_caption": "c"}]')
    refused("aro-relation", "expected a box and a kind in record 1 .KeyError")
    write(tmp_path / "data" / "a.parquet", b"PAR1")
    refused("winoground", "a.parquet has another layout: expected parquet with image_0")
    outside = Case("", (Picture(jpeg(0), "one", (500, 0, 10, 10)),), ("a", "b"))
    with pytest.raises(ValueError, match="the box .500, 0, 10, 10. is outside"):
        evaluate_cases(OnePoint(), "aro-relation", [outside], "cpu")
    with pytest.raises(ValueError, match="--root: ex_1: .*; fetch it again"):
        evaluate_cases(OnePoint(), "winoground", [Case("", (Picture(b"cut", "ex_1"),), ("a", "b"))], "cpu")
    with pytest.raises(SystemExit):
        cli.main(["eval", "compositional", "x.pt", "--set", "mmvp", "--root", str(tmp_path / "none")])
    assert "--root: no folder" in capsys.readouterr().err
    assert all(known.source for known in SETS.values())
