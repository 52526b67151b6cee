"""Where a run starts: the newest checkpoint that is whole, undamaged and of the same run, and a refusal by name of
anything else.
"""

import json
import shutil

import pytest
from tiny import tiny_config, tiny_engine

from dreamlip_train.checkpoint.files import clean_up, complete_checkpoints, damaged_files
from dreamlip_train.checkpoint.resume import check_fits, starting_point
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState

DATA = "3 shards, 24 samples, 0123456789abcdef"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with the checkpoints of steps 2 and 4."""
    run, config = tmp_path_factory.mktemp("run"), tiny_config()
    engine = tiny_engine(config)
    for step in (2, 4):
        save(engine, run / "checkpoints", config, TrainState(step=step), DATA)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_is_taken_whatever_latest_says(run):
    (run / "checkpoints" / "latest").write_text("step-00000002")
    assert starting_point(run, "auto").name == "step-00000004"
    assert starting_point(run / "elsewhere", "auto") is None


def test_damage_that_keeps_the_size_is_found_and_an_earlier_one_used(run, caplog):
    newest = run / "checkpoints" / "step-00000004"
    flip_a_bit(newest / "mp_rank_00_model_states.pt")
    assert damaged_files(newest) == ["mp_rank_00_model_states.pt"]
    with pytest.raises(
        ValueError, match=r"--resume: .*step-00000004/mp_rank_00_model_states.pt is not what was written"
    ):
        starting_point(run, str(newest))
    assert starting_point(run, "auto").name == "step-00000002"
    assert "CHECKPOINT DAMAGED" in caplog.text and "mp_rank_00_model_states.pt" in caplog.text
    assert (run / "checkpoints" / "step-00000004.damaged").is_dir()


def test_what_a_crash_left_is_cleared_and_a_replaced_checkpoint_comes_back(run):
    folder = run / "checkpoints"
    (folder / "step-00000004").rename(folder / "step-00000004.replaced")  # killed between two renames
    shutil.copytree(folder / "step-00000002", folder / "step-00000006.partial")
    clean_up(folder)
    assert [path.name for path in complete_checkpoints(folder)] == ["step-00000004", "step-00000002"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["step-00000002", "step-00000004"]


def test_never_and_foreign_checkpoints_do_not_mix_with_a_run(run, saved):
    with pytest.raises(ValueError, match="--run-dir: .* already holds a run"):
        starting_point(run, "never")
    with pytest.raises(ValueError, match="--resume: .* has checkpoints of its own"):
        starting_point(run, str(saved))
    assert starting_point(run.parent / "new", str(saved)).parent.parent == saved


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (
            "model",
            "name",
            "other",
            "model.name: .*step-00000004 was written with 'tiny', this run has 'other'; use its value",
        ),
        (
            "model",
            "patch_projection",
            "local",
            "model.patch_projection: .* was written with 'shared', this run has 'local'; use its value",
        ),
        (
            "optim",
            "optimizer",
            "muon",
            "optim.optimizer: .* with 'adamw', this run has 'muon'; use its value, or another",
        ),
        ("deepspeed", "zero_stage", 2, "deepspeed.zero_stage: .* was written with 1, this run has 2"),
        (
            "train",
            "global_batch_size",
            4,
            "train.global_batch_size: .*step-00000004 was written with 8, this run has 4; use its value",
        ),
        (
            "optim",
            "lr",
            0.5,
            "optim.lr: .* was written with 0.0005, this run has 0.5; use its value, another --run-dir, "
            "or --accept-changes",
        ),
        ("data", "num_sub_captions", 2, "data.num_sub_captions: .*--accept-changes"),
        ("loss", "negatives", "all", "loss.negatives: .*--accept-changes"),
    ],
)
def test_another_model_or_recipe_is_refused_by_name(saved, section, field, value, message):
    config = tiny_config()
    setattr(getattr(config, section), field, value)
    with pytest.raises(ValueError, match=message):
        check_fits(saved / "checkpoints" / "step-00000004", config, DATA)
    if "--accept-changes" in message:
        changed = check_fits(saved / "checkpoints" / "step-00000004", config, DATA, accept_changes=True)
        assert list(changed) == [f"{section}.{field}"]


def test_other_data_is_refused_and_other_settings_of_pace_are_not(saved):
    path = saved / "checkpoints" / "step-00000004"
    with pytest.raises(
        ValueError,
        match=r"data.shards: .* was trained on other data \(3 shards, 24 samples, 0123.*\) than these \(4 shards",
    ):
        check_fits(path, tiny_config(), "4 shards, 30 samples, fedcba9876543210")
    config = tiny_config(chunk_size=4)
    config.logging.every_steps, config.checkpoint.every_steps = 7, 9
    assert set(check_fits(path, config, DATA)) == {"train.chunk_size", "logging.every_steps", "checkpoint.every_steps"}


def test_the_manifest_says_what_a_resume_needs(saved):
    manifest = json.loads((saved / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["global_batch_size"], manifest["data"]) == (
        4,
        1,
        8,
        DATA,
    )
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in manifest["files"].values())
