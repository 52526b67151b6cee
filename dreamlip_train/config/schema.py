"""Every setting of a training run, once: dataclasses from which tyro makes the command line and a TOML file can set the base.

``Config.validate()`` names the field of every impossible combination before anything is built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Normalization = Literal["minmax", "softmax", "none"]


@dataclass
class DataConfig:
    """Where the samples come from and how sub-captions are drawn from them."""

    shards: str = ""
    """Training shards: a glob ("data/*.tar"), a brace pattern ("cc3m-{0000..0575}.tar"), a folder with a manifest.json, or several joined with "::"."""
    val_shards: str = ""
    """Held-out shards, same forms; empty means no evaluation during or after training."""
    num_sub_captions: int = 8
    """K: sub-captions drawn for each image and step. An image with fewer has masked slots, never repeats."""
    sampling: Literal["uniform", "raw_first"] = "uniform"
    """"uniform": K draws without replacement from [raw, shorts, sentences] (paper eq. 4). "raw_first": the raw caption and K-1 draws from the rest (the
    release)."""
    caption_sources: tuple[str, ...] = ()
    """Columns to draw from, such as ("raw_caption", "shortSV_captions", "longSV_captions"); empty means every caption column a sample has."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """Relative weight of each column's sub-captions in the draw; a column not named weighs 1."""
    splitter: Literal["sentence", "official", "whole"] = "sentence"
    """"sentence" keeps abbreviations and decimals whole; "official" is DreamLIP's re.split on newline, </s> and every full stop; "whole" takes a long caption
    as one text, cut at the context's end (the paper's "long, direct")."""
    merged_num: int = 1
    """Up to this many consecutive sentences are merged into one sub-caption (1 = single sentences)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area range of the random resized crop."""
    workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""
    pin_memory: bool = True
    """Keep loaded batches in page-locked memory, from which a GPU copies by itself; without a GPU it has no effect."""
    shuffle_buffer: int = 1000
    """Samples held a worker for shuffling within its shards."""
    allow_pipe: bool = False
    """Permit "pipe:" shard URLs, which run shell commands."""
    max_bad_fraction: float = 0.05
    """Training stops when more than this fraction of the samples seen could not be read."""
    stall_seconds: int = 900
    """Training stops, naming the shard, when loader workers give no batch for so long; 0 waits for ever."""
    eval_source: str = "longSV_captions"
    """Column whose sentences are the queries of evaluation; the first long column a sample has where it is missing."""


@dataclass
class ModelConfig:
    """The two towers."""

    name: str = "ViT-B-16"
    """An open_clip model name, or a label for the model that `config` describes."""
    config: dict[str, Any] = field(default_factory=dict)
    """An open_clip model config ({"embed_dim", "vision_cfg", "text_cfg"}) used instead of the named one; set in recipes or a TOML file."""
    pretrained: str = ""
    """An open_clip weights file to start from."""
    context_length: int = 77
    """Tokens a caption; longer ones are truncated and keep their end token."""
    patch_projection: Literal["shared", "local"] = "shared"
    """"shared": patch tokens pass ln_post and visual.proj like the class token. "local": a train-only projection of their own."""
    local_logit_scale: bool = True
    """Give the grouping loss its own learned temperature."""
    init_temperature: float = 0.07
    """Starting temperature of both logit scales."""
    init_logit_bias: float | None = None
    """Start of the learned bias that loss.pairs="sigmoid" adds to its logits; None has no bias. Train-only."""


@dataclass
class LossConfig:
    """The objective, docs/math.md eq. 9."""

    mpcl_weight: float = 1.0
    """lambda_mpcl: weight of the multi-positive contrastive loss."""
    grouping_weight: float = 1.0
    """lambda_sub: weight of the sub-caption grouping loss; 0 skips the patch features."""
    pairs: Literal["softmax", "sigmoid"] = "softmax"
    """"softmax": each image among captions, each caption among images. "sigmoid": every image-caption pair by itself (SigLIP with K positives)."""
    negatives: Literal["slot", "all"] = "slot"
    """"slot": K CLIP losses averaged. "all": one softmax over all N*K captions."""
    positives: Literal["mean", "logsum"] = "mean"
    """"logsum" sums the positives inside the log; it needs negatives="all"."""
    threshold: float | None = None
    """sigma of the patch pooling; None means 1/P."""
    normalization: Normalization = "minmax"
    """How similarities become patch weights."""
    contrast: Literal["image", "batch"] = "image"
    """Whose captions a pooled group is contrasted with: its own image's, or the whole batch's."""
    direction: Literal["both", "t2v"] = "both"
    """Both directions of the grouping contrast, or the paper's single one."""
    backend: str = "auto"
    """Kernel backend: "auto", or one that `dreamlip-train doctor` lists."""


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

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
    final_lr_fraction: float = 0.0
    """The cosine ends at this fraction of lr."""
    fused: bool = True
    """One AdamW kernel that reads and writes each weight once."""
    grad_clip_norm: float = 1.0
    """Global gradient norm bound; 0 turns clipping off."""


