"""What settings can't work, each refused by its name (section.field) with its value and what to do,
before anything is built.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from dreamlip_train.config.presets import settings_of
from dreamlip_train.config.run_schema import OptimConfig
from dreamlip_train.config.schema import Config, DataConfig, LossConfig
from dreamlip_train.jobs.user_error import UserError

_AT_LEAST = {
    "data.num_sub_captions": (1, "give at least 1"),
    "data.merged_num": (1, "1 means single sentences"),
    "data.num_workers": (0, "0 loads in the training process"),
    "data.shuffle_buffer": (1, "1 turns shuffling off"),
    "data.max_member_mb": (1, "give at least 1"),
    "data.stall_seconds": (0, "0 waits forever"),
    "model.context_length": (4, "give at least 4 tokens"),
    "model.own_value_blocks": (0, "0 leaves patches as the image tower gives them"),
    "model.init_temperature": (0.01, "logit scales stop at 100: give 0.01 or more"),
    "loss.mpcl_weight": (0, "give a weight >= 0"),
    "loss.grouping_weight": (0, "give a weight >= 0"),
    "loss.label_smoothing": (0, "0 smooths nothing"),
    "optim.warmup_steps": (0, "0 means no warm-up"),
    "optim.cooldown_steps": (0, "0 means no cooldown"),
    "optim.vision_lr_scale": (0, "0 freezes the image tower"),
    "optim.text_lr_scale": (0, "0 freezes the text tower"),
    "optim.grad_clip_norm": (0, "0 turns clipping off"),
    "train.global_batch_size": (1, "give at least 1"),
    "train.chunk_size": (0, "0 takes a rank's images at once"),
    "train.epochs": (0, "give train.epochs or train.steps"),
    "train.steps": (0, "0 means train.epochs"),
    "train.undropped_steps": (0, "0 drops patches to the end"),
    "train.max_nonfinite_steps": (1, "give at least 1"),
    "checkpoint.every_steps": (1, "give at least 1"),
    "checkpoint.every_minutes": (0, "0 goes by steps alone"),
    "checkpoint.keep_last": (1, "give at least 1"),
    "logging.every_steps": (1, "give at least 1"),
    "eval.every_steps": (0, "0 evaluates once at the end"),
    "eval.batch_size": (1, "give at least 1"),
    "eval.max_samples": (0, "0 means all"),
}
_FRACTIONS = (
    *("data.max_bad_fraction", "data.flip_prob", "data.color_jitter_prob", "data.gray_scale_prob"),
    "data.erase_prob",
    "optim.final_lr_fraction",
)


def validate(config: Config) -> None:
    """Raise UserError naming the first field (section.field) whose value can't work."""
    for name, (smallest, what_to_do) in _AT_LEAST.items():
        value = value_of(config, name)
        if not value >= smallest:  # NaN is not
            refuse(name, value, what_to_do)
    for name in _FRACTIONS:
        if not 0 <= value_of(config, name) <= 1:
            refuse(name, value_of(config, name), "give a fraction in [0, 1]")
    for name in ("loss.threshold", "eval.threshold"):
        value = value_of(config, name)
        if value is not None and not value <= 1:
            refuse(name, value, "no patch is above 1, and where none is all are taken; give at most 1")
    _check_captions(config.data)
    _check_mixture(config.data)
    _check_preset(config)
    _check_loss(config.loss)
    _check_bias(config)
    _check_grouping(config)
    _check_optimizer(config.optim)
    _check_training(config)
    if config.eval.every_steps and not config.data.val_shards and not config.eval.zero_shot:
        refuse("eval.every_steps", config.eval.every_steps, "it evaluates on data.val_shards, which is empty")
    if bool(config.eval.zero_shot) != bool(config.eval.zero_shot_root):
        what_to_do = "give both eval.zero_shot and eval.zero_shot_root, or none"
        refuse("eval.zero_shot_root", config.eval.zero_shot_root, what_to_do)


