"""Every setting of a training run, once: dataclasses from which tyro makes the command line and a TOML file can set the
base.

validation.py names the field of every impossible combination before anything is built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dreamlip_train.config.run_schema import (
    CheckpointConfig,
    DeepSpeedConfig,
    LoggingConfig,
    OptimConfig,
    TrainConfig,
)

Normalization = Literal["minmax", "softmax", "none"]


@dataclass
class DataConfig:
    """Where the samples come from and how sub-captions are drawn from them."""

    shards: str = ""
    """Training shards: a glob ("data/*.tar"), a brace pattern ("cc3m-{0000..0575}.tar"), a folder with a manifest.json,
    or several joined with "::".
    """
    mixture: dict[str, str] = field(default_factory=dict)
    """Several training sets instead of `shards`: a name and the shards of each, cc3m=shards/cc3m cc12m=shards/cc12m."""
    proportions: dict[str, float] = field(default_factory=dict)
    """Weight of each set of the mixture in every step; empty draws each in proportion to its size, once an epoch."""
    val_shards: str = ""
    """Held-out shards, same forms; empty means no evaluation during or after training."""
    num_sub_captions: int = 8
    """K: sub-captions drawn for each image and step. An image with fewer has masked slots, never repeats."""
    sampling: Literal["uniform", "raw_first"] = "uniform"
    """"uniform": K draws without replacement from [raw, shorts, sentences] (paper eq. 4). "raw_first":
    the raw caption and K-1 draws from the rest (the release).
    """
    caption_sources: tuple[str, ...] = ()
    """Columns to draw from, such as ("raw_caption", "shortSV_captions", "longSV_captions");
    empty means every caption column a sample has.
    """
    source_weights: dict[str, float] = field(default_factory=dict)
    """Relative weight of each column's sub-captions in the draw; a column not named weighs 1."""
    splitter: Literal["sentence", "official", "whole"] = "sentence"
    """"sentence" keeps abbreviations and decimals whole; "official" is DreamLIP's re.split on newline,
    </s> and every full stop; "whole" takes a long caption as one text, cut at the context's end (the paper's "long,
    direct").
    """
    merged_num: int = 1
    """Up to this many consecutive sentences are merged into one sub-caption (1 = single sentences)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area range of the random resized crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of its width over its height."""
    flip_prob: float = 0.0
    """Probability of mirroring a picture. Captions that say left and right become wrong with it."""
    color_jitter_prob: float = 0.0
    """Probability of changing a picture's colors by color_jitter (open_clip's color_jitter_prob)."""
    color_jitter: tuple[float, float, float, float] = (0.32, 0.32, 0.32, 0.08)
    """Strengths of changes in brightness, contrast, saturation and hue."""
    gray_scale_prob: float = 0.0
    """Probability of taking a picture's colors away (open_clip's gray_scale_prob)."""
    erase_prob: float = 0.0
    """Probability of filling a rectangle of a picture with noise (open_clip's re_prob)."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    pin_memory: bool = True
    """Keep loaded batches in page-locked memory, from which a GPU copies by itself; without a GPU it has no effect."""
    shuffle_buffer: int = 1000
    """Samples held per worker for shuffling within its shards."""
    allow_pipe: bool = False
    """Permit "pipe:" shard URLs, which run shell commands."""
    max_bad_fraction: float = 0.05
    """Training stops when more than this fraction of the samples seen could not be read."""
    max_member_mb: int = 256
    """A file in a shard that claims more megabytes is not read; its sample is left out and counted."""
    stall_seconds: int = 900
    """Training stops, naming the shard, when loader workers give no batch for so long; 0 waits forever."""
    eval_source: str = "longSV_captions"
    """Column whose sentences are the queries of evaluation; the first long column a sample has where it is missing."""

    @property
    def pattern(self) -> str:
        """The training shards of all sets as one pattern."""
        return self.shards or "::".join(self.mixture.values())


@dataclass
class ModelConfig:
    """The two towers."""

    name: str = "ViT-B-16"
    """An open_clip model name, or a label for the model that `config` describes."""
    config: dict[str, Any] = field(default_factory=dict)
    """An open_clip model config ({"embed_dim", "vision_cfg", "text_cfg"}) used instead of the named one;
    set in recipes or a TOML file.
    """
    pretrained: str = ""
    """Weights to start from: an open_clip file or folder, an open_clip tag of this model such as "openai", which is
    downloaded, a transformers CLIP folder, or a run of this trainer. Positions are fitted to context_length.
    """
    context_length: int = 77
    """Tokens per caption; longer ones are truncated and keep their end token."""
    patch_projection: Literal["shared", "local"] = "shared"
    """"shared": patch tokens pass ln_post and visual.proj like the class token. "local":
    a train-only projection of their own.
    """
    own_value_blocks: int = 0
    """Last blocks of the image tower in which a patch takes its own value instead of attending to the others, as
    MaskCLIP's, so that it tells of its own place. Needs a class token. That attends to patches that go on attending:
    the image's embedding is as without.
    """
    patch_dropout: float = 0.0
    """Part of the patches that a training step leaves out of the image tower, another one for each image (FLIP)."""
    local_logit_scale: bool = True
    """Give the grouping loss its own learned temperature."""
    init_temperature: float = 0.07
    """Starting temperature of both logit scales."""
    init_logit_bias: float | None = None
    """Start of the learned bias that loss.pairs="sigmoid" adds to its logits; None has no bias. Train-only."""


@dataclass
class LossConfig:
    """The objective, docs/math.md eq. 18."""

    preset: Literal["ours", "paper", "release"] = "ours"
    """"paper" is DreamLIP's eq. 5 to 9 to the letter, "release" what its public code means (docs/math.md, section 6):
    normalization, normalize_patches, threshold, contrast, direction and model.local_logit_scale are set so. "ours" sets
    nothing.
    """
    mpcl_weight: float = 1.0
    """lambda_mpcl: weight of the multi-positive contrastive loss."""
    grouping_weight: float = 1.0
    """lambda_sub: weight of the sub-caption grouping loss; 0 skips the patch features."""
    pairs: Literal["softmax", "sigmoid"] = "softmax"
    """"softmax": each image among captions, each caption among images. "sigmoid": every image-caption pair by itself
    (SigLIP with K positives).
    """
    negatives: Literal["slot", "all"] = "slot"
    """"slot": K CLIP losses averaged. "all": one softmax over all N*K captions."""
    positives: Literal["mean", "logsum"] = "mean"
    """"logsum" sums the positives inside the log; it needs negatives="all"."""
    label_smoothing: float = 0.0
    """Share of each softmax's target that is spread over all its candidates; with pairs="sigmoid" labels are smoothed
    towards 1/2.
    """
    threshold: float | None = None
    """sigma of the patch pooling; None means 1/P."""
    normalization: Normalization = "minmax"
    """How similarities become patch weights."""
    normalize_patches: bool = True
    """Pool patches of unit length; False pools them as they are, in torch code."""
    contrast: Literal["image", "batch", "conditioned"] = "image"
    """What a pooled group is contrasted with: the captions of its own image, or of the whole batch; "conditioned":
    what the same caption pools in other images (docs/math.md eq. 20).
    """
    candidates: int = 4
    """Images among which a sub-caption picks its own with contrast="conditioned": consecutive ones of a rank's
    share, or of its chunk.
    """
    direction: Literal["both", "t2v"] = "both"
    """Both directions of the grouping contrast, or the paper's single one."""
    backend: str = "auto"
    """Kernel backend of every op that has one of this name: "auto", or one that `dreamlip-train doctor` lists."""
    contrastive_backend: str | None = None
    """Kernel backend of the contrast; None takes `backend`."""
    grouping_backend: str | None = None
    """Kernel backend of the pooling of patches; None takes `backend`."""


@dataclass
class EvalConfig:
    """Evaluation on data.val_shards, and zero-shot."""

    every_steps: int = 0
    """Steps between evaluations during training; 0 evaluates once at the end."""
    batch_size: int = 64
    """Images per forward pass."""
    weights: Literal["last", "ema"] = "last"
    """"ema" evaluates and exports the moving average of the weights (train.ema_decay)."""
    max_samples: int = 0
    """Evaluate on the first so many held-out samples; 0 means all."""
    zero_shot: tuple[str, ...] = ()
    """Data sets that are classified as well, by clip_benchmark's names, such as ("imagenet1k", "cifar10")."""
    zero_shot_root: str = ""
    """Where they lie: a folder, with "{dataset}" in it for a data set's name."""
    threshold: float | None = None
    """Threshold of the patch selection that localization and grouping.png show; None takes loss.threshold (1/P there
    keeps nearly every patch).
    """


@dataclass
class Config:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def selection(self) -> dict[str, Any]:
        """How localization and pictures select patches: {"threshold", "normalization"}."""
        threshold = self.loss.threshold if self.eval.threshold is None else self.eval.threshold
        return {"threshold": threshold, "normalization": self.loss.normalization}

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested plain dicts."""
        return dataclasses.asdict(self)
