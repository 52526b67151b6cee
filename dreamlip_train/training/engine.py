"""The DeepSpeed engine: process group, optimizer groups, config, learning rate, and one visible ``train_step``.

DeepSpeed is imported inside the functions, so that the command line answers quickly.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamlip_train.config.schema import EngineConfig, ModelConfig, OptimConfig
from dreamlip_train.model.dreamlip import DreamLIP, build_model, crop_to_longest
from dreamlip_train.model.packing import PackedCaptions, pack_captions
from dreamlip_train.training.deepspeed_config import deepspeed_config

LOGIT_SCALARS = ("logit_scale", "logit_scale_local", "logit_bias")


@dataclass(frozen=True)
class StepResult:
    """What one step did: ``losses`` by name (fp32 scalars on the device), whether the weights moved, the gradient norm, the logit scales and bias."""

    losses: dict[str, Tensor]
    applied: bool
    grad_norm: float
    scales: dict[str, Tensor]


def init_distributed() -> torch.device:
    """Join (or, started without a launcher, form) the process group; return this rank's device.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher; plain ``python`` is a world of one on a free port.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import deepspeed

    # An all-reduce for inference that training never calls: without this line the first CPU run compiles it, for half a minute or until no compiler is found.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    _share_cores(on_gpu)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def _share_cores(on_gpu: bool) -> None:
    """On the CPU give each rank of this machine an even share of its cores, unless the user set OMP_NUM_THREADS.

    torchrun sets OMP_NUM_THREADS=1 by itself, the deepspeed launcher leaves every rank all cores: both are wrong for ranks that compute on the CPU.
    """
    set_by_user = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if not on_gpu and not set_by_user:
        # torchrun's name, the deepspeed launcher's name
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices decay; biases, norms, logit scales and other vectors do not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim < 2 or name.endswith("bias") or name in LOGIT_SCALARS]
    kept = {id(p) for p in plain}
    return [
        {"params": [p for _, p in trained if id(p) not in kept], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Rate of step ``step`` (the first is 0): linear to ``lr`` over ``warmup_steps`` steps, then a cosine to ``final_lr_fraction * lr``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * cosine)


def build_engine(
    model: DreamLIP, engine: EngineConfig, optim: OptimConfig, device: torch.device, *, resized: bool = False
) -> Any:
    """``deepspeed.initialize`` of ``model`` with AdamW; the process group must exist (``init_distributed``).

    ``resized``: it will load a checkpoint that another number of ranks wrote.
    """
    import deepspeed

    config = deepspeed_config(engine, optim)
    if resized and (engine.zero_stage > 0):
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    if engine.grad_checkpointing:
        model.clip.set_grad_checkpointing()
    model.to(device)
    model.channels_last = engine.channels_last
    if engine.compile:
        model.compile_towers()
    # lr=0 here, the real rate before each step: DeepSpeed's bf16 ZeRO-0 optimizer takes one step with zero gradients to allocate its state, and that step
    # would decay the weights and start Adam's bias correction at 2.
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=optim.fused,
    )
    try:
        built = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    except (ValueError, TypeError) as error:  # pydantic's errors about keys inside a section are ValueErrors
        raise ValueError(f"engine.deepspeed: DeepSpeed refuses the config: {error}") from error
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    return built


def move_batch(batch: dict[str, Any], device: torch.device, pack: bool = True) -> dict[str, Any]:
    """``batch`` on ``device``, its captions packed into rows before they travel, or without ``pack`` cropped to the longest of them."""
    batch = {**batch, "text": pack_captions(batch["text"]) if pack else crop_to_longest(batch["text"])}
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, (Tensor, PackedCaptions)) else value
        for key, value in batch.items()
    }


def train_step(
    engine: Any, loss_fn: Callable[..., dict[str, Tensor]], batch: dict[str, Any], lr: float, *, patches: bool = True
) -> StepResult:
    """One optimizer step on a batch of ``move_batch``; a step whose loss or gradients are not finite on any rank leaves the weights as they were."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    features = engine(batch["images"], batch["text"], patches)
    losses = loss_fn(**features, text_mask=batch["text_mask"], output_dict=True)
    loss = sum(losses.values())
    scales = {name: features[name].detach() for name in LOGIT_SCALARS if features[name] is not None}
    losses = {name: value.detach() for name, value in losses.items()}
    if not finite_everywhere(loss):
        return StepResult(losses, False, math.nan, scales)
    engine.backward(loss)
    grad_norm = _unsharded_grad_norm(engine)
    if grad_norm is not None and not math.isfinite(grad_norm):
        engine.optimizer.zero_grad()
        return StepResult(losses, False, grad_norm, scales)
    engine.step()
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm())
    return StepResult(losses, engine.was_step_applied() and math.isfinite(grad_norm), grad_norm, scales)


def finite_everywhere(loss: Tensor) -> bool:
    """Whether ``loss`` is finite on every rank. All ranks must agree before backward: a rank that skips alone hangs the others' reductions."""
    broken = (~torch.isfinite(loss.detach())).float()
    if dist.get_world_size() > 1:
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    return not bool(broken)


def _unsharded_grad_norm(engine: Any) -> float | None:
    """Global gradient norm under ZeRO-0, whose optimizer would apply a NaN; None where DeepSpeed checks for itself."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))


@contextlib.contextmanager
def evaluation_model(engine: Any, model: ModelConfig) -> Iterator[DreamLIP]:
    """The weights in evaluation mode, without gradients. Collective under ZeRO-3, where a rank holds slices: there it is a whole copy built from ``model``."""
    import deepspeed

    if engine.zero_optimization_stage() == 3:
        whole = build_model(dataclasses.replace(model, pretrained=""), seed=0)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            whole.load_state_dict({name: p.detach().float() for name, p in engine.module.named_parameters()})
        whole.to(engine.device)
    else:
        whole = engine.module
    whole.eval()
    try:
        with torch.no_grad():
            yield whole
    finally:
        whole.train()
