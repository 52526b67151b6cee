"""bidirectional_logsumexp against the float64 oracle: shapes, masks, strides, tiles and every finite input."""

import pytest
import torch
from numerics import assert_no_worse_than_torch, clip_like, three_ways, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.ops import tiles

# (M, C, K, D): one pair; tiny and odd; aligned; primes over tile edges; one of realistic shape.
SHAPES = [(1, 1, 1, 8), (3, 7, 2, 8), (64, 128, 3, 96), (127, 65, 8, 512), (252, 507, 3, 123), (256, 256, 8, 768)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of about 16 x 16, so that small inputs cross many tile edges."""
    monkeypatch.setattr(tiles, "TILE_LOGITS", {"cpu": 2**8})


@pytest.mark.parametrize("m, c, k, d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_logsumexp(m, c, k, d, dtype, scale):
    x, y = clip_like(max(m, c), k, d, dtype)
    x, y, s = x[:m], y[:c].transpose(0, 1), torch.tensor(scale)
    op = lambda x, y, s: dk.bidirectional_logsumexp(x, y, s)  # noqa: E731
    oracle = lambda x, y, s: reference.bidirectional_logsumexp(x, y, s.to(x.dtype))  # noqa: E731
    assert_no_worse_than_torch("row, col, dx, dy, dscale", *three_ways(op, oracle, (x, y, s)))


@pytest.mark.parametrize("masked", ["some", "slot", "all"])
def test_logsumexp_masks(small_tiles, masked):
    x, y = clip_like(37, 3, 16)
    y, s = y.transpose(0, 1), torch.tensor(14.3)
    gen = torch.Generator().manual_seed(1)
    y_mask, x_mask = torch.rand(3, 37, generator=gen) > 0.4, torch.rand(37, generator=gen) > 0.3
    if masked == "slot":
        y_mask[1] = False
    if masked == "all":
        y_mask[:] = False
    masks = dict(x_mask=x_mask, y_mask=y_mask)
    op = lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, **masks)  # noqa: E731
    oracle = lambda x, y, s: reference.bidirectional_logsumexp(x, y, s, **masks)  # noqa: E731
    if masked == "all":
        row, col, *grads = value_and_grads(op, (x, y, s))
        assert torch.isneginf(row).all() and torch.isneginf(col).all()
        assert all((g == 0).all() for g in grads)
    else:
        assert_no_worse_than_torch(masked, *three_ways(op, oracle, (x, y, s)))


@pytest.mark.parametrize("m, c, k, d", [(1, 1, 1, 8), (33, 70, 3, 12)])
def test_tiles_meet_without_seams(small_tiles, m, c, k, d):
    x, y = clip_like(max(m, c), k, d)
    x, y, s = x[:m], y[:c].transpose(0, 1), torch.tensor(14.3)
    assert_no_worse_than_torch(
        "tiles", *three_ways(dk.bidirectional_logsumexp, reference.bidirectional_logsumexp, (x, y, s))
    )


@pytest.mark.parametrize("case", ["anti-aligned at scale 100", "not normalized", "scale 1000", "scale 0"])
def test_any_finite_input_is_right(case):
    x, y = clip_like(24, 2, 32)
    scale = {"scale 1000": 1000.0, "anti-aligned at scale 100": 100.0, "scale 0": 0.0}.get(case, 3.0)
    if case.startswith("anti"):
        y = -x[:, None].expand(-1, 2, -1).roll(1, 0)
    if case == "not normalized":
        x, y = 40 * x, 7 * y
    y, s = y.transpose(0, 1), torch.tensor(scale)
    if case == "scale 0":  # dx is exactly 0 there, so only the rest can be compared
        got, low, gold = three_ways(dk.bidirectional_logsumexp, reference.bidirectional_logsumexp, (x, y, s))
        assert (got[2] == 0).all() and (got[3] == 0).all()
        return assert_no_worse_than_torch(case, *([v[i] for i in (0, 1, 4)] for v in (got, low, gold)))
    assert_no_worse_than_torch(
        case, *three_ways(dk.bidirectional_logsumexp, reference.bidirectional_logsumexp, (x, y, s))
    )


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset", "strided D"])
def test_any_strides(layout):
    x, y = clip_like(20, 3, 16)
    y = y.transpose(0, 1)
    if layout == "transposed":
        x = x.T.contiguous().T
    if layout == "expanded":
        y = y[:1].expand(3, -1, -1)
    if layout == "offset":
        x, y = torch.cat([x, x])[3:23], torch.cat([y, y], 1)[:, 5:25]
    if layout == "strided D":
        x, y = x.repeat_interleave(2, -1)[:, ::2], y.repeat_interleave(2, -1)[..., ::2]
    s = torch.tensor(14.3)
    upstream = torch.ones(()).expand(3, 20)  # stride 0
    row, col = dk.bidirectional_logsumexp(x.requires_grad_(), y.requires_grad_(), s)
    grads = torch.autograd.grad((row, col), (x, y), (upstream, upstream))
    gold_in = [t.detach().double().requires_grad_() for t in (x, y)]
    gold = torch.autograd.grad(reference.bidirectional_logsumexp(*gold_in, 14.3), gold_in, (upstream.double(),) * 2)
    for got, expected in zip(grads, gold, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_each_requires_grad_subset(needs):
    x, y = clip_like(9, 2, 8)
    y, s = y.transpose(0, 1), torch.tensor(5.0)
    inputs = [t.detach().requires_grad_(bool(n)) for t, n in zip((x, y, s), needs, strict=True)]
    total = lambda out: out[0].sum() + 2 * out[1].sum()  # noqa: E731
    wanted = [t for t in inputs if t.requires_grad]
    got = torch.autograd.grad(total(dk.bidirectional_logsumexp(*inputs)), wanted)
    expected = torch.autograd.grad(total(reference.bidirectional_logsumexp(*inputs)), wanted)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-4, rtol=1e-4)


def test_opcheck():
    x, y = clip_like(6, 2, 8)
    y, y_mask = y.transpose(0, 1), torch.ones(2, 6, dtype=torch.bool)
    scale = torch.tensor(3.0, requires_grad=True)
    for mask in (None, y_mask):
        for paired in (False, True):
            inputs = (x.clone().requires_grad_(), y.clone().requires_grad_(), scale)
            args = (*inputs, None, mask, paired, paired, "fp16", "torch")  # paired once with keep, once without
            torch.library.opcheck(torch.ops.dreamlip_kernels.bidirectional_logsumexp.default, args)
