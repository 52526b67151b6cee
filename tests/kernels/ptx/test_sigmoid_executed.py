"""The sigmoid loss's compiled code, executed: what the shipped launcher launches on sm_80 and 90, run on a CPU against
the float64 oracle.
"""

import pytest
import torch
from numerics import clip_like, value_and_grads
from ptx import device
from ptx.cases import cases

import dreamlip_kernels as dk
from dreamlip_kernels import reference


@pytest.mark.parametrize(
    "capability, same_image", cases({(80, "ignore"), (90, "positive")}, (80, 90), ("none", "ignore", "positive"))
)
def test_the_loss_and_its_gradients(capability, same_image):
    """144 captions of 48 images: ragged tiles, masks, numbers of images compared in them."""
    n, k, d = 48, 3, 40
    gen = torch.Generator().manual_seed(1)
    options = dict(image_mask=torch.rand(n, generator=gen) > 0.2, text_mask=torch.rand(n, k, generator=gen) > 0.3)
    if same_image != "none":
        options |= dict(image_ids=torch.arange(n) * 5 % 31, same_image=same_image)
    inputs = (*clip_like(n, k, d, torch.float16), torch.tensor(14.3), torch.tensor(-7.0))
    with device(capability) as launches:
        got = value_and_grads(lambda *v: dk.multi_positive_sigmoid_loss(*v, backend="triton", **options), inputs)
    assert [launch.kernel for launch in launches] == ["sigmoid_tile"]
    gold = value_and_grads(
        lambda *v: reference.multi_positive_sigmoid_loss(*v, **options), [v.double() for v in inputs]
    )
    for name, value, wanted in zip(("loss", "dx", "dy", "dscale", "dbias"), got, gold, strict=True):
        error, largest = (value.double() - wanted).abs().max().item(), wanted.abs().max().item()
        assert error <= 2**-9 * largest, f"{name}: error {error:.2e} of {largest:.2e}"
