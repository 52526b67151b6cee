"""Run by test_engine.py under torchrun: the tiny model's losses on two ranks, averaged over them, for ZeRO 1 and 3."""

import json
import sys

import torch
import torch.distributed as dist
from tiny import GLOBAL_BATCH, STEPS, run_steps, tiny_config, tiny_engine

found = {}
for stage in (1, 3):
    config = tiny_config(stage, batch_size=GLOBAL_BATCH // 2)
    engine = tiny_engine(config)
    losses = torch.tensor(run_steps(engine, config, 0, STEPS, dist.get_rank(), dist.get_world_size()))
    dist.all_reduce(losses)
    found[stage] = (losses / dist.get_world_size()).tolist()
if dist.get_rank() == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
dist.barrier()  # a rank that leaves while the other still talks makes gloo abort it
dist.destroy_process_group()
