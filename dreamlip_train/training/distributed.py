"""The process group: which rank of which world this process is, on which device."""

from __future__ import annotations

import atexit
import logging
import os
import socket

import torch
import torch.distributed as dist


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
