"""Checkpoints: exact resume, survival of crashes and full disks, and refusal of what does not fit."""

import hashlib
import json
import os
import resource
import signal

import pytest
import torch
from tiny import STEPS, TOWERS, run_steps, tiny_config, tiny_engine
from warm import Command

from dreamlip_train.checkpoint.files import complete_checkpoints, describe, find_checkpoint, newest
from dreamlip_train.checkpoint.loading import load
from dreamlip_train.checkpoint.ranks import SaveError
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.data.epoch_plan import ReaderLayout
from dreamlip_train.model.open_clip_weights import open_clip_state_dict
from dreamlip_train.training.engine.engine import evaluation_model


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        *((0, "fp32", "adamw"), (1, "fp32", "adamw"), (3, "fp32", "adamw"), (1, "amp_bf16", "adamw")),
        *((0, "bf16", "adamw"), (0, "fp32", "muon")),
    ],
)
def test_resumed_losses_are_bitwise_the_uninterrupted_ones(tmp_path, stage, precision, optimizer):
    config = tiny_config(stage, precision)
    config.optim.optimizer = optimizer
    engine = tiny_engine(config)
    run_steps(engine, config, 0, 4)
    save(
        engine,
        tmp_path,
        config,
        TrainState(step=4, epoch=1, position=1, layouts=[ReaderLayout(1, 2, 8, 1)], skipped_steps=2),
    )
    torch_next = torch.rand(3)
    uninterrupted = run_steps(engine, config, 4, STEPS)

    config.train.seed = 5  # other initial weights: everything must come from the checkpoint
    fresh = tiny_engine(config)
    torch.manual_seed(99)
    progress = load(fresh, newest(tmp_path))
    assert progress == TrainState(step=4, epoch=1, position=1, layouts=[ReaderLayout(1, 2, 8, 1)], skipped_steps=2)
    assert torch.equal(torch.rand(3), torch_next)
    assert run_steps(fresh, config, 4, STEPS) == uninterrupted


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
@pytest.mark.parametrize("positions", ["learnable", "sin_cos_2d"])
def test_evaluation_loads_the_weights_of_every_stage(tmp_path, stage, precision, positions):
    """sin_cos_2d, which the demo uses, is a parameter that is not trained: DeepSpeed keeps those apart."""
    config = tiny_config(stage, precision)
    config.model.config = {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "pos_embed_type": positions}}
    engine = tiny_engine(config)
    run_steps(engine, config, 0, 2)
    path = save(engine, tmp_path / "checkpoints", config, TrainState(step=2))
    for given in (tmp_path, path):
        loaded, loaded_config = load_for_eval(given)
        assert loaded_config.to_dict() == config.to_dict() and not loaded.training
        with evaluation_model(engine, config.model) as model:
            for (name, got), (_, trained) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
                # the checkpoint has the fp32 master weights, a bf16 engine only their rounding
                torch.testing.assert_close(
                    got, trained.float(), atol=0, rtol=0 if precision == "fp32" else 2**-8, msg=name
                )


def test_only_the_newest_are_kept(tmp_path):
    config = tiny_config()
    engine = tiny_engine(config)
    for step in (2, 4, 6, 4):
        save(engine, tmp_path, config, TrainState(step=step))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000006", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step-00000004", "step-00000006"]
    assert (tmp_path / "latest").read_text() == "step-00000004"


CRASH = """
import os, signal, sys
from pathlib import Path
from tiny import run_steps, tiny_config, tiny_engine
from dreamlip_train.checkpoint import saving
from dreamlip_train.checkpoint.state import TrainState
config = tiny_config()
engine = tiny_engine(config)
run_steps(engine, config, 0, 2)
saving.save(engine, Path(sys.argv[1]), config, TrainState(step=2))
run_steps(engine, config, 2, 4)
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os if sys.argv[2] == "rename" else saving, sys.argv[2], die)
saving.save(engine, Path(sys.argv[1]), config, TrainState(step=4))
"""


