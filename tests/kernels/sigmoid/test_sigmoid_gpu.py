"""The sigmoid loss's backends on a CUDA device against the oracle in float64, and the same bits each time.
`make gpu` runs these.
"""

import pytest
import torch
from numerics import clip_like, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference

pytestmark = pytest.mark.gpu


def case(n, k, d, dtype):
    image, text = (v.cuda() for v in clip_like(n, k, d, dtype))
    return image, text, torch.tensor(14.3, device="cuda"), torch.tensor(-10.0, device="cuda")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("n, k, d", [(1, 1, 8), (37, 5, 24), (300, 3, 123), (512, 8, 512), (1000, 2, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_oracle(backend, n, k, d, dtype, masked):
    mask = (torch.rand(n, k, generator=torch.Generator().manual_seed(0)) > 0.3).cuda() if masked and n > 1 else None
    inputs = case(n, k, d, dtype)
    got = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, text_mask=mask, backend=backend), inputs)
    gold = value_and_grads(
        lambda *i: reference.multi_positive_sigmoid_loss(*i, text_mask=mask), [v.double() for v in inputs]
    )
    bound = 2**-7 if dtype == torch.bfloat16 else 4e-3 if dtype == torch.float16 else 1e-4
    for name, g, e in zip(("loss", "d_image", "d_text", "d_scale", "d_bias"), got, gold, strict=True):
        assert (g.double() - e).norm() <= bound * e.norm(), f"{name}: {((g.double() - e).norm() / e.norm()).item():.2e}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_same_bits_each_time(backend):
    inputs = case(700, 8, 512, torch.bfloat16)
    op = lambda *i: dk.multi_positive_sigmoid_loss(*i, backend=backend)  # noqa: E731
    runs = [value_and_grads(op, inputs) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
