"""The command line as users type it: help, closest names, precedence of recipe, file and flags, launchers' extra
words.
"""

import subprocess
import sys
import time

import pytest
from tiny import clean_environment

from dreamlip_train import cli
from dreamlip_train.cli.main import COMMANDS
from dreamlip_train.config.schema import Config
from dreamlip_train.config.toml import format_config


def fails(capsys, *words: str) -> str:
    """What the command prints before it ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.fixture
def trained(monkeypatch):
    """The (config, run_dir, resume) that a train command hands over, without training."""
    calls = []
    import dreamlip_train.training.run

    monkeypatch.setattr(dreamlip_train.training.run, "train", lambda *arguments: calls.append(arguments))
    return calls


def test_help_is_quick_and_lists_every_command():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dreamlip_train", "--help"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and time.monotonic() - began < 3, done.stderr
    for command in (
        "prepare scenes",
        "prepare folder",
        "prepare validate",
        "train",
        "eval retrieval",
        "eval localize",
        "doctor",
    ):
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "scenes"],
        ["prepare", "folder"],
        ["prepare", "validate"],
        ["train", "demo"],
        ["eval", "localize"],
        ["doctor"],
    ],
)
def test_each_command_has_help(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    assert "usage: dreamlip-train " + " ".join(words) in capsys.readouterr().out


def test_unknown_words_get_the_closest(capsys):
    assert "trian: no such command; did you mean train?" in fails(capsys, "trian")
    assert "eval localise: no such command; did you mean localize?" in fails(capsys, "eval", "localise")
    assert "cc3m_vitb_16: no such recipe; did you mean cc3m_vitb16" in fails(capsys, "train", "cc3m_vitb_16")
    assert "--data.num-sub-captions" in fails(capsys, "train", "demo", "--run-dir", "x", "--data.num-subcaptions", "4")
    assert "Expected one of ('0', '1', '2', '3')" in fails(
        capsys, "train", "demo", "--run-dir", "x", "--deepspeed.zero-stage", "7"
    )
    assert "--run-dir" in fails(capsys, "train", "demo")
    assert "usage: dreamlip-train train RECIPE" in fails(capsys, "train")


def test_unknown_keys_in_files_get_the_closest(capsys, tmp_path):
    (tmp_path / "base.toml").write_text("[optim]\nwarm_up_steps = 5\n")
    assert "optim.warm_up_steps: no such setting; did you mean optim.warmup_steps" in fails(
        capsys, "train", "demo", "--run-dir", str(tmp_path), "--config", str(tmp_path / "base.toml")
    )
    (tmp_path / "ds.json").write_text('{"zero_optimisation": {}}')
    assert "deepspeed.config: unknown key 'zero_optimisation'; did you mean zero_optimization" in fails(
        capsys, "train", "demo", "--run-dir", str(tmp_path / "run"), "--deepspeed-config", str(tmp_path / "ds.json")
    )
    assert not (tmp_path / "run").exists()
    assert "'nothing.json': No such file" in fails(
        capsys, "train", "demo", "--run-dir", "x", "--deepspeed-config", "nothing.json"
    )


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path, trained):
    base = tmp_path / "base.toml"
    base.write_text("[optim]\nlr = 0.25\nwarmup_steps = 7\n[data]\nshards = 'a.tar'\n")
    (tmp_path / "ds.json").write_text('{"wall_clock_breakdown": true}')
    words = f"train demo --run-dir r --resume never --config {base} --optim.lr 0.5"
    words += f" --data.num_sub_captions=3 --deepspeed-config {tmp_path / 'ds.json'}"
    cli.main(words.split())
    [(config, run_dir, resume, accept_changes)] = trained
    assert (config.optim.lr, config.optim.warmup_steps, config.data.shards, config.data.num_sub_captions) == (
        0.5,
        7,
        "a.tar",
        3,
    )
    assert (config.train.global_batch_size, run_dir, resume) == (64, "r", "never")
    assert accept_changes is False
    assert config.deepspeed.config == {"wall_clock_breakdown": True}


def test_flags_replace_a_recipes_table_whole(trained, capsys):
    """The demo's weights could only be given for the columns that the recipe names."""
    words = "train demo --run-dir r --data.caption-sources raw_caption longLLA_captions --data.source-weights"
    cli.main([*words.split(), "longLLA_captions=2", "raw_caption=0.5"])
    cli.main(words.split())
    assert [run[0].data.source_weights for run in trained] == [{"longLLA_captions": 2.0, "raw_caption": 0.5}, {}]
    assert "raw_caption" in fails(capsys, *words.split()[:-1]) and len(trained) == 2
    for wrong, said in (("raw_caption", "NAME=VALUE"), ("a=1 a=2", "twice"), ("a=much", "much"), ("=1", "NAME=VALUE")):
        assert said in fails(capsys, *words.split(), *wrong.split())


def test_a_preset_on_the_command_line_comes_before_other_flags(trained, capsys):
    cli.main("train demo --run-dir r --loss.preset release --loss.grouping-weight 1".split())
    loss = trained[0][0].loss
    assert (loss.preset, loss.threshold, loss.contrast, loss.grouping_weight) == ("release", 0.0, "batch", 1.0)
    words = "train demo --run-dir r --loss.preset=paper --loss.direction both"
    assert "loss.direction: got 'both'" in fails(capsys, *words.split())
    assert "invalid choice" in fails(capsys, *"train demo --run-dir r --loss.preset papers".split()).lower()


def test_a_runs_own_config_reproduces_it(tmp_path, trained):
    config = Config()
    config.data.caption_sources, config.data.source_weights = ("raw_caption", "longSV_captions"), {"raw_caption": 0.5}
    config.model.config = {"embed_dim": 8, "vision_cfg": {"layers": 2}, "text_cfg": {}}
    config.loss.threshold = 0.25
    (tmp_path / "config.toml").write_text(format_config(config))
    cli.main(["train", "cc3m-vitb32", "--run-dir", "r", f"--config={tmp_path / 'config.toml'}"])
    assert trained[0][0].to_dict() == config.to_dict()


@pytest.mark.parametrize("extra", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=0"]])
def test_launchers_words_are_dropped(extra, trained):
    cli.main([*extra, "train", "demo", "--run-dir", "r"])
    assert trained[0][1] == "r"


def test_impossible_settings_name_the_field(capsys):
    assert "dreamlip-train: optim.lr: got -1.0; give a rate > 0" in fails(
        capsys, "train", "demo", "--run-dir", "x", "--optim.lr", "-1"
    )
    assert "loss.positives" in fails(capsys, "train", "demo", "--run-dir", "x", "--loss.positives", "logsum")
    assert "data.shards: is empty" in fails(capsys, "train", "cc3m_vitb16", "--run-dir", "x")


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    def broken(arguments, program):
        raise ValueError("raised inside a library")

    monkeypatch.setitem(COMMANDS, "doctor", broken)
    with pytest.raises(ValueError, match="inside a library"):
        cli.main(["doctor"])


def test_doctor_prints_versions_devices_and_backends(capsys):
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    for part in ("deepspeed", "cores for this process", "bidirectional_logsumexp", "group_patches"):
        assert part in printed


def test_errors_of_our_own_keep_their_traceback(monkeypatch):
    """int("12a") inside of the command line was once printed as if the user had mistyped something."""
    monkeypatch.setitem(COMMANDS, "doctor", lambda arguments, program: int("12a"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["doctor"])
