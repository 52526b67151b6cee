"""Runs that stop themselves: losses that stay NaN, and data that is not there."""

import json

import pytest
from tiny_scenes import train_words

from dreamlip_train import cli


def test_a_diverging_run_stops_and_names_its_samples(scenes, tmp_path, capsys):
    words = train_words(
        scenes,
        tmp_path / "run",
        "--optim.lr",
        "1e30",
        "--train.max-nonfinite-steps",
        "2",
        "--train.steps",
        "9",
        "--checkpoint.every-steps",
        "1",
    )
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "train.max_nonfinite_steps: 2 steps in a row were not finite" in capsys.readouterr().err
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 2 and len(skipped[0]["samples"]) == 8 and skipped[0]["samples"][0]["shard"].endswith(".tar")
    assert (tmp_path / "run/checkpoints/step-00000001/manifest.json").is_file()


def test_unknown_shards_are_named_before_anything_is_written(scenes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(train_words(scenes, tmp_path / "run", "--data.shards", str(tmp_path / "none*.tar")))
    assert "data.shards: " in capsys.readouterr().err


@pytest.mark.parametrize("held_out, error", [("none*.tar", "matches no shard"), ("base.toml", "no sample of")])
def test_held_out_shards_are_tried_before_a_run_and_not_at_its_end(scenes, tmp_path, capsys, held_out, error):
    with pytest.raises(SystemExit):
        cli.main(train_words(scenes, tmp_path / "run", "--data.val-shards", str(scenes / held_out)))
    message = capsys.readouterr().err
    assert "data.val_shards: " in message and error in message
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()
