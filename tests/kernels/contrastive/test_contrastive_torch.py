"""What the torch backend of the contrast does beside being right: pairs kept from forward to backward,
16-bit products.
"""

import time

import contrast_promises as promises
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse_than_torch, clip_like, three_ways, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops import products, tiles
from dreamlip_kernels.ops.logsumexp.logsumexp import logsumexp_torch


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of about 16 x 16, so that small inputs cross many tile edges."""
    monkeypatch.setattr(tiles, "TILE_LOGITS", {"cpu": 2**8})


@pytest.fixture
def products_made(monkeypatch):
    """The list of matrix products that are made, by the rows and columns of their results."""
    made = []

    def matmul(a, b, out=None):
        made.append((a.shape[0], b.shape[1]))
        return products.matmul(a, b, out)

    def accumulate(out, a, b):
        made.append(tuple(out.shape))
        products.accumulate(out, a, b)

    monkeypatch.setattr(logsumexp_torch, "matmul", matmul)
    monkeypatch.setattr(logsumexp_torch, "accumulate", accumulate)
    return made


def logsumexp_of(**masks):
    return lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, backend="torch", **masks)


@pytest.mark.parametrize("scale", [0.0, 14.3, -60.0, 70.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_kept_pairs_are_as_right_as_pairs_computed_again(small_tiles, monkeypatch, scale, masked):
    x, y = clip_like(37, 3, 16)
    gen = torch.Generator().manual_seed(1)
    y_mask, x_mask = torch.rand(3, 37, generator=gen) > 0.4, torch.rand(37, generator=gen) > 0.3
    masks = dict(x_mask=x_mask, y_mask=y_mask) if masked else {}
    inputs = (x, y.transpose(0, 1), torch.tensor(scale))
    got, low, gold = three_ways(
        logsumexp_of(**masks), lambda x, y, s: reference.bidirectional_logsumexp(x, y, s, **masks), inputs
    )
    if scale == 0:  # dx and dy are exactly 0 there
        got, low, gold = ([v[i] for i in (0, 1, 4)] for v in (got, low, gold))
    assert_no_worse_than_torch("kept", got, low, gold)
    monkeypatch.setattr(settings, "workspace_bytes", 2**10)
    again = value_and_grads(logsumexp_of(**masks), inputs)
    assert_no_worse_than_torch("again", [again[i] for i in (0, 1, 4)] if scale == 0 else again, low, gold)


def test_three_products_where_the_pairs_fit_and_four_where_not(products_made, monkeypatch):
    """Decided by size alone; and one less, where a side needs no gradient."""
    x, y = clip_like(32, 2, 16)
    inputs = (x, y.transpose(0, 1), torch.tensor(14.3))
    value_and_grads(logsumexp_of(), inputs)
    assert len(products_made) == 2 * 3
    monkeypatch.setattr(settings, "workspace_bytes", 32 * 32 * 2 * 4 - 1)
    products_made.clear()
    value_and_grads(logsumexp_of(), inputs)
    assert len(products_made) == 2 * 4
    monkeypatch.setattr(settings, "workspace_bytes", 32 * 32 * 2 * 4)
    for frozen in range(2):
        products_made.clear()
        trained = [v.requires_grad_(i != frozen) for i, v in enumerate(v.detach() for v in inputs[:2])]
        row, col = dk.bidirectional_logsumexp(*trained, 14.3, backend="torch")
        torch.autograd.grad(row.sum() + col.sum(), trained[1 - frozen])
        assert len(products_made) == 2 * 2
    with torch.no_grad():
        products_made.clear()
        dk.bidirectional_logsumexp(*inputs[:2], 14.3, backend="torch")
        assert len(products_made) == 2


@pytest.mark.parametrize("case", ["opposed", "not normalized", "a whole slot masked"])
def test_sums_out_of_range_are_computed_again(small_tiles, case):
    """Where exp(z - offset) can't hold a row, forward and backward both leave what was kept."""
    x, y = clip_like(24, 2, 32)
    y, y_mask, scale = y.transpose(0, 1).contiguous(), None, 100.0
    if case == "opposed":
        y = -x[None].expand(2, -1, -1).roll(1, 1).contiguous()
    if case == "not normalized":
        x, y, scale = 40 * x, 7 * y, 3.0
    if case == "a whole slot masked":
        y_mask = torch.tensor([[True], [False]]).expand(2, 24)
    inputs = (x, y, torch.tensor(scale))
    oracle = lambda x, y, s: reference.bidirectional_logsumexp(x, y, s, y_mask=y_mask)  # noqa: E731
    assert_no_worse_than_torch(case, *three_ways(logsumexp_of(y_mask=y_mask), oracle, inputs))


