"""The moving average of the weights: its recursion, exact over a resume, evaluated and loaded on request."""

import json

import pytest
import torch
from safetensors.torch import load_file
from shard_files import write_shards
from tiny import tiny_config, tiny_model
from torch import nn

from dreamlip_train.checkpoint.interoperability.export import export_checkpoint
from dreamlip_train.checkpoint.weights import load_for_eval
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.model.weight_average import WeightAverage, read_average
from dreamlip_train.training.run import train

pytestmark = pytest.mark.usefixtures("undrawn")


def test_it_is_the_recursion_and_leaves_the_weights():
    model = nn.Linear(2, 1, bias=False)
    expected = model.weight.detach().double().clone()
    average = WeightAverage(model, 0.5)
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    last = model.weight.detach().clone()
    with average.in_place_of(model):
        torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(model.weight, last)


def run(folder, steps):
    """Trained on a mixture, with flips and dropped patches."""
    config = tiny_config(steps=steps, ema_decay=0.9)
    config.data.num_workers, config.data.num_sub_captions, config.data.flip_prob = 0, 3, 0.5
    config.data.mixture = {name: str(folder.parent / name) for name in ("large", "small")}
    config.data.proportions = {"large": 1.0, "small": 1.0}
    config.model.patch_dropout = 0.25
    config.eval.weights = "ema"
    train(config, folder)
    return read_average(folder / f"checkpoints/step-{steps:08d}")


def test_it_resumes_exactly_and_is_what_evaluation_loads(tmp_path):
    write_shards(tmp_path / "large", [24])
    write_shards(tmp_path / "small", [6])
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4)
    rows = [json.loads((tmp_path / of / "metrics.jsonl").read_text().splitlines()[-1]) for of in ("whole", "parts")]
    assert [row["loss"] for row in rows] == [rows[0]["loss"]] * 2 and rows[0]["step"] == 4
    assert rows[0]["draws"] == {"large": 16, "small": 16} and rows[0]["set_epochs"]["small"] == 16 / 6
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    loaded, config = load_for_eval(tmp_path / "parts")
    assert config.eval.weights == "ema"
    assert all(torch.equal(p, whole[name]) for name, p in loaded.named_parameters())
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["steps"] == 4
    raw, average = (load_for_eval(tmp_path / "parts", weights=one)[0] for one in ("raw", "average"))
    assert all(torch.equal(p, whole[name]) for name, p in average.named_parameters())
    assert not all(torch.equal(p, whole[name]) for name, p in raw.named_parameters())
    for weights, model in (("raw", raw), ("average", average)):
        export_checkpoint(tmp_path / "parts", tmp_path / weights, "open_clip-dir", weights=weights)
        stored = load_file(tmp_path / weights / "open_clip_model.safetensors")
        assert torch.equal(stored["visual.conv1.weight"], model.clip.visual.conv1.weight)


def test_a_checkpoint_without_one_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no average of the weights; its run had train.ema_decay=0"):
        read_average(tmp_path)
    torch.save({}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="--weights: .*x.pt' holds one set of weights"):
        load_for_eval(tmp_path / "x.pt", "ViT-B-32", weights="average")
    average = WeightAverage(build_model(tiny_model(), 0), 0.9)
    assert not average.load(tmp_path)
