"""The multi-positive sigmoid loss: this package's backends, open_clip's SigLipLoss and siglip-kernel for each slot.

    pytest benchmarks/bench_sigmoid.py --benchmark-only --benchmark-group-by=param:dtype,param:shape

The floor is 3 U, U = 2 N N K D operations at this run's own rate: one visit of each pair, two products for gradients.
"""

import importlib.util

import pytest
import torch
from shapes import DEVICE, named

import dreamlip_kernels as dk
from dreamlip_kernels.backends import dispatch


def ours(backend):
    return lambda image, text, scale, bias: dk.multi_positive_sigmoid_loss(image, text, scale, bias, backend=backend)


def per_slot(loss):
    """The mean over slots of a loss of single captions."""
    return lambda image, text, *rest: sum(loss(image, text[:, k], *rest) for k in range(text.shape[1])) / text.shape[1]


def open_clip_per_slot(image, text, scale, bias):
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return per_slot(lambda i, t, s, b: loss(i, t, s.to(i.dtype), b.to(i.dtype)))(image, text, scale, bias)


def siglip_kernel(image, text, scale, bias):
    from siglip_kernel import fused_siglip_loss

    return per_slot(lambda i, t, s, b: fused_siglip_loss(i, t.contiguous(), s.log(), b))(image, text, scale, bias)


PROVIDERS = {
    "torch": ours("torch"),
    "triton": ours("triton"),
    "open_clip per slot": open_clip_per_slot,
    "siglip-kernel": siglip_kernel,
}


def require(provider, image):
    """The provider's function, or a skip that says why it cannot run here."""
    why = None
    if provider in ("torch", "triton"):
        why = dispatch.why_not("sigmoid_pairs", provider, image)
        why = "Triton's interpreter is no benchmark" if DEVICE == "cpu" and provider == "triton" and not why else why
    elif provider == "siglip-kernel" and (DEVICE == "cpu" or importlib.util.find_spec("siglip_kernel") is None):
        why = "siglip-kernel needs a CUDA device and the benchmark extra (siglip-kernel)"
    elif provider == "open_clip per slot" and importlib.util.find_spec("open_clip") is None:
        why = "open_clip is not installed"
    if why:
        pytest.skip(why)
    return PROVIDERS[provider]


@pytest.mark.parametrize("shape", named({"N2048-K8-D512": (2048, 8, 512)}, {"N8192-K8-D512": (8192, 8, 512)})[-1:])
@pytest.mark.parametrize("dtype", ["bfloat16"] if DEVICE == "cuda" else ["float32"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_sigmoid(run, matmul_rate, provider, dtype, shape):
    n, k, d = shape
    image = torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
    text = torch.nn.functional.normalize(image[:, None] + torch.randn(n, k, d, device=DEVICE) / d**0.5, dim=-1)
    image, text = (v.to(getattr(torch, dtype)).requires_grad_() for v in (image, text))
    scale, bias = (torch.tensor(value, device=DEVICE, requires_grad=True) for value in (10.0, -10.0))
    loss = require(provider, image)
    inputs = (image, text, scale, bias)
    run(lambda: torch.autograd.grad(loss(*inputs), inputs), floor=3 * 2 * n * n * k * d / matmul_rate)
