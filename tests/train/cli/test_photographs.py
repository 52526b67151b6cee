"""The whole path on real photographs, through the command line: prepare, train, checkpoint, evaluate."""

import json

from photos import write_photos
from warm import Command

from dreamlip_train import cli

TINY = """
[model]
name = "tiny"
own_value_blocks = 0
context_length = 16

[model.config]
embed_dim = 32
vision_cfg = { image_size = 32, patch_size = 8, width = 32, layers = 1, head_width = 16 }
text_cfg = { width = 32, heads = 2, layers = 1 }

[data]
num_sub_captions = 4
num_workers = 1

[train]
global_batch_size = 4
steps = 12
precision = "fp32"

[logging]
every_steps = 1

[optim]
lr = 3e-3
warmup_steps = 2
"""


def test_photographs_from_files_to_recall(tmp_path, capsys):
    """Training is a process of its own, as a user's; what comes before and after is called."""

    def command(*words):
        cli.main([*map(str, words)])
        return capsys.readouterr().out

    captions, images = write_photos(tmp_path / "photos")
    shards, run = tmp_path / "shards", tmp_path / "run"
    words = ["--captions", captions, "--images", images, "--output", shards, "--shard-size", "4"]
    summary = command("prepare", "folder", *words)
    assert "longSV_captions" in summary and "tokens" in summary
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ["demo", "--run-dir", run, "--config", tmp_path / "tiny.toml"]
    words += ["--data.shards", shards, "--data.val-shards", shards]
    training = Command(["train", *words], tmp_path / "train.txt")
    assert training.wait() == 0 and "R@1" in training.text(), training.text()
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    summary = json.loads((run / "summary.json").read_text())
    assert summary["localization"] is None, "photographs have no masks"
    assert "long caption, text to image" in command("eval", "retrieval", run, "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["retrieval"]["long_caption"]["t2i"] == summary["retrieval"]["long_caption"]["t2i"]
