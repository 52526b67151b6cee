"""The DeepSpeed engine of a model, and the model of an engine.

DeepSpeed is imported inside the functions, so that the command line answers quickly.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dreamlip_train.config.schema import Config, ModelConfig
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.model.dreamlip import DreamLIP
from dreamlip_train.model.weight_average import WeightAverage
from dreamlip_train.training.engine.deepspeed_config import deepspeed_config
from dreamlip_train.training.engine.muon import Muon
from dreamlip_train.training.engine.optimizer import freeze_towers, parameter_groups


def build_engine(model: DreamLIP, config: Config, device: torch.device, *, resized: bool = False) -> Any:
    """``deepspeed.initialize`` of ``model`` with its optimizer; the process group must exist (``init_distributed``).

    ``resized``: it will load a checkpoint that another number of ranks wrote.
    """
    import deepspeed

    train, optim = config.train, config.optim
    settings = deepspeed_config(config, dist.get_world_size())
    if resized and config.deepspeed.zero_stage > 0:
        settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
    if train.grad_checkpointing:
        model.clip.set_grad_checkpointing()
    freeze_towers(model, optim)
    model.to(device)
    model.channels_last = train.channels_last
    if train.compile:
        model.compile_towers()
    # lr=0 here, the real rate before each step: DeepSpeed's bf16 ZeRO-0 optimizer takes one step with zero gradients to
    # allocate its state, and that step would decay the weights and start Adam's bias correction at 2.
    kind = Muon if optim.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(
        parameter_groups(model, optim),
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=optim.fused,
    )
    try:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    except (ValueError, TypeError) as error:  # pydantic's errors about keys inside a section are ValueErrors
        raise UserError(f"deepspeed.config: DeepSpeed refuses the config: {error}") from error
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    return engine


@contextlib.contextmanager
def evaluation_model(engine: Any, model: ModelConfig, average: WeightAverage | None = None) -> Iterator[DreamLIP]:
    """The weights in evaluation mode, without gradients. Collective under ZeRO-3, where a rank holds slices:
    there it is a whole copy built from ``model``.
    """
    import deepspeed

    if engine.zero_optimization_stage() == 3:
        whole = build_model(dataclasses.replace(model, pretrained=""), seed=0)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            state = {name: p.detach().float() for name, p in engine.module.named_parameters()}
            state |= {name: buffer for name, buffer in engine.module.named_buffers() if name in whole.state_dict()}
            whole.load_state_dict(state)
        whole.to(engine.device)
    else:
        whole = engine.module
    whole.eval()
    try:
        with torch.no_grad(), average.in_place_of(whole) if average is not None else contextlib.nullcontext():
            yield whole
    finally:
        whole.train()