@pytest.mark.parametrize(
    "moment", ["rename", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("_phase_two", "commit"))]
)
def test_killed_while_saving_the_previous_checkpoint_is_used(tmp_path, moment):
    """From DeepSpeed's files to the final name, the manifest in between."""
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    process = Command([script, tmp_path, moment], tmp_path / "printed")
    assert process.wait() == -signal.SIGKILL, process.text()[-2000:]
    assert (tmp_path / "step-00000004.partial").is_dir()
    assert newest(tmp_path).name == "step-00000002"
    config = tiny_config()
    engine = tiny_engine(config)
    progress = load(engine, newest(tmp_path))
    run_steps(engine, config, progress.step, 4)
    save(engine, tmp_path, config, TrainState(step=4))
    assert newest(tmp_path).name == "step-00000004" and not list(tmp_path.glob("*.partial"))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    config = tiny_config()
    engine = tiny_engine(config)
    save(engine, tmp_path, config, TrainState(step=2))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))  # writing more fails, as on a full disk
    try:
        with pytest.raises(
            SaveError, match=r"step-00000004 could not be written: rank 0: .*GB free\). .*step-00000002 is complete"
        ):
            save(engine, tmp_path, config, TrainState(step=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert newest(tmp_path).name == "step-00000002" and not list(tmp_path.glob("*.partial"))
    assert save(engine, tmp_path, config, TrainState(step=6)).name == "step-00000006"  # there is room again


def test_a_file_cut_short_makes_a_checkpoint_incomplete(tmp_path):
    config = tiny_config()
    engine = tiny_engine(config)
    for step in (2, 4):
        save(engine, tmp_path / "checkpoints", config, TrainState(step=step))
    broken = tmp_path / "checkpoints" / "step-00000004"
    with (broken / "zero_pp_rank_0_mp_rank_00_optim_states.pt").open("r+b") as file:
        file.truncate(1000)
    assert find_checkpoint(tmp_path).name == "step-00000002"
    with pytest.raises(ValueError, match="step-00000004 is not a complete checkpoint"):
        find_checkpoint(broken)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_file_that_would_run_code_is_not_loaded(tmp_path, name, monkeypatch):
    """DeepSpeed loads its files as full pickles."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    engine = tiny_engine(config)
    path = save(engine, tmp_path / "checkpoints", config, TrainState(step=2))
    content = torch.load(path / name, weights_only=False)
    torch.save({**content, "extra": Evil()}, path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] |= describe(path, [name])  # whoever can write the file can write its hash
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "manifest.sha256").write_text(hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest())
    for use in (lambda: load(engine, path), lambda: load_for_eval(path)):
        with pytest.raises(ValueError, match=rf"{name} would call (posix|nt).system when loaded"):
            use()
    assert not (tmp_path / "executed").exists()


def test_changed_optimizer_settings_win_over_the_checkpoints(tmp_path):
    config = tiny_config()
    engine = tiny_engine(config)
    run_steps(engine, config, 0, 1)
    path = save(engine, tmp_path, config, TrainState(step=1))
    config.optim.weight_decay = 0.5
    fresh = tiny_engine(config)
    load(fresh, path)
    assert [group["weight_decay"] for group in fresh.optimizer.param_groups] == [0.5, 0.0]


def test_open_clip_file_needs_its_model_name(tmp_path):
    config = tiny_config()
    engine = tiny_engine(config)
    torch.save({"state_dict": open_clip_state_dict(engine.module)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="--model: say which open_clip model"):
        load_for_eval(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="comes from another model"):
        load_for_eval(tmp_path / "x.pt", "ViT-B-32")
    run = save(engine, tmp_path / "checkpoints", config, TrainState(step=2))
    with pytest.raises(ValueError, match="leave --model out"):
        load_for_eval(run, "ViT-B-32")
    with pytest.raises(ValueError, match="no file or folder"):
        load_for_eval(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        load_for_eval(tmp_path / "checkpoints")