@dataclass
class EngineConfig:
    """How long, how large, how precise, and on what."""

    batch_size: int = 256
    """Images a rank and step. The loss sees batch_size x ranks images."""
    chunk_size: int = 0
    """Gradient caching: images of a rank that go through the towers at a time, the loss still on all of batch_size. 0 takes them at once."""
    epochs: int = 32
    """Passes over the training shards; `steps` overrides it."""
    steps: int = 0
    """Total steps; 0 means epochs x steps an epoch."""
    precision: Literal["fp32", "amp_bf16", "bf16"] = "amp_bf16"
    """"amp_bf16": fp32 weights, bf16 autocast. "bf16": bf16 weights, fp32 master. The loss is fp32 in every case."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    grad_checkpointing: bool = False
    """Recompute activations in backward."""
    pack_captions: bool = True
    """Captions go through the text tower one after another in shared rows; False pads all to the longest of the step."""
    compile: bool = False
    """torch.compile the towers; the first steps take minutes."""
    channels_last: bool = False
    """Images enter the patch embedding with channels last in memory, as they are decoded."""
    prefetch: bool = True
    """Make the next batch ready, and copy it to the device, while the current step computes."""
    seed: int = 0
    """Seeds weights, shard order, caption draws and crops."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    save_every_minutes: float = 30.0
    """A checkpoint is also saved when the last one is this old; 0 goes by steps alone."""
    keep_last: int = 3
    """Newest checkpoints kept."""
    max_nonfinite_steps: int = 10
    """Stop after this many skipped steps in a row whose loss or gradients were not finite."""
    wandb_project: str = ""
    """Weights & Biases project to log to as well (needs the wandb package); empty logs to files and TensorBoard only."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Merged last over the DeepSpeed config (set by --deepspeed-config FILE); unknown keys are refused."""


@dataclass
class EvalConfig:
    """Evaluation on data.val_shards."""

    every_steps: int = 0
    """Steps between evaluations during training; 0 evaluates once at the end."""
    batch_size: int = 64
    """Images a forward pass."""
    max_samples: int = 0
    """Evaluate on the first so many held-out samples; 0 means all."""
    threshold: float | None = None
    """Threshold of the patch selection that localisation and grouping.png show; None takes loss.threshold (1/P there keeps nearly every patch)."""