def _check_captions(data: DataConfig) -> None:
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        refuse("data.crop_scale", data.crop_scale, "give 0 < low <= high <= 1")
    low, high = data.crop_ratio
    if not 0 < low <= high < math.inf:
        refuse("data.crop_ratio", data.crop_ratio, "give 0 < narrowest <= widest")
    if not (all(0 <= strength < math.inf for strength in data.color_jitter) and data.color_jitter[3] <= 0.5):
        refuse("data.color_jitter", data.color_jitter, "strengths are >= 0, that of the hue at most 0.5")
    negative = {name: weight for name, weight in data.source_weights.items() if not weight >= 0}
    if negative:
        refuse("data.source_weights", negative, "weights are >= 0")
    unused = [name for name in data.source_weights if data.caption_sources and name not in data.caption_sources]
    if unused:
        what_to_do = (
            f"these columns are not in data.caption_sources {data.caption_sources}; give the weights of those that are "
            "(--data.source-weights NAME=WEIGHT ..., or --data.source-weights alone for 1 each)"
        )
        refuse("data.source_weights", unused, what_to_do)


def _check_mixture(data: DataConfig) -> None:
    if data.mixture and data.shards:
        what_to_do = (
            f"data.mixture has {', '.join(data.mixture)}; give one of them (--data.mixture alone, or --data.shards '', "
            "empties it)"
        )
        refuse("data.shards", data.shards, what_to_do)
    if data.proportions and data.proportions.keys() != data.mixture.keys():
        what_to_do = f"give a weight for each set of data.mixture ({', '.join(data.mixture) or 'it has none'}), or none"
        refuse("data.proportions", data.proportions, what_to_do)
    if not all(0 < weight < math.inf for weight in data.proportions.values()):
        refuse("data.proportions", data.proportions, "weights are > 0; leave a set out of data.mixture to skip it")


def _check_preset(config: Config) -> None:
    """A run must not carry a name that it does not follow."""
    name = config.loss.preset
    for field, value in settings_of(config, name).items():
        if value_of(config, field) != value:
            what_to_do = f'loss.preset="{name}" has {value!r}; leave it out, or give loss.preset="ours"'
            refuse(field, value_of(config, field), what_to_do)


def _check_loss(loss: LossConfig) -> None:
    if loss.label_smoothing >= 1:
        refuse("loss.label_smoothing", loss.label_smoothing, "give less than 1: the rest is each softmax's own target")
    if loss.mpcl_weight == loss.grouping_weight == 0:
        refuse("loss.mpcl_weight", 0, "both loss weights are 0: nothing would be trained")
    if loss.positives == "logsum" and loss.negatives != "all":
        refuse("loss.positives", loss.positives, 'the sum inside the log needs loss.negatives="all"')
    if loss.pairs == "sigmoid" and (loss.negatives, loss.positives) != ("slot", "mean"):
        what_to_do = "loss.negatives and loss.positives belong to the softmax; leave them at their defaults"
        refuse("loss.pairs", loss.pairs, what_to_do)


def _check_bias(config: Config) -> None:
    bias, sigmoid = config.model.init_logit_bias, config.loss.pairs == "sigmoid"
    if sigmoid and bias is None:
        what_to_do = "the sigmoid loss starts at a bias that makes most pairs negatives; give -10"
        refuse("model.init_logit_bias", bias, what_to_do)
    if bias is not None and not sigmoid:
        refuse("model.init_logit_bias", bias, 'only loss.pairs="sigmoid" has a bias')


