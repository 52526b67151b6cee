"""DeepSpeed's engine beside PyTorch's FSDP2 (fully_shard) under the trainer's model and loss: losses and time a step.

    torchrun --standalone --nproc-per-node 2 benchmarks/fsdp2.py

On a CPU over gloo the seconds are CPU seconds of rank 0; what they say of NCCL is little, what they say of the losses
is all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from dreamlip_kernels import DreamLIPLoss
from dreamlip_train.config.run_schema import DeepSpeedConfig, OptimConfig, TrainConfig
from dreamlip_train.config.schema import Config, ModelConfig
from dreamlip_train.model.build import build_model
from dreamlip_train.training.distributed import init_distributed
from dreamlip_train.training.engine.engine import build_engine
from dreamlip_train.training.engine.optimizer import parameter_groups
from dreamlip_train.training.step import move_batch, train_step

STEPS, BATCH, K, RATE = 8, 16, 4, 5e-4
TOWERS = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 256, "layers": 6, "head_width": 64},
    "text_cfg": {"width": 256, "heads": 4, "layers": 6},
}


def config(stage: Literal[0, 2, 3]) -> Config:
    return Config(
        model=ModelConfig(name="small", config=TOWERS, context_length=32),
        optim=OptimConfig(lr=RATE, warmup_steps=0, weight_decay=0.1, grad_clip_norm=1.0),
        train=TrainConfig(global_batch_size=2 * BATCH, steps=STEPS, precision="fp32"),
        deepspeed=DeepSpeedConfig(zero_stage=stage),
    )


def batch(step: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    images = torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 40_000, (BATCH, K, 32), generator=generator)
    text[:, :, 0], text[:, :, 15], text[:, :, 16:] = 49406, 49407, 0
    mask = torch.ones(BATCH, K, dtype=torch.bool)
    return move_batch({"images": images, "text": text, "text_mask": mask}, device)


def deepspeed_step(stage: Literal[2, 3], device: torch.device) -> Callable[[dict[str, Any]], float]:
    engine = build_engine(build_model(config(stage).model, 0), config(stage), device)
    loss_fn = DreamLIPLoss()
    return lambda data: float(sum(train_step(engine, loss_fn, data, RATE).losses.values()))


def fsdp2_step(reshard: bool, device: torch.device) -> Callable[[dict[str, Any]], float]:
    settings = config(0)
    model = build_model(settings.model, 0).to(device)
    blocks = [*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks]
    for module in (*blocks, model):
        fully_shard(module, reshard_after_forward=reshard)
    optim = settings.optim
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), lr=RATE, betas=betas, eps=optim.eps)
    loss_fn = DreamLIPLoss()

    def step(data: dict[str, Any]) -> float:
        losses = loss_fn(**model(data["images"], data["text"], True), text_mask=data["text_mask"], output_dict=True)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach())

    return step


def main() -> None:
    device = init_distributed()
    engines = {
        "DeepSpeed, ZeRO-2": lambda: deepspeed_step(2, device),
        "DeepSpeed, ZeRO-3": lambda: deepspeed_step(3, device),
        "FSDP2, weights kept between passes": lambda: fsdp2_step(False, device),
        "FSDP2, weights gathered again": lambda: fsdp2_step(True, device),
    }
    for name, build in engines.items():
        step = build()
        losses = [step(batch(0, device)), step(batch(1, device))]  # what is allocated and compiled at first
        began = time.process_time()
        losses += [step(batch(i, device)) for i in range(2, STEPS)]
        seconds = (time.process_time() - began) / (STEPS - 2)
        if dist.get_rank() == 0:
            print(
                f"{name:36} {seconds:6.2f} s a step   losses {' '.join(f'{loss:.6f}' for loss in losses)}", flush=True
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
