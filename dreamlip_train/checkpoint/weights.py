"""A trained model for evaluation and export, from a run, a checkpoint of any ZeRO stage, or an open_clip weights
file.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Literal

import torch

from dreamlip_train.checkpoint.files import (
    damaged_files,
    find_checkpoint,
    refuse_foreign_pickles,
)
from dreamlip_train.config.schema import Config, ModelConfig
from dreamlip_train.config.toml import read_config
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.weight_average import read_average

Weights = Literal["", "average", "raw"]


def load_for_eval(path: str | Path, model_name: str = "", weights: Weights = "") -> tuple[DreamLIP, Config]:
    """The model in fp32 on the CPU and the config it was trained with, from a run folder, a checkpoint folder or an
    open_clip weights file.

    Args:
        path: RUN, RUN/checkpoints/step-NNNNNNNN, or a weights file.
        model_name: the open_clip name of the model in a weights file; needed there, and wrong elsewhere.
        weights: "average" are the moving average that a run with train.ema_decay keeps, "raw" those of the last step;
            "" is what the run's eval.weights says, which is "last", the raw ones, where nobody set it.
    Raises:
        UserError: nothing loadable is there, ``model_name`` is missing or superfluous, or there is no average.
    """
    path = Path(path)
    if path.is_file():
        if not model_name:
            raise UserError(f"--model: say which open_clip model {str(path)!r} holds, such as ViT-B-16")
        if weights == "average":
            raise UserError(
                f"--weights: {str(path)!r} holds one set of weights; only a run's checkpoint can have an average"
            )
        config = Config(model=ModelConfig(name=model_name, pretrained=str(path), local_logit_scale=False))
        return build_model(config.model, seed=0).eval(), config
    if model_name:
        raise UserError(f"--model: {str(path)!r} brings its own config; leave --model out")
    if not path.is_dir():
        raise UserError(f"no file or folder {str(path)!r}; give a run folder, a checkpoint folder or an open_clip file")
    state, config = read_weights(path, weights)
    model = build_model(config.model, seed=0)
    model.load_state_dict(state)
    return model.eval(), config


def read_weights(path: Path, weights: Weights = "") -> tuple[dict[str, torch.Tensor], Config]:
    """DreamLIP's state dict, in fp32, and the config of a run folder or a checkpoint folder.

    Args:
        weights: as ``load_for_eval``.
    Raises:
        UserError: no whole, undamaged checkpoint is there, or no average in it.
    """
    checkpoint = find_checkpoint(path)
    if damaged_names := damaged_files(checkpoint):
        raise UserError(
            f"{checkpoint / damaged_names[0]} is not what was written (its hash differs); give an earlier checkpoint"
        )
    refuse_foreign_pickles(checkpoint)
    config = read_config(checkpoint / "config.toml")
    # The weights follow; the file they once started from may be gone.
    config.model.pretrained = ""
    state = _state_dict(checkpoint, config.deepspeed.zero_stage)
    if weights == "average" or (not weights and config.eval.weights == "ema"):
        state |= read_average(checkpoint)
    return {name: value.float() for name, value in state.items()}, config


def _state_dict(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The model's whole fp32 weights. DeepSpeed's files are pickles: load only checkpoints of your own runs."""
    state = {}
    if (
        zero_stage < 3
    ):  # every rank has the whole module, as the forward pass saw it; parameters that are not trained are nowhere else
        state = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    if zero_stage > 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state |= get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return state
