"""Scenes to train on, and what one process of plain torch does on the tiny model, for one rank and for two."""

from pathlib import Path

import pytest
import torch
from tiny import STEPS, batch, tiny_config
from tiny_scenes import BASE

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train import cli
from dreamlip_train.model.build import build_model
from dreamlip_train.training.engine.optimizer import learning_rate, parameter_groups


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Shards of 64 training and 12 held-out scenes, made by the commands a user types, and base.toml."""
    folder = tmp_path_factory.mktemp("scenes")
    cli.main(["prepare", "scenes", "--output", str(folder), "--num-train", "64", "--num-val", "12"])
    for split in ("train", "val"):
        source = folder / split
        words = [
            "--captions",
            str(source / "captions.csv"),
            "--images",
            str(source / "images"),
            "--masks",
            str(source / "masks"),
        ]
        cli.main(["prepare", "folder", *words, "--output", str(folder / "shards" / split), "--shard-size", "16"])
    (folder / "base.toml").write_text(BASE)
    return folder


@pytest.fixture(scope="module")
def torch_losses():
    """The trajectory of plain torch: AdamW, clipping and the same rates."""
    config = tiny_config()
    model, loss_fn = build_model(config.model, config.train.seed), DreamLIPLoss()
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim), lr=1.0, betas=(0.9, 0.98), eps=1e-8)
    losses = []
    for step in range(STEPS):
        data = batch(step)
        loss = loss_fn(**model(data["images"], data["text"]), text_mask=data["text_mask"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optim)
        optimizer.step()
        losses.append(loss.item())
    return losses
