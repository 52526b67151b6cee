"""A model of 1.7 million parameters, batches that are a function of the step, and a DeepSpeed engine in this process:
what the trainer's tests share.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.config.run_schema import CheckpointConfig, DeepSpeedConfig, OptimConfig, TrainConfig
from dreamlip_train.config.schema import Config, ModelConfig
from dreamlip_train.model.build import build_model
from dreamlip_train.training.distributed import init_distributed
from dreamlip_train.training.engine.engine import build_engine
from dreamlip_train.training.engine.optimizer import learning_rate
from dreamlip_train.training.step import move_batch, train_step

TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}
WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "round",
    "square",
    "star",
    "moon",
    "left",
    "right",
    "above",
    "below",
    "near",
    "a",
    "the",
    "two",
    "three",
]
GLOBAL_BATCH, K, STEPS = 8, 3, 12
RESUMED_STEPS = 7  # where a run stops that goes on after step 3


def tiny_model(**changes) -> ModelConfig:
    return ModelConfig(**({"name": "tiny", "config": TOWERS, "context_length": 16} | changes))


def tiny_config(zero_stage: int = 1, precision: str = "fp32", **train) -> Config:
    return Config(
        model=tiny_model(),
        optim=OptimConfig(lr=5e-4, warmup_steps=2, weight_decay=0.1),
        train=TrainConfig(**({"global_batch_size": GLOBAL_BATCH, "steps": STEPS, "precision": precision} | train)),
        checkpoint=CheckpointConfig(keep_last=2),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage),
    )


def held_out_config(zero_stage: int, folder: Path) -> Config:
    """That of an evaluation of ``folder``/val and of the classes below ``folder``/sets, whose batches do not divide
    evenly over ranks.
    """
    config = tiny_config(zero_stage)
    config.data.val_shards, config.eval.batch_size = str(folder / "val"), 4
    if importlib.util.find_spec("clip_benchmark"):
        config.eval.zero_shot = ("cifar10", "wds/made", "wds/damaged")
        config.eval.zero_shot_root = str(folder / "sets" / "{dataset}")
    return config


def batch(step: int, rank: int = 0, world_size: int = 1) -> dict:
    """This rank's rows of the global batch of ``step``: the same pictures and captions whatever the number of ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    picks = torch.randint(0, len(WORDS), (GLOBAL_BATCH * K, 6), generator=generator).tolist()
    tokens = tiny_tokenize([" ".join(WORDS[i] for i in row[: 2 + row[0] % 5]) for row in picks]).view(
        GLOBAL_BATCH, K, -1
    )
    mask = torch.ones(GLOBAL_BATCH, K, dtype=torch.bool)
    mask[1, 2] = mask[6, 1] = False
    rows = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    keys = [f"{step}-{row}" for row in range(GLOBAL_BATCH)]
    return {"images": images[rows], "text": tokens[rows], "text_mask": mask[rows], "keys": keys[rows]}


def tiny_tokenize(texts: list[str]) -> Tensor:
    import open_clip

    global _TOKENIZER
    _TOKENIZER = _TOKENIZER or open_clip.SimpleTokenizer(context_length=16)
    return _TOKENIZER(texts)


_TOKENIZER = None


def tiny_engine(config: Config):
    device = init_distributed()
    return build_engine(build_model(config.model, config.train.seed), config, device)


def run_steps(engine, config: Config, first: int, last: int, rank: int = 0, world_size: int = 1) -> list[float]:
    """The losses of steps first..last-1, trained on ``batch``."""
    loss_fn = DreamLIPLoss()
    losses = []
    for step in range(first, last):
        moved = move_batch(batch(step, rank, world_size), engine.device)
        result = train_step(engine, loss_fn, moved, learning_rate(step, STEPS, config.optim))
        assert result.applied
        losses.append(float(sum(result.losses.values())))
    return losses


def clean_environment() -> dict[str, str]:
    """For a subprocess: this repository importable, and without the process group that earlier tests formed in this
    process.
    """
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in group}
    support, root = Path(__file__).parents[1], Path(__file__).parents[3]
    rooms = [str(support / room) for room in ("inputs", "models", "processes")]
    paths = [*rooms, str(root), os.environ.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
