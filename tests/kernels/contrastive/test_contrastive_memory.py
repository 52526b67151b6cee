"""What the Triton backend of the contrast allocates and compiles, counted without a device."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from launch_counts import most_allocated
from numerics import clip_like

import dreamlip_kernels as dk
from dreamlip_kernels.backends.settings import settings

pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n, d, part", [(8192, 128, 16), pytest.param(32768, 512, 1, marks=pytest.mark.slow)])
def test_memory_by_count(counted, monkeypatch, n, d, part, dtype, masked):
    """Beyond inputs and gradients at most 1 GB at N=32768, K=8, D=512 with 512 MB to work in, or a sixteenth of
    each.
    """
    monkeypatch.setattr(settings, "workspace_bytes", 2**29 // part)
    image, text = (v.requires_grad_() for v in clip_like(n, 8, d, dtype))
    scale = torch.tensor(14.3, requires_grad=True)
    mask = torch.ones(n, 8, dtype=torch.bool) if masked else None

    def loss():
        return dk.multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend="triton")

    grads, most = most_allocated(lambda: torch.autograd.grad(loss(), (image, text, scale)))
    assert grads[1].is_contiguous(), "the gradient of a [N, K, D] tensor, not of the kernels' [K, N, D] view of it"
    extra = most - sum(g.numel() * g.element_size() for g in grads)
    print(f"{extra / 2**20:.0f} MB beyond inputs and gradients")
    assert extra <= 2**30 // part, f"{extra / 2**20:.0f} MB"


def test_partial_sums_of_all_launches_share_one_workspace(counted, monkeypatch):
    """N=4096, K=8 and 2 MB: the sums of 16 of the 32 column tiles at a time."""
    monkeypatch.setattr(settings, "workspace_bytes", 2**21)
    image, text = clip_like(4096, 8, 16, torch.bfloat16)
    _, most = most_allocated(lambda: dk.bidirectional_logsumexp(image, text.transpose(0, 1), 14.3, backend="triton"))
    assert 2**21 < most <= 1.75 * 2**21, f"{most / 2**20:.1f} MB"


@pytest.mark.parametrize("frozen", ["x", "y"])
def test_a_frozen_side_costs_no_product_and_no_buffer(counted, frozen):
    image, text = clip_like(8192, 2, 128, torch.bfloat16)
    y = text.transpose(0, 1)
    trained = (image if frozen == "y" else y).requires_grad_()

    def step():
        row, col = dk.bidirectional_logsumexp(image, y, 14.3, backend="triton")
        return torch.autograd.grad(row.sum() + col.sum(), trained)

    grads, most = most_allocated(step)
    assert counted.count("matmul") + counted.count("accumulate") == 1 and counted.count("finish_gradient") == 1
    assert len(grads) == 1
    with_both = most_allocated(lambda: both_gradients(image, y))[1]
    assert most < with_both - image.numel() * image.element_size(), "the gradient that nobody needs was allocated"


def both_gradients(image, y):
    inputs = [v.detach().requires_grad_() for v in (image, y)]
    row, col = dk.bidirectional_logsumexp(*inputs, 14.3, backend="triton")
    return torch.autograd.grad(row.sum() + col.sum(), inputs)


# In a process of its own: the suite's has the interpreter switched on. Nothing is compiled or launched; what would be
# compiled is told by the key that Triton looks its cache up with.
COMPILED = """
    import json, os
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Driver:
        get_current_device = lambda self: 0
        get_current_stream = lambda self, device: 0
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    keys = set()

    def run(self, *args, grid, warmup, **kwargs):
        _, _, _, _, binder = self.device_caches[0]
        _, specialization, options = binder(*args, **kwargs)
        keys.add(self.fn.__name__ + str(specialization) + str(options))

    jit.JITFunction.run = run
    import dreamlip_kernels as dk
    from dreamlip_kernels.ops.logsumexp import logsumexp_gradient_triton
    from dreamlip_kernels.ops.logsumexp import logsumexp_triton
    os.environ["TRITON_INTERPRET"] = "1"  # by which the dispatcher takes CPU tensors; kernels are decorated already

    def step(n, dtype, masked, k=3, d=32):
        image, text = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((n, d), (n, k, d)))
        mask = torch.ones(n, k, dtype=torch.bool) if masked else None
        scale = torch.tensor(14.3, requires_grad=True)
        loss = dk.multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend="triton")
        torch.autograd.grad(loss, (image, text, scale))
        return len(keys)

    counts = []
    for dtype in (torch.bfloat16, torch.float32):
        for masked in (False, True):
            keys.clear()
            first, second = step(96, dtype, masked), step(160, dtype, masked)
            counts.append([first, second, step(320, dtype, masked, k=5), step(97, dtype, masked)])
    print(json.dumps(counts))
"""


def test_few_kernels_are_compiled():
    """Six at a first step (eight were, nine more with a mask), none for other batches, one for the first ragged one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(COMPILED)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    for first, larger, more_slots, ragged in json.loads(run.stdout.splitlines()[-1]):
        assert first <= 6 and first == larger == more_slots and ragged <= first + 1, run.stdout
