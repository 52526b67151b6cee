"""The process group: which rank of which world this process is, on which device."""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
from collections.abc import Mapping

import torch
import torch.distributed as dist

from dreamlip_train.jobs.user_error import UserError


def init_distributed() -> torch.device:
    """Join (or, started without a launcher, form) the process group; return this rank's device.

    Raises:
        UserError: the environment does not say which rank of which world this process is, or the rank has no GPU here.
    """
    world = world_of(os.environ)
    os.environ.update(world)
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import deepspeed

    # An all-reduce for inference that training never calls: without this line the first CPU run compiles it, for half a
    # minute or until no compiler is found.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = _device(_whole_number(os.environ, "LOCAL_RANK", 0)) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" in world:
            os.environ["MASTER_PORT"] = _free_port()  # another process may have taken the first while DeepSpeed came in
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    _share_cores(on_gpu)
    return device


def world_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT has to be set,
    beside what is.

    A launcher (torchrun, deepspeed) sets them. Where none did, ``srun`` with several tasks is a world of its tasks, and
    plain ``python`` a world of one on a free port.

    Raises:
        UserError: they contradict each other, or SLURM gave several tasks to a process that it did not start as one of
            them.
    """
    if _whole_number(environment, "MASTER_PORT", 1) not in range(1, 2**16):
        raise UserError(f"MASTER_PORT: got {environment['MASTER_PORT']}; a port is from 1 to 65535")
    places = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if any(places.values()):
        rank, size = (int(value) if value.isdecimal() else -1 for value in places.values())
        if not 0 <= rank < size:
            raise UserError(
                f"RANK={places['RANK']!r}, WORLD_SIZE={places['WORLD_SIZE']!r}: a launcher sets both, "
                "0 <= RANK < WORLD_SIZE; "
                "start with torchrun, deepspeed or srun, or unset both for a single process"
            )
        address = {} if environment.get("MASTER_ADDR") else {"MASTER_ADDR": "127.0.0.1"}
        if address and size > 1:
            raise UserError(f"MASTER_ADDR: is not set, and WORLD_SIZE is {size}; set it to the host of rank 0")
        return address | (
            {} if environment.get("MASTER_PORT") else {"MASTER_PORT": _free_port() if size == 1 else "29500"}
        )
    if _whole_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _world_of_srun(environment)
    if _whole_number(environment, "SLURM_NTASKS", 1) > 1 and not environment.get("SLURM_STEP_NUM_TASKS"):
        raise UserError(
            f"SLURM_NTASKS={environment['SLURM_NTASKS']}, but this process was not started by srun, "
            "so that each task would be "
            "a run of its own; start it with srun or a launcher, or give RANK=0 WORLD_SIZE=1 for a single process"
        )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}


def _world_of_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the variables that srun sets for each task; the port is one that every task of the job step computes alike."""
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID") if not environment.get(name)]
    if missing:
        raise UserError(f"{missing[0]}: is not set, though SLURM_STEP_NUM_TASKS is; start with srun or a launcher")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    rank, size = _whole_number(environment, "SLURM_PROCID", 0), _whole_number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if rank >= size:
        raise UserError(
            f"SLURM_PROCID={rank}, SLURM_STEP_NUM_TASKS={size}: a task's number is smaller than their number"
        )
    job, step = _whole_number(environment, "SLURM_JOB_ID", 0), _whole_number(environment, "SLURM_STEP_ID", 0)
    world = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_whole_number(environment, "SLURM_LOCALID", 0)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + (job + step) % 20_000),
    }
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    node = _whole_number(environment, "SLURM_NODEID", 0)
    return world | ({"LOCAL_WORLD_SIZE": str(counts[node])} if node < len(counts) else {})


def _whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable's value, ``default`` where it is not set or empty."""
    value = environment.get(name) or str(default)
    if not (value.isdecimal() and value.isascii() and len(value) < 19):
        raise UserError(f"{name}: got {value!r}, which is no whole number; unset it, or set it to what it should be")
    return int(value)


def first_host(nodes: str) -> str:
    """The first host of SLURM's list, such as "node003" of "node[003-006,9],login1"."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(
            f"SLURM_JOB_NODELIST: got {nodes!r}, which names no host; set MASTER_ADDR to the host of rank 0"
        )
    return match[1] + (match[2] or "") + (match[3] or "")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _device(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    # A scheduler that gives each task its own GPU shows it that one alone.
    index = 0 if count == 1 and "SLURM_LOCALID" in os.environ else local_rank
    if index >= count:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine shows {count} GPUs; start at most as many ranks per machine "
            "as it has"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _share_cores(on_gpu: bool) -> None:
    """On the CPU give each rank of this machine an even share of its cores, unless the user set OMP_NUM_THREADS.

    torchrun sets OMP_NUM_THREADS=1 by itself, the deepspeed launcher leaves every rank all cores:
    both are wrong for ranks that compute on the CPU.
    """
    set_by_user = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if not on_gpu and not set_by_user:
        # torchrun's name, the deepspeed launcher's name
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
        ranks = _whole_number(os.environ, next(name for name in names if os.environ.get(name)), 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, ranks)))
