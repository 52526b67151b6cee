"""The kernels of a run: qualified by one rank of a machine while the others wait, the same on every rank,
kept when it resumes.
"""

import multiprocessing
import os
import socket
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_config, tiny_engine

import dreamlip_kernels
from dreamlip_kernels.backends import dispatch
from dreamlip_train.config.schema import LossConfig
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.build import build_model
from dreamlip_train.training.loss_backends import (
    check_backends,
    choose_backends,
    qualify_device,
    release_backends,
    requested_backend,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unpinned():
    yield
    release_backends()
    assert not dispatch._pinned


@pytest.fixture(scope="module")
def case():
    """A config and its model, in a world of one."""
    config = tiny_config()
    tiny_engine(config)
    return config, build_model(config.model, 0)


def test_a_new_run_pins_what_auto_takes_at_its_sizes(case, monkeypatch):
    asked = {}
    monkeypatch.setitem(
        dispatch._BACKENDS,
        "group_patches",
        {"small": lambda call: asked.update(call.sizes, dtype=call.dtype) or "too small", "torch": lambda call: None},
    )
    choice = choose_backends(*case, CPU, 8, {})
    assert choice.backends == {"bidirectional_logsumexp": "torch", "group_patches": "torch"} and not choice.changes
    assert asked == {"N": 8, "P": 16, "K": 8, "D": 32, "dtype": torch.float32}
    assert "group_patches=torch (auto; small: too small)" in choice.reasons
    assert dispatch.why("group_patches", torch.ones(1)) == "auto; pinned"


def test_a_resumed_run_keeps_its_backends_or_says_why_not(case):
    choice = choose_backends(*case, CPU, 8, {"group_patches": "torch", "bidirectional_logsumexp": "torch"})
    assert choice.backends["group_patches"] == "torch" and not choice.changes, "where auto would take cpp"
    assert "group_patches=torch (as until this checkpoint)" in choice.reasons
    dispatch.pin("group_patches", None)
    choice = choose_backends(*case, CPU, 8, {"group_patches": "cuda", "bidirectional_logsumexp": "gone"})
    assert choice.backends["group_patches"] == "cpp"
    assert choice.changes == [
        "bidirectional_logsumexp ran by gone until this checkpoint and runs by torch now: there is none of that name",
        "group_patches ran by cuda until this checkpoint and runs by cpp now: it runs on CUDA tensors",
    ]


def test_a_backend_asked_for_by_name_is_refused_before_anything_is_built():
    for loss in (LossConfig(backend="torch"), LossConfig(backend="cpp"), LossConfig(grouping_backend="cpp")):
        check_backends(loss, CPU)
    assert requested_backend(LossConfig(backend="torch", grouping_backend="cpp"), "group_patches") == "cpp"
    assert requested_backend(LossConfig(backend="torch", grouping_backend="cpp"), "bidirectional_logsumexp") == "torch"
    for loss, message in (
        (LossConfig(backend="cuda"), "loss.backend: .*backend='cuda' cannot run"),
        (LossConfig(backend="fast"), "loss.backend: unknown backend='fast'"),
        (LossConfig(contrastive_backend="cpp"), "loss.contrastive_backend: .*has no backend 'cpp'"),
        (LossConfig(grouping_backend="cuda"), "loss.grouping_backend: .*backend='cuda' cannot run"),
    ):
        with pytest.raises(UserError, match=message):
            check_backends(loss, CPU)


def worker(rank, port, results):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def measure(device, reuse):
        time.sleep(1.0)
        results[f"measured by {rank}"] = time.monotonic()
        if reuse:
            raise RuntimeError("no such device")
        return SimpleNamespace(identity={"device": "Fake"}, date="today", path="file")

    dreamlip_kernels.qualify = measure
    results[f"said by {rank}"] = qualify_device("always", CPU)
    results[f"on at {rank}"] = time.monotonic()
    results[f"never {rank}"] = qualify_device("never", CPU) + qualify_device("auto", CPU)
    if rank == 1:
        dispatch._BACKENDS["group_patches"] = {"torch": lambda call: None}
    config = tiny_config()
    choice = choose_backends(config, build_model(config.model, 0), CPU, 4, {})
    results[f"chosen by {rank}"] = (choice.backends["group_patches"], choice.changes)
    dist.destroy_process_group()


def test_one_rank_of_a_machine_qualifies_and_ranks_that_differ_agree():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        mp.start_processes(worker, args=(port, results), nprocs=2, start_method="forkserver")
        seen = dict(results)
    assert seen["said by 0"] == "kernels qualified on Fake on today: file" and seen["said by 1"] == ""
    assert "measured by 1" not in seen and seen["on at 1"] >= seen["measured by 0"]
    assert seen["never 0"] == seen["never 1"] == ""
    differ = "group_patches runs by torch code on every rank, for they chose ['cpp', 'torch']"
    assert seen["chosen by 0"] == seen["chosen by 1"] == ("torch", [differ])


def test_a_device_that_cannot_be_qualified_does_not_stop_the_run(case, monkeypatch):
    def fail(device, reuse):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(dreamlip_kernels, "qualify", fail)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert qualify_device("always", CPU) == "the kernels could not be qualified, torch code runs: the driver is gone"