def test_backward_twice_gives_the_same_bits():
    """What is kept is read, not overwritten."""
    inputs = [v.requires_grad_() for v in (*clip_like(40, 3, 16), torch.tensor(14.3))]
    loss = dk.multi_positive_contrastive_loss(*inputs, backend="torch")
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def sixteen_bit_products(monkeypatch):
    """As on CUDA: features of 16 bits are multiplied as they are, G is rounded to their type."""

    def narrow(v):
        return v.dtype in products.SIXTEEN_BIT

    monkeypatch.setattr(logsumexp_torch, "multiplies_sixteen_bit", narrow)
    monkeypatch.setattr("dreamlip_kernels.ops.logsumexp.logsumexp._keeps_pairs", lambda *_: False)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
@pytest.mark.parametrize("masked", [False, True])
def test_rounded_gradients_keep_positives_apart(small_tiles, sixteen_bit_products, dtype, rounding, masked):
    """Nearly certain positives have p - 1 far below a 16-bit step at 1: their whole gradient is added in float32."""
    mask = torch.rand(48, 2, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    inputs = (*clip_like(48, 2, 32, dtype, noise=0.6), torch.tensor(20.0))
    # A hundredfold loss, so that no gradient is below what float16 holds normally.
    ours = lambda *i: 100 * dk.multi_positive_contrastive_loss(*i, text_mask=mask, backend="torch")  # noqa: E731
    oracle = lambda *i: 100 * reference.multi_positive_contrastive_loss(*i, text_mask=mask)  # noqa: E731
    got, gold = value_and_grads(ours, inputs), value_and_grads(oracle, [v.double() for v in inputs])
    for g, e in zip(got[1:3], gold[1:3], strict=True):
        assert (g.double() - e).norm() <= rounding * e.norm()
    assert abs(got[0] - gold[0]) <= 1e-3 and abs(got[3] - gold[3]) <= 2e-2 * abs(gold[3]) + 1e-3


def test_the_largest_coefficients_fit_float16(sixteen_bit_products):
    promises.largest_upstream_fits_float16("torch", torch.device("cpu"))


def test_nothing_of_sixteen_bits_is_widened(sixteen_bit_products, monkeypatch):
    """float32 products of widened features took a second at N=32768, K=8 where these take a few hundredths."""
    dtypes = set()

    def noting(product):
        def multiply(*args, **kwargs):
            dtypes.update(v.dtype for v in [*args[-2:], kwargs.get("a"), kwargs.get("b")] if v is not None)
            return product(*args, **kwargs)

        return multiply

    for name in ("matmul", "accumulate"):
        monkeypatch.setattr(logsumexp_torch, name, noting(getattr(products, name)))
    x, y = clip_like(40, 3, 16, torch.bfloat16)
    value_and_grads(logsumexp_of(), (x, y.transpose(0, 1), torch.tensor(14.3)))
    assert dtypes == {torch.bfloat16}


def test_no_slower_than_code_that_keeps_all_logits():
    """N=512, K=8, D=512, forward and backward, in one thread (ours takes about 0.6 of the time)."""
    image, text = clip_like(512, 8, 512)
    labels = torch.arange(512)

    def eager(image, text, scale):
        z = scale * torch.einsum("nd,mkd->knm", image, text)
        return sum(F.cross_entropy(z[k], labels) + F.cross_entropy(z[k].T, labels) for k in range(8)) / 16

    def seconds(fn):
        start = time.process_time()
        value_and_grads(fn, (image, text, torch.tensor(14.3)))
        return time.process_time() - start

    torch.use_deterministic_algorithms(False)  # its NaN filling of empties is the suite's, not the user's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = lambda *i: dk.multi_positive_contrastive_loss(*i, backend="torch")  # noqa: E731
    pairs = [(seconds(ours), seconds(eager)) for _ in range(3)]
    torch.set_num_threads(threads)
    fastest, theirs = (min(times) for times in zip(*pairs, strict=True))
    assert fastest <= theirs, f"ours {fastest:.3f} s, eager {theirs:.3f} s"
