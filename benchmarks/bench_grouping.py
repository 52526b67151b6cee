"""Patch grouping: this package against eager torch (the oracle), at the patch grids of ViT-B/32 and B/16.

make bench        or        pytest benchmarks/bench_grouping.py --benchmark-only --benchmark-group-by=param:shape,param:phase
"""

import pytest
import torch
from conftest import DEVICE, GROUPING_GPU_SHAPES, GROUPING_SHAPES, named

import dreamlip_kernels as dk
from dreamlip_kernels import reference

PROVIDERS = {"dreamlip_kernels": dk.group_patches, "eager": reference.group_patches}


@pytest.mark.parametrize("shape", named(GROUPING_SHAPES, GROUPING_GPU_SHAPES))
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_grouping(run, provider, phase, shape):
    n, p, k, d = shape
    patches = torch.randn(n, p, d, device=DEVICE, requires_grad=True)
    texts = torch.randn(n, k, d, device=DEVICE, requires_grad=True)
    upstream = torch.randn(n, k, d, device=DEVICE)

    def step():
        pooled = PROVIDERS[provider](patches, texts)
        if phase != "forward":
            torch.autograd.grad(pooled, (patches, texts), upstream)

    run(step)