@dataclass
class Config:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> None:
        """Raise ValueError naming the first field (section.field) whose value can't work."""
        _require(
            self.data.num_sub_captions >= 1, "data.num_sub_captions", self.data.num_sub_captions, "give at least 1"
        )
        _require(self.data.merged_num >= 1, "data.merged_num", self.data.merged_num, "1 means single sentences")
        _require(self.data.workers >= 0, "data.workers", self.data.workers, "0 loads in the training process")
        _require(
            self.data.shuffle_buffer >= 1, "data.shuffle_buffer", self.data.shuffle_buffer, "1 turns shuffling off"
        )
        _require(self.data.stall_seconds >= 0, "data.stall_seconds", self.data.stall_seconds, "0 waits for ever")
        low, high = self.data.crop_scale
        _require(0 < low <= high <= 1, "data.crop_scale", self.data.crop_scale, "give 0 < low <= high <= 1")
        _require(
            0 <= self.data.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            self.data.max_bad_fraction,
            "give a fraction in [0, 1]",
        )
        negative = {name: w for name, w in self.data.source_weights.items() if w < 0}
        _require(not negative, "data.source_weights", negative, "weights are >= 0")
        sources, weighted = self.data.caption_sources, self.data.source_weights
        unused = [name for name in weighted if sources and name not in sources]
        _require(not unused, "data.source_weights", unused, f"these columns are not in data.caption_sources {sources}")
        _require(
            self.model.context_length >= 4, "model.context_length", self.model.context_length, "give at least 4 tokens"
        )
        _require(
            self.model.init_temperature >= 0.01,
            "model.init_temperature",
            self.model.init_temperature,
            "logit scales stop at 100: give 0.01 or more",
        )
        _require(self.loss.mpcl_weight >= 0, "loss.mpcl_weight", self.loss.mpcl_weight, "give a weight >= 0")
        _require(
            self.loss.grouping_weight >= 0, "loss.grouping_weight", self.loss.grouping_weight, "give a weight >= 0"
        )
        _require(
            self.loss.mpcl_weight + self.loss.grouping_weight > 0,
            "loss.mpcl_weight",
            0,
            "both loss weights are 0: nothing would be trained",
        )
        _require(
            self.loss.positives == "mean" or self.loss.negatives == "all",
            "loss.positives",
            self.loss.positives,
            'the sum inside the log needs loss.negatives="all"',
        )
        sigmoid = self.loss.pairs == "sigmoid"
        _require(
            not sigmoid or (self.loss.negatives, self.loss.positives) == ("slot", "mean"),
            "loss.pairs",
            "sigmoid",
            "loss.negatives and loss.positives belong to the softmax; leave them at their defaults",
        )
        _require(
            sigmoid == (self.model.init_logit_bias is not None),
            "model.init_logit_bias",
            self.model.init_logit_bias,
            "the sigmoid loss starts at a bias that makes most pairs negatives; give -10"
            if sigmoid
            else 'only loss.pairs="sigmoid" has a bias',
        )
        grouping_only = self.loss.grouping_weight > 0 and self.loss.contrast == "image"
        _require(
            not (grouping_only and self.data.num_sub_captions == 1),
            "loss.grouping_weight",
            self.loss.grouping_weight,
            'with data.num_sub_captions=1 the within-image contrast has no negatives; give more sub-captions, loss.contrast="batch", or weight 0',
        )
        unused = self.loss.grouping_weight == 0
        why = "only the grouping loss uses it, and loss.grouping_weight is 0"
        _require(
            not (unused and self.model.local_logit_scale), "model.local_logit_scale", True, f"{why}; set it to False"
        )
        _require(
            not (unused and self.model.patch_projection == "local"),
            "model.patch_projection",
            "local",
            f'{why}; use "shared"',
        )
        _require(self.optim.lr > 0, "optim.lr", self.optim.lr, "give a rate > 0")
        _require(self.optim.warmup_steps >= 0, "optim.warmup_steps", self.optim.warmup_steps, "0 means no warm-up")
        _require(
            self.optim.grad_clip_norm >= 0, "optim.grad_clip_norm", self.optim.grad_clip_norm, "0 turns clipping off"
        )
        _require(self.engine.batch_size >= 1, "engine.batch_size", self.engine.batch_size, "give at least 1")
        chunk, batch = self.engine.chunk_size, self.engine.batch_size
        _require(
            chunk == 0 or (0 < chunk < batch and batch % chunk == 0),
            "engine.chunk_size",
            chunk,
            f"give a number that divides engine.batch_size={batch} and is smaller, or 0 for no gradient caching",
        )
        _require(
            chunk == 0 or self.engine.zero_stage in (1, 2),
            "engine.chunk_size",
            chunk,
            f"gradient caching runs with engine.zero_stage 1 or 2, not {self.engine.zero_stage}",
        )
        _require(
            chunk == 0 or self.loss.grouping_weight == 0 or self.loss.contrast == "image",
            "engine.chunk_size",
            chunk,
            'loss.contrast="batch" needs the patches of the whole batch at once; use loss.contrast="image", or no gradient caching',
        )
        _require(
            self.engine.steps > 0 or self.engine.epochs > 0,
            "engine.epochs",
            self.engine.epochs,
            "give engine.epochs or engine.steps",
        )
        for name in ("log_every", "save_every_steps", "keep_last", "max_nonfinite_steps"):
            _require(getattr(self.engine, name) >= 1, f"engine.{name}", getattr(self.engine, name), "give at least 1")
        _require(
            self.engine.save_every_minutes >= 0,
            "engine.save_every_minutes",
            self.engine.save_every_minutes,
            "0 goes by steps alone",
        )
        _require(
            not (self.engine.compile and self.engine.zero_stage == 3),
            "engine.compile",
            True,
            "does not run with engine.zero_stage=3; use stage 0, 1 or 2",
        )
        _require(
            self.engine.pack_captions or not self.engine.compile,
            "engine.pack_captions",
            False,
            "engine.compile compiles the text tower for packed captions; leave them packed, or do not compile",
        )
        _require(
            0 <= self.optim.final_lr_fraction <= 1,
            "optim.final_lr_fraction",
            self.optim.final_lr_fraction,
            "give a fraction in [0, 1]",
        )
        needs_shards = self.eval.every_steps == 0 or bool(self.data.val_shards)
        _require(
            needs_shards, "eval.every_steps", self.eval.every_steps, "it evaluates on data.val_shards, which is empty"
        )
        _require(self.eval.batch_size >= 1, "eval.batch_size", self.eval.batch_size, "give at least 1")

    def selection(self) -> dict[str, Any]:
        """How localisation and pictures select patches: {"threshold", "normalization"}."""
        threshold = self.loss.threshold if self.eval.threshold is None else self.eval.threshold
        return {"threshold": threshold, "normalization": self.loss.normalization}

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain dicts."""
        return dataclasses.asdict(self)


def _require(ok: bool, name: str, value: Any, what_to_do: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {value!r}; {what_to_do}")
