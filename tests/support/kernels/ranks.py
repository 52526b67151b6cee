"""Processes that are the ranks of a gloo group, for tests over ranks."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(worker, world, *args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Forked from a process that has imported torch and nothing else has happened in (tests/conftest.py):
    # this one may have a process group of other tests.
    mp.start_processes(worker, args=(world, port, *args), nprocs=world, start_method="forkserver")


def join(rank, world, port):
    """Become a rank; ``dist.destroy_process_group()`` is how it leaves."""
    if torch.__version__ < "2.7":  # its gloo sometimes never returns: so do three ranks of nothing but all_gather
        dist.destroy_process_group = lambda: None
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
