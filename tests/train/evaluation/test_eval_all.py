"""``eval all``: what is there is scored and kept, the rest is listed with its source, the paper's rows stand beside."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import jpeg
from tiny import tiny_model

from dreamlip_train import cli
from dreamlip_train.cli.evaluation import everything
from dreamlip_train.config.schema import Config
from dreamlip_train.evaluation.comparison import comparisons, format_comparison, read_results
from dreamlip_train.evaluation.paper import Table, paper_table
from dreamlip_train.model.build import build_model

TABLES = Path(__file__).parents[3] / "dreamlip_train" / "evaluation" / "paper_tables"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


@pytest.fixture
def root(tmp_path):
    """Flickr30k, Urban1k and VOC of a few pictures; a DCI without its files; COCO's captions without its images."""
    root = tmp_path / "sets"
    images = []
    for i in range(4):
        write(root / "flickr30k/flickr30k-images" / f"{i}.jpg", jpeg(i))
        write(root / "Urban1k/image" / f"{i}.jpg", jpeg(i))
        write(root / "Urban1k/caption" / f"{i}.txt", f"A red star {i}. A blue moon.")
        images.append({"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": f"a star {i}"}]})
    write(root / "flickr30k/dataset_flickr30k.json", json.dumps({"images": images}))
    voc = root / "VOCdevkit/VOC2012"
    write(voc / "JPEGImages/a.jpg", jpeg(1))
    (voc / "SegmentationClass").mkdir()
    Image.fromarray(np.full((40, 40), 3, np.uint8)).save(voc / "SegmentationClass/a.png")
    write(voc / "ImageSets/Segmentation/val.txt", "a\n")
    (root / "dci").mkdir()
    return root


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A weights file, and the tiny model in the place of the one it would be loaded as; how often it was loaded."""
    (tmp_path / "x.pt").write_bytes(b"weights")
    loads = []

    def load(options):
        loads.append(options.checkpoint)
        return build_model(tiny_model(), 0).eval(), Config(model=tiny_model()), torch.device("cpu")

    monkeypatch.setattr(everything, "load", load)
    return tmp_path / "x.pt", loads


def run(weights, root, *words):
    output = weights.with_name("results")
    cli.main(["eval", "all", str(weights), "--root", str(root), "--output", str(output), *map(str, words)])
    return output


def test_what_is_there_is_scored_once_and_the_rest_is_listed(root, weights, capsys):
    path, loads = weights
    with pytest.raises(SystemExit) as error:
        run(path, root)
    shown = capsys.readouterr()
    assert error.value.code == 2
    assert "1 of 5 benchmarks that are there could not be read:\n  dci: --root: no file" in shown.err
    assert "Table 1: retrieval, ViT-B/32" in shown.out and "YFCC15M, DreamLIP" in shown.out
    assert "docci/: DOCCI is docci_descriptions.jsonlines" in shown.out
    assert "zeroshot/cars/: a folder of images by class, test/CLASS/*.jpg\n" in shown.out
    assert "ram/hico/: datasets/hico of github.com/xinyu1205/recognize-anything" in shown.out
    results = read_results(path.with_name("results").glob("*.json"))
    assert sorted(results) == ["flickr30k", "segment-voc20", "segment-voc21", "urban1k"] and len(loads) == 1
    (root / "dci").rmdir()
    run(path, root)
    again = capsys.readouterr().out
    assert again.count("kept from before") == 4 and len(loads) == 1 and "Table 1" in again
    path.write_bytes(b"other weights")
    run(path, root, "--only", "urban1k", "segment-voc2")
    assert capsys.readouterr().out.count("kept from before") == 0 and len(loads) == 2
    assert results["flickr30k"]["evaluation"]["command"] == "retrieval-set"


def test_a_broken_result_is_made_again(root, weights, capsys):
    path, loads = weights
    output = run(path, root, "--only", "urban1k")
    (output / "urban1k.json").write_text('{"evaluation": {')
    run(path, root, "--only", "urban1k")
    assert len(loads) == 2 and read_results(output.glob("*.json"))["urban1k"]["images"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.pt", "--root", "sets", "--only", "urban2k"], "--only: no benchmark is called 'urban2k'; did you mean urb"),
        (["x.pt", "--root", "sets"], "--output: say which folder the results of a weights file go to"),
        (["x.pt", "--root", "none", "--output", "o"], "--root: no folder 'none'"),
        (["x.pt", "--root", "empty", "--output", "o"], "--root: 'empty' has none of the "),
        (["none", "--root", "sets", "--output", "o"], "no file or folder 'none'"),
        (["x.pt", "--root", "sets", "--output", "x.pt"], "--output: cannot make the folder 'x.pt'"),
    ],
)
def test_wrong_words_are_named(root, weights, capsys, monkeypatch, words, message):
    monkeypatch.chdir(root.parent)
    Path("empty").mkdir()
    with pytest.raises(SystemExit):
        cli.main(["eval", "all", *words])
    assert message in capsys.readouterr().err


def test_every_table_is_shown_whole_with_our_numbers_in_their_columns():
    """Each number once, at its own place: 1 to 12 in Table 1's twelve columns, and so on."""
    recall = {f"r_at_{k}": 10.0 * k for k in (1, 5, 10)}
    results = {
        "flickr30k": {"i2t": recall, "t2i": {key: 1 + value for key, value in recall.items()}},
        "coco-val2017": {way: {key: 2 + value for key, value in recall.items()} for way in ("i2t", "t2i")},
        "segment-voc20": {"miou_labeled": 33.3},
        "multilabel-hico": {"map": 7},
        "iiw": {"readings": {"sentence_mean": {"t2i": {"r_at_1": 61.0}, "i2t": {"r_at_1": 62.0}}}},
    }
    names = (
        "food101",
        "cifar10",
        "cifar100",
        "sun397",
        "cars",
        "fgvc_aircraft",
        "dtd",
        "pets",
        "caltech101",
        "flowers",
    )
    results |= {f"zeroshot-{name}": {name: {"acc1": float(place)}} for place, name in enumerate(names)}
    results["zeroshot-imagenet1k"] = {"imagenet1k": {"acc1": 99.0}}
    found = comparisons(results)
    one, two, three, four, five, *ablations, later, long = found
    assert one.ours[1][1:] == "10.0 50.0 100.0 12.0 52.0 102.0 11.0 51.0 101.0 12.0 52.0 102.0".split()
    assert one.ours[0][4:7] == ["-"] * 3 and one.columns[3] == "i2t_mscoco_r1"
    assert dict(zip(two.columns, two.ours[0][1:], strict=True)) == {
        **dict(zip([name.removeprefix("fgvc_") for name in names], map("{:.1f}".format, range(10)), strict=True)),
        "average": "4.5",
        "imagenet": "99.0",
    }
    assert three.ours[0] == ["this run, training-free", *"----", "33.3", "-"] and five.ours[0][-1] == "7.0"
    assert not four.measured and all(table.ours[0][5] == "99.0" for table in ablations)
    assert later.ours[1][1:] == ["10.0", "12.0", "11.0", "12.0", "99.0"]
    assert dict(zip(long.columns, long.ours[1][1:], strict=True))["t2i_iiw_r1"] == "61.0"
    for table, file in zip(found, sorted(TABLES.glob("table*.tsv")), strict=False):
        with file.open() as lines:
            rows = list(csv.reader(lines, delimiter="\t"))[1:]
        shown = format_comparison(table)
        assert len(table.others) == len(rows)
        for row, other in zip(rows, table.others, strict=True):
            assert other[1:] == row[-len(table.columns) :] and f"  {other[1]}" in shown
    assert ablations[0].others[-1][0] == "long sampled + short + grouping"


def test_tables_of_the_paper_and_their_files_agree():
    assert {file.stem for file in TABLES.glob("*.tsv")} == set(Table.__args__)
    for name in Table.__args__:
        rows = paper_table(name)
        assert rows and all(None not in row and all(value is not None for value in row.values()) for row in rows), name


def test_columns_are_as_narrow_as_their_numbers():
    """Word under word: i2t, flickr30k, r10. In one line their names made Table 1 of 228."""
    for table in comparisons({}):
        lines = format_comparison(table).splitlines()
        assert max(map(len, lines[1:])) <= 140, table.title
    lines = format_comparison(comparisons({})[0]).splitlines()
    assert [line.split()[-1] for line in lines[3:6]] == ["t2i", "mscoco", "r10"]
