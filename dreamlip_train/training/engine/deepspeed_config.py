"""The DeepSpeed config of a run: each of its settings from one field of ours, the user's additions checked and merged
last.
"""

from __future__ import annotations

import difflib
from typing import Any

from dreamlip_train.config.batch import chunks_per_rank, images_per_rank
from dreamlip_train.config.schema import Config
from dreamlip_train.jobs.user_error import UserError

# DeepSpeed's 5e8 elements would be one 2 GB buffer, and a model of this size would be reduced in one piece after
# backward instead of during it.
BUCKET_ELEMENTS = 25_000_000
# DeepSpeed accepts unknown top-level keys silently, so a typing error would be a setting that never acts.
_DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "check_overflow",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
_SET_ELSEWHERE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "gradient_accumulation_steps": "train.chunk_size (accumulating the loss itself would shrink its negatives)",
    "gradient_clipping": "optim.grad_clip_norm",
    "optimizer": "the optim section",
    "scheduler": "optim.lr, optim.warmup_steps, optim.schedule and optim.final_lr_fraction",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "zero_allow_untested_optimizer": "nothing: it is always on",
}


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """The DeepSpeed config of these settings on ``ranks`` ranks, ``deepspeed.config`` merged over it.

    Raises:
        UserError: ``ranks`` can't share the global batch.
    """
    train, images, chunks = config.train, images_per_rank(config, ranks), chunks_per_rank(config, ranks)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": -(-images // chunks),
        "gradient_accumulation_steps": chunks,
        "gradient_clipping": config.optim.grad_clip_norm,
        "zero_optimization": {"stage": config.deepspeed.zero_stage, "reduce_bucket_size": BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if train.precision == "amp_bf16":
        # An empty list of "safe" modules keeps the gradient reduction in fp32, as open_clip's amp_bf16 has it.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merge(settings, config.deepspeed.config)


def check_deepspeed_config(extra: dict[str, Any]) -> None:
    """Raise UserError where ``deepspeed.config`` has a key DeepSpeed does not know, or one that another field already
    sets.
    """
    for key in extra:
        if key in _SET_ELSEWHERE:
            raise UserError(f"deepspeed.config: {key!r} is set by {_SET_ELSEWHERE[key]}; take it out")
        if key not in _DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, (*_DEEPSPEED_KEYS, *_SET_ELSEWHERE), n=3) or list(_DEEPSPEED_KEYS)
            raise UserError(f"deepspeed.config: unknown key {key!r}; did you mean {', '.join(close)}?")
    for section, key, field in (
        ("zero_optimization", "stage", "deepspeed.zero_stage"),
        ("torch_autocast", "enabled", "train.precision"),
    ):
        if not isinstance(extra.get(section, {}), dict):
            raise UserError(f"deepspeed.config: {section} must be an object, got {extra[section]!r}")
        if key in extra.get(section, {}):
            raise UserError(f"deepspeed.config: {section}.{key} is set by {field}; take it out")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged
