"""Whole runs on the built-in scenes: from the command line to the report, interrupted and resumed,
launched on two ranks, and failing."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import browser
import pytest
from tiny import clean_environment
from tiny_scenes import train_words

from dreamlip_train import cli


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    cli.main(train_words(scenes, folder, "--eval.every-steps", "4"))
    return folder


def rows(run: Path) -> dict[int, dict]:
    """The training rows of metrics.jsonl by step, the last of each."""
    return {
        row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    }


def test_a_run_leaves_what_the_documentation_lists(run):
    for name in (
        "config.toml",
        "log.txt",
        "curves.png",
        "grouping.png",
        "summary.json",
        "checkpoints/step-00000003",
        "checkpoints/step-00000006",
    ):
        assert (run / name).exists(), name
    logged = rows(run)
    assert sorted(logged) == [1, 2, 3, 4, 5, 6]
    fields = {
        "loss",
        "contrastive_loss",
        "grouping_loss",
        "logit_scale",
        "logit_scale_local",
        "lr",
        "grad_norm",
        "images_per_s",
        "tokens_per_s",
        "tflops",
        "data_wait",
        "memory",
        "epoch",
    }
    assert fields <= logged[6].keys()
    assert logged[6]["loss"] == pytest.approx(logged[6]["contrastive_loss"] + logged[6]["grouping_loss"])
    assert 0 <= logged[6]["data_wait"] <= 1
    first_line = (run / "log.txt").read_text().splitlines()[0]
    for part in (
        "1 x CPU",
        "ZeRO-1",
        "bidirectional_logsumexp=torch (auto, the first in order)",
        "8 images per step (8 per rank), learning rate 0.003",
        "3 sub-captions each",
        "up to 384 tokens",
        "6 steps of 8 per epoch (4 shards, 64 samples",
        "checkpoints in",
    ):
        assert part in first_line, first_line
    evaluated = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "retrieval" in row]
    assert [row["step"] for row in evaluated] == [4, 6]


def test_the_summary_has_every_number(run):
    summary = json.loads((run / "summary.json").read_text())
    for kind in ("long_caption", "sentence"):
        for way in ("t2i", "i2t"):
            assert {"r_at_1", "r_at_5", "r_at_10"} <= summary["retrieval"][kind][way].keys()
    assert summary["localization"]["pointing"].keys() == {"value", "chance"}
    assert (summary["steps"], summary["samples"], summary["ranks"], summary["device"]) == (6, 12, 1, "cpu")
    assert summary["backends"] == {"bidirectional_logsumexp": "torch", "group_patches": "torch"}
    manifest = json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["backends"] == summary["backends"]
    assert {"python", "torch", "deepspeed", "open_clip_torch"} <= summary["versions"].keys() and summary["seconds"] > 0


def test_a_resumed_run_repeats_the_losses_to_the_bit(scenes, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    lines = (again / "metrics.jsonl").read_text()
    (again / "metrics.jsonl").write_text(
        lines[: len(lines) // 2].rsplit("\n", 1)[0] + '\n{"step": 4, "lo'
    )  # a crash cut this line off
    cli.main(train_words(scenes, again, "--eval.every-steps", "4"))
    assert "resumed from" in (again / "log.txt").read_text()
    for step in (4, 5, 6):
        for name in ("loss", "contrastive_loss", "grouping_loss", "lr", "grad_norm"):
            assert rows_after_cut(again)[step][name] == rows(run)[step][name], (step, name)
    assert (
        json.loads((again / "summary.json").read_text())["retrieval"]
        == json.loads((run / "summary.json").read_text())["retrieval"]
    )


def rows_after_cut(run: Path) -> dict[int, dict]:
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in row:
            found[row["step"]] = row
    return found


def test_a_finished_run_is_evaluated_again_and_nothing_else(scenes, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    (again / "summary.json").unlink()
    cli.main(train_words(scenes, again))
    assert json.loads((again / "summary.json").read_text())["steps"] == 6
    assert sorted(rows(again)) == [1, 2, 3, 4, 5, 6]


def test_never_does_not_overwrite(scenes, run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(train_words(scenes, run, "--resume", "never"))
    assert "already holds a run; give another folder, go on with --resume auto, or delete it" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_model_in_the_same_folder_is_refused(scenes, run, capsys):
    with pytest.raises(SystemExit):
        cli.main(train_words(scenes, run, "--model.patch-projection", "local"))
    assert "model.patch_projection: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["retrieval", "localize"])
def test_eval_reads_the_run_folder(run, command, capsys, tmp_path):
    cli.main(["eval", command, str(run), "--output", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert ("long caption, text to image" in printed) and (
        ("top patch inside the region" in printed) == (command == "localize")
    )
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads((tmp_path / "out.json").read_text())["retrieval"] == summary["retrieval"]


SECTIONS = [
    *("Training", "Retrieval", "Beside the paper and later work", "Patch localization", "Where sub-captions look"),
    *("Retrieval, right and wrong", "Data", "Settings and versions"),
]


def test_the_report_is_one_whole_page(run, tmp_path, capsys):
    cli.main(["report", str(run), "--output", str(tmp_path / "page.html"), "--examples", "2"])
    assert "wrote" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    recall = json.loads((run / "summary.json").read_text())["retrieval"]["sentence"]["t2i"]["r_at_5"]
    assert [part.split("</h2>")[0] for part in text.split("<h2>")[1:]] == SECTIONS and "Not shown" not in text
    assert (
        f"{recall:.1f}" in text
        and "84.9" in text
        and "longIB_captions" in text
        and "longIB" in text.split("Data</h2>")[1]
    )
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)  # where any four letters can stand
    assert "http" not in words.replace("http-equiv", "") and "://" not in text, "nothing is fetched from elsewhere"
    if not browser.available():
        pytest.skip("no chromium and chromedriver here to show the page; its text was checked")
    with browser.page(tmp_path / "page.html") as script:
        assert script("return [...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
        assert script("return document.images.length") > 5
        assert script("return [...document.querySelectorAll('h2')].map(h => h.textContent)") == SECTIONS
        assert script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth"), (
            "nothing sticks out sideways"
        )
        assert script("return [...document.querySelectorAll('figure.own, figure.truth')].length") >= 2
        assert (
            script("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
            == 0
        )


def test_a_report_says_what_it_has_no_data_for(scenes, run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace(str(scenes / "shards"), str(tmp_path / "gone")))
    cli.main(["report", str(copy)])
    text = (copy / "report.html").read_text()
    assert text.count("Not shown") == 3 and "data.val_shards" in text and "R@1, text to image" in text
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert "RUN: no file" in capsys.readouterr().err


def launched(words: list[str], *arguments: str) -> None:
    done = subprocess.run([*arguments, *words], env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_deepspeed_launcher_goes_on_with_two_ranks(scenes, run, tmp_path):
    """The same words, the same global batch, on two ranks from the checkpoint of one."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    words = train_words(scenes, again, "--data.num-workers", "2")
    launched(words, launcher, "--num_accelerators", "2", "--module", "dreamlip_train")
    summary = json.loads((again / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"], summary["samples"]) == (2, 6, 12)
    assert sorted(rows(again)) == [1, 2, 3, 4, 5, 6]
    assert rows(again)[4]["loss"] == pytest.approx(rows(run)[4]["loss"], abs=1.0)
    said = (again / "log.txt").read_text()
    assert (
        "at step 3, which 1 ranks wrote (now 2; random states start anew); epoch 0 goes on with its 5 x 8 samples "
        "that nobody has read" in said
    )
    other = (again / "logs" / "rank-0001.txt").read_text()
    assert "2 x CPU" in other and "step 6/6" in other


@pytest.mark.slow
def test_two_nodes_of_a_hostfile(scenes, tmp_path):
    """Two nodes with a rank each, started as on two machines, here both on this one."""
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(tmp_path / "hostfile"), "--no_ssh"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port), "--num_gpus", "1", "--module"]
    words = train_words(scenes, tmp_path / "run", "--deepspeed.zero-stage", "2", "--train.steps", "3")
    nodes = [
        subprocess.Popen(
            [*launcher[:-1], "--node_rank", str(node), "--module", "dreamlip_train", *words],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
