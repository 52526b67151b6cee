"""The settings of how a run trains, saves, logs and uses DeepSpeed: the sections optim, train, checkpoint,
logging and deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class OptimConfig:
    """The optimizer, its learning rate over the steps and over the parts of the model."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon": the matrices of the towers' blocks move by orthogonalized updates as large as AdamW's, all else by AdamW.
    The demo's retrieval learns far more by it in few steps. Needs ZeRO 0 and fp32 weights.
    """
    muon_lr_scale: float = 1.0
    """What Muon moves learns at this multiple of lr; it bears a higher rate than AdamW."""
    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW beta1."""
    beta2: float = 0.98
    """AdamW beta2."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.2
    """Decay of matrices; biases, norms and logit scales have none."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After warm-up: "cosine" or "linear" to the end of the run; "constant" with a linear cooldown over the last
    cooldown_steps; "wsd" (warm-up, stable, decay), whose cooldown falls by 1 - sqrt.
    """
    cooldown_steps: int = 0
    """Last steps over which "constant" and "wsd" cool down."""
    final_lr_fraction: float = 0.0
    """The schedule ends at this fraction of lr."""
    vision_lr_scale: float = 1.0
    """The image tower learns at this multiple of lr; 0 freezes it (LiT)."""
    text_lr_scale: float = 1.0
    """The same of the text tower."""
    layer_decay: float = 1.0
    """Each block of a tower learns at this multiple of the block above it; the embeddings lie below the first."""
    fused: bool = True
    """One AdamW kernel that reads and writes each weight once."""
    grad_clip_norm: float = 1.0
    """Global gradient norm bound; 0 turns clipping off."""


@dataclass
class TrainConfig:
    """How long, how large and how precise."""

    global_batch_size: int = 256
    """Images per step of all ranks together, each other's negatives; a rank takes its even share."""
    chunk_size: int = 0
    """Gradient caching: a rank whose share of the global batch is larger sends it through the towers in chunks of at
    most so many images, the loss still on the whole batch. 0 takes the share at once.
    """
    epochs: int = 32
    """Passes over the training shards; `steps` overrides it."""
    steps: int = 0
    """Total steps; 0 means epochs x steps per epoch."""
    precision: Literal["fp32", "amp_bf16", "bf16"] = "amp_bf16"
    """"amp_bf16": fp32 weights, bf16 autocast. "bf16": bf16 weights, fp32 master. The loss is fp32 in every case."""
    grad_checkpointing: bool = False
    """Recompute activations in backward."""
    pack_captions: bool = True
    """Captions go through the text tower one after another in shared rows; False pads all to the longest of the
    step.
    """
    compile: bool = False
    """torch.compile the towers; the first steps take minutes."""
    channels_last: bool = False
    """Images enter the patch embedding with channels last in memory, as they are decoded."""
    prefetch: bool = True
    """Make the next batch ready, and copy it to the device, while the current step computes."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, kept beside them and in checkpoints;
    0 keeps none. Needs ZeRO 0 to 2.
    """
    undropped_steps: int = 0
    """Last steps of the run in which model.patch_dropout drops nothing (FLIP's unmasked finish)."""
    seed: int = 0
    """Seeds weights, shard order, caption draws and crops."""
    qualify: Literal["auto", "always", "never"] = "auto"
    """Test and time the kernels on this machine's GPU before training, a minute or two:
    "auto" where that has not been done yet (docs/backends.md).
    """
    max_nonfinite_steps: int = 10
    """Stop after this many skipped steps in a row whose loss or gradients were not finite."""


@dataclass
class CheckpointConfig:
    """When a run's state is saved, and how many of them stay."""

    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: float = 30.0
    """A checkpoint is also saved when the last one is this old; 0 goes by steps alone."""
    keep_last: int = 3
    """Newest checkpoints kept."""


@dataclass
class LoggingConfig:
    """What a run reports, and where."""

    every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    wandb_project: str = ""
    """Weights & Biases project to log to as well (needs the wandb package); empty logs to files and TensorBoard
    only.
    """


@dataclass
class DeepSpeedConfig:
    """DeepSpeed's own settings."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    config: dict[str, Any] = field(default_factory=dict)
    """Merged last over the DeepSpeed config (set by --deepspeed-config FILE); unknown keys are refused."""