def _check_grouping(config: Config) -> None:
    weight = config.loss.grouping_weight
    if weight > 0 and config.loss.contrast == "image" and config.data.num_sub_captions == 1:
        what_to_do = (
            "with data.num_sub_captions=1 the within-image contrast has no negatives; "
            'give more sub-captions, loss.contrast="conditioned", or weight 0'
        )
        refuse("loss.grouping_weight", weight, what_to_do)
    if config.loss.candidates < 2:
        refuse("loss.candidates", config.loss.candidates, "a sub-caption picks among at least 2 images")
    why = "only the grouping loss uses it, and loss.grouping_weight is 0"
    if weight == 0 and config.model.local_logit_scale:
        refuse("model.local_logit_scale", True, f"{why}; set it to False")
    if weight == 0 and config.model.patch_projection == "local":
        refuse("model.patch_projection", "local", f'{why}; use "shared"')


def _check_optimizer(optim: OptimConfig) -> None:
    if not optim.lr > 0:
        refuse("optim.lr", optim.lr, "give a rate > 0")
    if not 0 < optim.layer_decay <= 1:
        refuse("optim.layer_decay", optim.layer_decay, "give a factor in (0, 1]; 1 trains all layers alike")
    if optim.vision_lr_scale == optim.text_lr_scale == 0:
        refuse("optim.vision_lr_scale", 0, "both towers are frozen: nothing would be trained")
    if not 0 < optim.muon_lr_scale < math.inf:
        refuse("optim.muon_lr_scale", optim.muon_lr_scale, "give a factor > 0; 1 is AdamW's rate")
    if optim.cooldown_steps and optim.schedule in ("cosine", "linear"):
        refuse("optim.cooldown_steps", optim.cooldown_steps, 'only optim.schedule="constant" and "wsd" cool down')
    if optim.schedule == "wsd" and not optim.cooldown_steps:
        refuse("optim.cooldown_steps", 0, 'optim.schedule="wsd" is its decay; give the steps it takes')


def _check_training(config: Config) -> None:
    train = config.train
    if not 0 <= config.model.patch_dropout < 1:
        refuse("model.patch_dropout", config.model.patch_dropout, "give a part in [0, 1); 0 drops nothing")
    if train.undropped_steps and not config.model.patch_dropout:
        refuse("train.undropped_steps", train.undropped_steps, "model.patch_dropout is 0: nothing is dropped at all")
    if train.steps == train.epochs == 0:
        refuse("train.epochs", 0, "give train.epochs or train.steps")
    if not 0 <= train.ema_decay < 1:
        refuse("train.ema_decay", train.ema_decay, "give a decay in [0, 1); 0 keeps no average")
    if train.ema_decay and config.deepspeed.zero_stage == 3:
        refuse("train.ema_decay", train.ema_decay, "a rank has slices with deepspeed.zero_stage=3; use stage 0, 1 or 2")
    if config.eval.weights == "ema" and not train.ema_decay:
        refuse("eval.weights", "ema", "there is no average; give train.ema_decay, such as 0.999")
    if config.optim.optimizer == "muon" and (config.deepspeed.zero_stage > 0 or train.precision == "bf16"):
        # Elsewhere DeepSpeed gives the optimizer pieces of one long vector.
        what_to_do = (
            'it moves whole matrices; give deepspeed.zero_stage=0 and train.precision="fp32" or "amp_bf16", or '
            'optim.optimizer="adamw" with a rate of its own'
        )
        refuse("optim.optimizer", "muon", what_to_do)
    if train.compile and config.deepspeed.zero_stage == 3:
        refuse("train.compile", True, "does not run with deepspeed.zero_stage=3; use stage 0, 1 or 2")
    if train.compile and not train.pack_captions:
        what_to_do = "train.compile compiles the text tower for packed captions; leave them packed, or do not compile"
        refuse("train.pack_captions", False, what_to_do)


def value_of(config: Config, name: str) -> Any:
    """The value of the field ``name`` (section.field)."""
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def refuse(name: str, value: Any, what_to_do: str) -> NoReturn:
    """Raise the UserError of a setting that can't work."""
    raise UserError(f"{name}: got {value!r}; {what_to_do}")
