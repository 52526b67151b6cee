"""The torch backend of the sigmoid loss as it is on CUDA: 16-bit features multiplied as they are, with float32 sums."""

from types import SimpleNamespace

import pytest
import torch
from numerics import clip_like, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.ops import products, tiles
from dreamlip_kernels.ops.sigmoid_pairs import sigmoid_pairs_torch

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture
def multiplied(monkeypatch):
    """As on CUDA; the dtypes of what is multiplied."""
    dtypes = []

    def matmul(a, b, out=None):
        dtypes.extend((a.dtype, b.dtype))
        return products.matmul(a, b, out)

    def accumulate(out, a, b):
        dtypes.extend((a.dtype, b.dtype))
        products.accumulate(out, a, b)

    monkeypatch.setattr(tiles, "TILE_LOGITS", {"cpu": 2**8})
    monkeypatch.setattr(sigmoid_pairs_torch, "multiplies_sixteen_bit", lambda v: v.dtype in products.SIXTEEN_BIT)
    monkeypatch.setattr(sigmoid_pairs_torch, "matmul", matmul)
    monkeypatch.setattr(sigmoid_pairs_torch, "accumulate", accumulate)
    return dtypes


def options_of(case, n, k):
    gen = torch.Generator().manual_seed(3)
    if case == "masks":
        return dict(image_mask=torch.rand(n, generator=gen) > 0.2, text_mask=torch.rand(n, k, generator=gen) > 0.3)
    return {} if case == "plain" else dict(image_ids=torch.arange(n) * 7 % (n // 2), same_image=case)


@pytest.mark.parametrize("case", ["plain", "masks", "ignore", "positive"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("n, k, d", [(1, 1, 8), (37, 5, 96)])
def test_sixteen_bit_products(multiplied, n, k, d, dtype, case):
    """They were widened first: float32 products, eight times as slow on an H100, and a float32 copy of all features."""
    if n == 1 and case != "plain":
        pytest.skip("one image has no other")
    inputs = (*clip_like(n, k, d, dtype), torch.tensor(14.3), torch.tensor(-4.0))
    options = options_of(case, n, k)
    got = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, backend="torch", **options), inputs)
    inputs64 = [v.double() for v in inputs]
    gold = value_and_grads(lambda *i: reference.multi_positive_sigmoid_loss(*i, **options), inputs64)
    assert set(multiplied) == {dtype}
    for number, (a, b) in enumerate(zip(got, gold, strict=True)):
        bound = ROUNDING[dtype] if number in (1, 2) else ROUNDING[dtype] / 16  # of features' gradients, and of sums
        assert (a.double() - b).norm() <= bound * b.norm(), number


def test_an_images_own_pairs_are_added_in_float32(multiplied):
    """Among confident negatives they are nearly the whole gradient, and are rounded once, to the features' type."""
    inputs = (*clip_like(24, 2, 32, torch.bfloat16), torch.tensor(1.0), torch.tensor(-12.0))
    got = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, backend="torch"), inputs)
    gold = value_and_grads(lambda *i: reference.multi_positive_sigmoid_loss(*i), [v.double() for v in inputs])
    for a, b in zip(got[1:3], gold[1:3], strict=True):
        once = b.to(torch.bfloat16).double()
        assert (a.double() - b).norm() <= 1.05 * (once - b).norm()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_frozen_sides(multiplied, needs):
    image, text = clip_like(20, 3, 16, torch.bfloat16)
    image, text = image.requires_grad_(needs[0]), text.requires_grad_(needs[1])
    numbers = [torch.tensor(v, requires_grad=True) for v in (14.3, -4.0)]
    wanted = [v for v in (image, text, *numbers) if v.requires_grad]
    got = torch.autograd.grad(dk.multi_positive_sigmoid_loss(image, text, *numbers, backend="torch"), wanted)
    inputs64 = [v.detach().double().requires_grad_(v.requires_grad) for v in (image, text, *numbers)]
    loss = reference.multi_positive_sigmoid_loss(*inputs64)
    for a, b in zip(got, torch.autograd.grad(loss, [v for v in inputs64 if v.requires_grad]), strict=True):
        assert (a.double() - b).norm() <= 2**-8 * b.norm()


def test_a_torch_without_such_products_widens_them(monkeypatch):
    """Not every torch from 2.6 on has mm and addmm of 16-bit operands into float32; the torch backend asked all of them
    for it."""
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "ADDS_SIXTEEN_BIT_PRODUCTS", True)
    assert products.multiplies_sixteen_bit(on_a_gpu)
    monkeypatch.setattr(dispatch, "ADDS_SIXTEEN_BIT_PRODUCTS", False)
    assert not products.multiplies_sixteen_bit(on_a_gpu)
