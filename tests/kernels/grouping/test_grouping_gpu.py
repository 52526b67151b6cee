"""The grouping's kernels on a CUDA device: every dtype against the oracle, repeats to the bit, memory,
and graph capture. `make gpu` runs these.
"""

import pytest
import torch
from numerics import value_and_grads
from patch_cases import compare, region_like

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch

pytestmark = pytest.mark.gpu
SHAPES = [
    (1, 1, 1, 8),
    pytest.param(3, 49, 3, 96, marks=pytest.mark.sanitizer),
    (4, 196, 8, 512),
    (2, 197, 1, 768),
    (2, 25, 13, 37),
    (3, 256, 19, 1024),
    (2, 1024, 8, 512),
    (64, 196, 8, 512),
]


# All of one, then all of the other: Triton compiles for minutes, and the time on a device may end.
@pytest.fixture(scope="module", params=["cuda", "triton"])
def backend(request):
    why = dispatch.why_not("group_patches", request.param, torch.empty(1, device="cuda", dtype=torch.bfloat16))
    if why:
        pytest.skip(f"backend={request.param!r} cannot run here: {why}")
    return request.param


@pytest.mark.parametrize("n, p, k, d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_oracle(backend, n, p, k, d, dtype, normalization, masked):
    # Among so many softmax scores some always lie on 1 / P.
    options = dict(normalization=normalization, threshold=0.0 if normalization == "softmax" else None)
    patches, texts = (x.cuda() for x in region_like(n, p, k, d, dtype, **options))
    mask = (torch.rand(n, p) > 0.2).cuda() if masked and p > 1 else None
    op = lambda x, t: dk.group_patches(x, t, patch_mask=mask, backend=backend, **options)  # noqa: E731
    oracle = lambda x, t: reference.group_patches(x, t, patch_mask=mask, **options)  # noqa: E731
    if p == 1:
        op, oracle = (lambda x, f=f: f(x, texts.to(x.dtype)) for f in (op, oracle))
        return compare("pooled, dx", op, oracle, (patches,))
    compare("pooled, dx, dt", op, oracle, (patches, texts))


def test_the_same_bits_each_time(backend):
    patches, texts = (x.cuda() for x in region_like(64, 196, 8, 512, torch.bfloat16))
    runs = [value_and_grads(lambda x, t: dk.group_patches(x, t, backend=backend), (patches, texts)) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_extra_memory_at_the_full_shape(backend):
    """N=4096, P=196, K=8, D=512: beyond inputs, results and gradients under 64 MB."""
    n, p, k, d = 4096, 196, 8, 512
    patches = torch.randn(n, p, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    texts = torch.randn(n, k, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(texts)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pooled = dk.group_patches(patches, texts, backend=backend)
    grads = torch.autograd.grad(pooled, (patches, texts), upstream)
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in (pooled, *grads))
    extra = torch.cuda.max_memory_allocated() - before - kept
    assert extra < 64 * 2**20, f"{extra / 2**20:.0f} MB"


def test_graph_capture(backend):
    patches, texts = (x.cuda() for x in region_like(8, 49, 4, 64, torch.bfloat16))
    expected = dk.group_patches(patches, texts, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dk.group_patches(patches, texts, backend=backend)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
