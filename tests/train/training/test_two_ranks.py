"""Two ranks against one process: every ZeRO stage, values that are not finite on one rank, a full disk on one rank,
and resuming on another number of ranks.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from class_sets import write_class_folders, write_class_shard
from forked import python_module
from shard_files import write_shards
from tiny import RESUMED_STEPS, held_out_config, run_steps, tiny_config
from warm import two_ranks

from dreamlip_train.checkpoint import loading
from dreamlip_train.checkpoint.loading import load
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.model.build import build_model
from dreamlip_train.training.distributed import init_distributed
from dreamlip_train.training.engine.engine import build_engine
from dreamlip_train.training.evaluation import evaluate_run

RESIZED = ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "amp_bf16"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints after 3 steps of one process, and its losses from there on."""
    folder, losses = tmp_path_factory.mktemp("ranks"), {}
    for stage, precision in RESIZED:
        config = tiny_config(stage, precision)
        engine = build_engine(build_model(config.model, 0), config, init_distributed())
        run_steps(engine, config, 0, 3)
        save(engine, folder / f"one-{stage}-{precision}", config, TrainState(step=3))
        losses[f"{stage} {precision}"] = run_steps(engine, config, 3, RESUMED_STEPS)
    write_shards(folder / "val", [9, 8, 6])
    write_class_folders(folder / "sets" / "cifar10", ["airplane", "cat", "dog"], 9)
    write_class_shard(folder / "sets" / "made", ["red star", "blue moon", "dog"], 9)
    write_class_shard(folder / "sets" / "damaged", ["red star", "blue moon", "dog"], 9, label=lambda i: i // 8 * 5)
    return folder, losses


@pytest.fixture(scope="module")
def facts(one_process) -> dict:
    folder, _ = one_process
    script = str(Path(__file__).parents[2] / "support/processes/two_ranks.py")
    ranks = two_ranks([script, folder], folder)
    assert [rank.wait(280) for rank in ranks] == [0, 0], [rank.text()[-3000:] for rank in ranks]
    return json.loads((folder / "facts.json").read_text())


def test_two_ranks_evaluate_as_one_process(one_process, facts):
    """Rank 0 once computed while the others waited; an error or a signal of one rank is that of both."""
    config = held_out_config(1, one_process[0])
    expected = evaluate_run(build_model(config.model, 0), config, torch.device("cpu"), lambda: False)
    assert expected["samples"] == 23 and set(expected["held_out_loss"]) == {"contrastive_loss", "grouping_loss", "loss"}
    if "zero_shot" in expected:  # clip_benchmark is installed
        scores = expected["zero_shot"]
        assert (scores["cifar10"]["images"], scores["wds/made"]["images"]) == (9, 9)
        assert "label 5 but 3 classes" in scores["wds/damaged"]["error"]  # in a batch of one rank alone
    of_two = facts["held_out"]
    assert of_two["1"] == of_two["3"] == json.loads(json.dumps(expected))
    assert of_two["error"] == "UserError batch 0 is bad" and of_two["stop"].startswith("StoppedError")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_process(facts, torch_losses, stage):
    assert facts["losses"][str(stage)] == pytest.approx(torch_losses, rel=1e-6, abs=0)


@pytest.mark.parametrize("run", ["1 2", "2 1"])
def test_two_ranks_with_gradient_caching_train_as_one_process_at_once(facts, torch_losses, run):
    assert facts["chunks"][run] == pytest.approx(torch_losses[:10], rel=1e-6, abs=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_one_rank_cannot_use_moves_no_weight_of_any(facts, stage):
    assert facts["moved"][str(stage)] == [False, False, True]


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_nothing_else(facts):
    assert (
        "step-00000009 could not be written: rank 1: " in facts["full"] and "step-00000003 is complete" in facts["full"]
    )
    assert facts["kept"] == ["step-00000003"]


@pytest.mark.parametrize(("stage", "precision"), RESIZED)
def test_two_ranks_go_on_from_one(facts, one_process, stage, precision):
    _, losses = one_process
    near = {"rel": 1e-6, "abs": 0} if precision == "fp32" else {"abs": 0.02}
    assert facts["resumed"][f"{stage} {precision}"] == pytest.approx(losses[f"{stage} {precision}"], **near)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_goes_on_from_two_ranks(facts, one_process, stage, monkeypatch):
    """With DeepSpeed's two errors of ZeRO-3 repaired: one Adam step counter for all parameters, one weight decay for
    all groups.
    """
    if stage != 3:  # where the conversion is a new process, as a user's
        monkeypatch.setattr(loading, "subprocess", SimpleNamespace(run=python_module))
    folder, _ = one_process
    config = tiny_config(stage)
    engine = build_engine(build_model(config.model, 7), config, init_distributed(), resized=True)
    progress = load(engine, folder / f"two-{stage}" / "step-00000003")
    assert run_steps(engine, config, progress.step, RESUMED_STEPS) == pytest.approx(
        facts["losses"][str(stage)][3:RESUMED_STEPS], rel=1e-6, abs=0
    )
    assert not list((folder / f"two-{stage}").glob("*universal*"))
