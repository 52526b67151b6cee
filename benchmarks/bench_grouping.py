"""Patch grouping at the patch grids of ViT-B/32 and B/16: eager torch (the oracle), torch.compile of it,
and every backend that can run here.

make bench        or pytest benchmarks/bench_grouping.py --benchmark-only
                  --benchmark-group-by=param:shape,param:dtype,param:phase

Beside the times the summary gives each one's share of the floor: the bytes that must move (patches read once forward;
read once and written once backward) at the same run's copy rate.
"""

import pytest
import torch
from shapes import DEVICE, GROUPING_GPU_SHAPES, GROUPING_SHAPES, named

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch

BACKENDS = ("cpp", "torch", "triton", "cuda")
DTYPES = (
    {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if DEVICE == "cpu"
    else {"bfloat16": torch.bfloat16, "float32": torch.float32}
)


def provider(name, dtype):
    """The function to time, or a skip that says why it can't run here."""
    if name == "eager":
        return reference.group_patches
    if name == "compile":
        return torch.compile(reference.group_patches)
    why = dispatch.why_not("group_patches", name, torch.empty(1, device=DEVICE, dtype=dtype))
    if why:
        pytest.skip(why)
    return lambda x, t: dk.group_patches(x, t, backend=name)


@pytest.mark.parametrize("shape", named(GROUPING_SHAPES, GROUPING_GPU_SHAPES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", ["eager", "compile", *BACKENDS])
def test_grouping(run, copy_rate, name, phase, dtype, shape):
    n, p, k, d = shape
    function = provider(name, DTYPES[dtype])
    patches = torch.randn(n, p, d, device=DEVICE, dtype=DTYPES[dtype], requires_grad=True)
    texts = torch.randn(n, k, d, device=DEVICE, dtype=DTYPES[dtype], requires_grad=True)
    upstream = torch.randn(n, k, d, device=DEVICE, dtype=DTYPES[dtype])

    def step():
        if phase == "forward":
            with torch.no_grad():
                function(patches, texts)
        else:
            torch.autograd.grad(function(patches, texts), (patches, texts), upstream)

    passes = 1 if phase == "forward" else 3
    run(step, floor=passes * patches.numel() * patches.element_size() / copy_rate, rounds=21)
