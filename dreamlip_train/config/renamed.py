"""Settings that had another name once: a flag, a TOML key or a run folder that still uses it is refused with the new
name.
"""

from __future__ import annotations

from dreamlip_train.jobs.user_error import UserError

RENAMED = {
    "data.workers": "data.num_workers",
    "model.patch_attention": 'model.own_value_blocks, 1 for "own" and 0 for "full"',
    "engine.batch_size": "train.global_batch_size, which counts the images of all ranks together",
    "engine.chunk_size": "train.chunk_size",
    "engine.epochs": "train.epochs",
    "engine.steps": "train.steps",
    "engine.precision": "train.precision",
    "engine.zero_stage": "deepspeed.zero_stage",
    "engine.grad_checkpointing": "train.grad_checkpointing",
    "engine.pack_captions": "train.pack_captions",
    "engine.compile": "train.compile",
    "engine.channels_last": "train.channels_last",
    "engine.prefetch": "train.prefetch",
    "engine.seed": "train.seed",
    "engine.log_every": "logging.every_steps",
    "engine.save_every_steps": "checkpoint.every_steps",
    "engine.save_every_minutes": "checkpoint.every_minutes",
    "engine.keep_last": "checkpoint.keep_last",
    "engine.max_nonfinite_steps": "train.max_nonfinite_steps",
    "engine.wandb_project": "logging.wandb_project",
    "engine.deepspeed": "deepspeed.config",
}


def refuse_renamed_flags(arguments: list[str]) -> None:
    """Raise UserError at the first ``--section.field`` (or ``--section.no-field``) among ``arguments`` that has another
    name now.
    """
    for word in arguments:
        flag = word.split("=")[0]
        name = flag.removeprefix("--").replace("-", "_").replace(".no_", ".")
        if flag.startswith("--") and name in RENAMED:
            new, _, about = RENAMED[name].partition(",")
            raise UserError(f"{flag}: is now --{new.replace('_', '-')}{about and ',' + about}")


def refuse_renamed_keys(settings: dict[str, object], source: str) -> None:
    """Raise UserError, blaming ``source``, at the first section.field of the nested ``settings`` that has another name
    now.
    """
    for section, fields in settings.items():
        for name in fields if isinstance(fields, dict) else ():
            if f"{section}.{name}" in RENAMED:
                raise UserError(
                    f"{source}: {section}.{name} is now {RENAMED[f'{section}.{name}']}; the file is of an earlier "
                    "version: "
                    "change its names, or start a new run"
                )
