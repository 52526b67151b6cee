"""Zero-shot classification through clip_benchmark on a webdataset folder made here: its own program gives the same
accuracy for the exported file.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from class_sets import write_class_folders, write_class_shard
from shard_files import jpeg

from dreamlip_train import cli
from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.config.schema import ModelConfig
from dreamlip_train.evaluation.classification import zero_shot
from dreamlip_train.evaluation.classification.class_folders import class_folder
from dreamlip_train.evaluation.classification.zero_shot import DATASETS, evaluate_zero_shot, format_zero_shot
from dreamlip_train.evaluation.paper import paper_table, zero_shot_rows
from dreamlip_train.model.build import build_model

pytest.importorskip("clip_benchmark", reason="the benchmark extra is not installed")
CLASSES, COUNT = ["red star", "blue moon", "dog", "house", "sea", "tree"], 36


def make_set(folder, **changes):
    return write_class_shard(folder, CLASSES, COUNT, **changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "x.pt"
    model = build_model(ModelConfig(name="ViT-S-32-alt", local_logit_scale=False), 0)
    torch.save(
        {
            "state_dict": {
                name: value.reshape(()) if name == "logit_scale" else value
                for name, value in model.clip.state_dict().items()
            }
        },
        path,
    )
    return path


def test_the_numbers_are_those_of_clip_benchmarks_own_program(weights, tmp_path, capsys, monkeypatch):
    folder = make_set(tmp_path / "sets" / "made")
    root = str(tmp_path / "sets" / "{dataset}")
    words = ["--root", root, "--datasets", "wds/made", "--workers", "0", "--output", str(tmp_path / "ours.json")]
    cli.main(["eval", "zeroshot", str(weights), "--model", "ViT-S-32-alt", *words])
    ours = json.loads((tmp_path / "ours.json").read_text())["wds/made"]
    printed = capsys.readouterr().out
    assert ours["images"] == COUNT and ours["classes"] == 6 and f"{ours['acc1']:.1f}" in printed and "16.7" in printed
    theirs = tmp_path / "theirs.json"
    words = ["eval", "--dataset", "wds/made", "--dataset_root", str(folder), "--model", "ViT-S-32-alt"]
    words += ["--pretrained", str(weights), "--output", str(theirs), "--no_amp", "--num_workers", "0"]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words])
    from clip_benchmark.cli import main

    main()
    expected = json.loads(theirs.read_text())["metrics"]
    for name in ("acc1", "acc5", "mean_per_class_recall"):
        assert ours[name] == pytest.approx(100 * expected[name], abs=1e-6), name


def test_a_set_that_cannot_be_read_is_named_and_the_others_are_kept(weights, tmp_path, capsys):
    make_set(tmp_path / "good")
    make_set(tmp_path / "other", label=lambda i: i % 7)
    (make_set(tmp_path / "nameless") / "classnames.txt").unlink()
    words = ["--root", str(tmp_path / "{dataset}"), "--workers", "0", "--output", str(tmp_path / "out.json")]
    words += ["--datasets", "wds/missing", "wds/other", "wds/good", "wds/nameless"]
    with pytest.raises(SystemExit):
        cli.main(["eval", "zeroshot", str(weights), "--model", "ViT-S-32-alt", *words])
    captured = capsys.readouterr()
    assert "3 of 4 could not be evaluated: wds/missing, wds/other, wds/nameless" in captured.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert "nshards.txt" in found["wds/missing"]["error"] and "label 6 but 6 classes" in found["wds/other"]["error"]
    assert "classnames.txt" in found["wds/nameless"]["error"] and found["wds/good"]["images"] == COUNT
    assert "wds/missing" in captured.out and "not evaluated" in captured.out


def test_a_download_that_fails_leaves_no_folder_that_the_next_look_takes_for_the_set(weights, tmp_path, monkeypatch):
    """`eval all` then counted it as there, and failed."""

    def download(name, folder, *_):
        (Path(folder) / "inside").mkdir(parents=True)
        (Path(folder) / "archive.tar").touch()
        raise OSError("no network")

    monkeypatch.setattr(zero_shot, "_open_images", download)
    (tmp_path / "dtd").mkdir()  # the user's own stays
    model, *_ = load_for_eval(str(weights), "ViT-S-32-alt")
    scores = evaluate_zero_shot(model, ["pets", "dtd"], str(tmp_path / "{dataset}"), "cpu")
    assert scores["pets"] == {"error": "OSError: no network"} == scores["dtd"]
    assert [path.name for path in tmp_path.iterdir()] == ["dtd"]


def test_an_output_in_no_folder_is_refused_before_anything_runs(weights, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(
            ["eval", "zeroshot", str(weights), "--root", str(tmp_path), "--output", str(tmp_path / "no" / "x.json")]
        )
    assert "--output: no folder" in capsys.readouterr().err


def test_the_papers_numbers_stand_beside_ours():
    table = format_zero_shot(
        {"imagenet1k": {"acc1": 30.0, "acc5": 55.0, "mean_per_class_recall": 30.0, "images": 50000, "classes": 1000}}
    )
    assert "DreamLIP, ViT-B/16" in table and "CC3M 31.1" in table and "30.0" in table


def test_without_clip_benchmark_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dreamlip\[benchmark\]'"):
        evaluate_zero_shot(None, ["cars"], "", "cpu")


@pytest.mark.parametrize("names", [CLASSES, [f"n0{i}" for i in range(6)]])
def test_a_folder_of_images_by_class_works_for_every_set(weights, tmp_path, monkeypatch, names):
    """By the classes' names in any order, or by folders that sort as the list does."""
    monkeypatch.setattr(
        "dreamlip_train.evaluation.classification.class_folders._of_benchmark",
        lambda kind, _: CLASSES if "names" in kind else [],
    )
    write_class_folders(tmp_path / "sets" / "made", names, COUNT)
    model = load_for_eval(weights, "ViT-S-32-alt")[0]
    found = evaluate_zero_shot(model, ["made"], str(tmp_path / "sets" / "{dataset}"), "cpu", workers=0)["made"]
    make_set(tmp_path / "wds" / "made", templates=["a photo of a {c}."])
    same = evaluate_zero_shot(model, ["wds/made"], str(tmp_path / "wds" / "{dataset}"), "cpu", workers=0)["wds/made"]
    assert found["images"] == COUNT and found == pytest.approx(same)


def test_the_papers_tables_are_shipped():
    assert paper_table("table3_san_segmentation_vitb32")[1]["voc20"] == "76.5"
    assert zero_shot_rows("imagenet1k")["CC3M, DreamLIP, ViT-B/16"] == 31.1 and not zero_shot_rows("mnist")
    assert all(len(zero_shot_rows(name)) > 10 for name in DATASETS)
    assert zero_shot_rows("fgvc_aircraft")["CC3M, CLIP, ViT-B/32"] == 1.0


def test_other_folders_of_images_are_not_taken_for_classes(tmp_path, monkeypatch):
    """Several sets may lie under one root; one folder that is no class among those that are is an error."""
    monkeypatch.setattr("dreamlip_train.evaluation.classification.class_folders._of_benchmark", lambda *_: CLASSES)
    for name in ("screenshots", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(1))
    assert class_folder(str(tmp_path), "made", "test", lambda picture: picture) is None
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="3 class folders, made has 6 classes, and 'notes' is none of their names"):
        class_folder(str(tmp_path), "made", "test", lambda picture: picture)
