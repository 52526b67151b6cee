"""Ranks that chose different backends, each by the verdict on its own machine, use the same one."""

import json
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dreamlip_kernels as dk
from dreamlip_kernels import contrastive, grouping
from dreamlip_kernels.backends import dispatch


def worker(rank, world, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    used = []
    original = contrastive.gathered_logsumexp

    def noting(x, y, scale, x_mask, y_mask, backend, *rest):
        used.append(backend)
        return original(x, y, scale, x_mask, y_mask, "torch", *rest)

    contrastive.gathered_logsumexp = grouping.gathered_logsumexp = noting
    op, x = "bidirectional_logsumexp", torch.nn.functional.normalize(torch.randn(7, 8), dim=-1)
    both = {"fused": lambda case: None, "torch": lambda case: None}
    cases = (
        (both, "auto"),
        (both if rank == 0 else {"torch": both["torch"]}, "auto"),
        (both, "auto" if rank == 0 else "torch"),
        (both, "fused" if rank == 0 else "torch"),
    )
    for n, (mine, requested) in enumerate(cases, start=4):  # ranks compare at each new shape
        dispatch._BACKENDS[op] = mine
        dk.multi_positive_contrastive_loss(x[:n], x[:n, None], 10.0, backend=requested)
        # The grouping's contrast over the batch agrees in the same way; its pooling is local, and any backend will do.
        patches, text = x[:n, None].expand(n, 2, 8), x[:n, None]
        dk.subcaption_grouping_loss(patches, text, 10.0, contrast="batch", contrastive_backend=requested)
    (folder / f"{rank}.json").write_text(json.dumps(used))
    dist.destroy_process_group()


def test_the_rank_that_lacks_a_backend_decides_for_all(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(worker, args=(2, port, tmp_path), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    twice = lambda names: [name for name in names for _ in ("contrast", "grouping")]  # noqa: E731
    assert first == twice(["fused", "torch", "torch", "fused"]), "what is asked for by name stays"
    assert second == twice(["fused", "torch", "torch", "torch"])
