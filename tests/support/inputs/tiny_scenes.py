"""The smallest run on the built-in scenes, as commands that a user types."""

from pathlib import Path

BASE = """
[data]
num_sub_captions = 3
num_workers = 1
shuffle_buffer = 16
[model]
name = "tiny"
context_length = 16
[model.config]
embed_dim = 32
vision_cfg = {image_size = 32, patch_size = 8, width = 32, layers = 2, head_width = 16}
text_cfg = {width = 32, heads = 2, layers = 2}
[optim]
optimizer = "adamw"
lr = 3e-3
warmup_steps = 2
[train]
global_batch_size = 8
steps = 6
[logging]
every_steps = 1
[checkpoint]
every_steps = 3
[deepspeed]
zero_stage = 1
"""


def train_words(scenes: Path, run: Path, *extra: str) -> list[str]:
    shards = ["--data.shards", str(scenes / "shards/train"), "--data.val-shards", str(scenes / "shards/val")]
    return ["train", "demo", "--run-dir", str(run), "--config", str(scenes / "base.toml"), *shards, *extra]
