"""Multi-positive contrast: this package against the per-slot open_clip ClipLoss and the materialised oracle.

make bench        or        pytest benchmarks/bench_contrastive.py --benchmark-only --benchmark-group-by=param:shape,param:phase
"""

import pytest
import torch
from conftest import CONTRASTIVE_GPU_SHAPES, CONTRASTIVE_SHAPES, DEVICE, named

import dreamlip_kernels as dk
from dreamlip_kernels import reference


def open_clip_per_slot(image, text, scale):
    """What people run today: open_clip's ClipLoss for each slot."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return sum(loss(image, text[:, k], scale) for k in range(text.shape[1])) / text.shape[1]


PROVIDERS = {
    "dreamlip_kernels": dk.multi_positive_contrastive_loss,
    "open_clip per slot": open_clip_per_slot,
    "materialised": reference.multi_positive_contrastive_loss,
}


@pytest.mark.parametrize("shape", named(CONTRASTIVE_SHAPES, CONTRASTIVE_GPU_SHAPES))
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_contrastive(run, provider, phase, shape):
    n, k, d = shape
    image = torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE), dim=-1).requires_grad_()
    text = torch.nn.functional.normalize(image[:, None] + torch.randn(n, k, d, device=DEVICE) / d**0.5, dim=-1).detach().requires_grad_()
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)

    def step():
        loss = PROVIDERS[provider](image, text, scale)
        if phase != "forward":
            torch.autograd.grad(loss, (image, text, scale))

    try:
        run(step)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{provider} does not fit at {shape}")
