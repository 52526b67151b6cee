"""The contrast's CUDA kernels without a GPU: csrc/logsumexp.cuh compiled for the CPU, every thread a fiber,
against float64.

It shows that indices, fragments, waits and barriers fit together; what only a device can show is in
test_contrastive_gpu.py.
"""

import pytest
import torch
from emulated_logsumexp import EmulatedOps
from emulation import needs_emulation

LOG2E = 1.4426950408889634
NO_IMAGES = (None, None)
pytestmark = needs_emulation


@pytest.fixture(scope="module")
def ops():
    return EmulatedOps()


def unit(*shape, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=gen), dim=-1).to(dtype)


def case(m, c, k, d, dtype, masked, scale=20.0):
    """x, y, masks, exponent, and z = scale * x . y in powers of two [K, M, C] in float64, -inf where masked.

    A row has as many bytes in each dtype, that is as many stages: ``d`` is for 16 bits.
    """
    d = -(-d // 2) if dtype == torch.float32 else d
    x, y = unit(m, d, dtype=dtype, seed=1), unit(k, c, d, dtype=dtype, seed=2)
    gen = torch.Generator().manual_seed(3)
    x_mask = torch.rand(m, generator=gen) > 0.3 if masked else None
    y_mask = torch.rand(k, c, generator=gen) > 0.3 if masked else None
    exponent = torch.tensor(scale), torch.tensor(scale)
    z = scale * LOG2E * torch.einsum("md,kcd->kmc", x.double(), y.double())
    if masked:
        z = z.masked_fill(~y_mask[:, None, :], -torch.inf).masked_fill(~x_mask[None, :, None], -torch.inf)
        x[~x_mask], y[~y_mask] = torch.nan, torch.inf  # whatever a dropped row holds
    return x, y, x_mask, y_mask, exponent, z


def offset(scale):
    """Exponent::offset, docs/math.md section 5."""
    bound = abs(float(scale)) * LOG2E
    return max(bound - 106, min(0.0, 82 - bound))


# M, C, K, D: less than a tile and one element of depth; ragged on every side, several slots and stages; whole tiles.
SHAPES = [(1, 1, 1, 8), (130, 7, 2, 40), (70, 260, 2, 136), (256, 128, 1, 64)]


@pytest.mark.parametrize("m, c, k, d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_exp_sums(ops, m, c, k, d, dtype, masked):
    x, y, x_mask, y_mask, exponent, z = case(m, c, k, d, dtype, masked)
    e = torch.exp2(z - offset(exponent[0]))
    tiles = -(-c // 128)
    row, col = torch.full((k, tiles, m), torch.nan), torch.full((-(-m // 128), k, c), torch.nan)
    ops.logsumexp_sums(x, y, x_mask, y_mask, *NO_IMAGES, *exponent, 0, 128, row, col)
    torch.testing.assert_close(row.sum(1).double(), e.sum(2), rtol=2e-5, atol=0)
    torch.testing.assert_close(col.sum(0).double(), e.sum(1), rtol=2e-5, atol=0)
    if tiles > 1:  # a part of the tiles, in one band of all rows
        part, whole = torch.full((k, 1, m), torch.nan), torch.full((1, k, c), torch.nan)
        ops.logsumexp_sums(x, y, x_mask, y_mask, *NO_IMAGES, *exponent, 1, 256, part, whole)
        assert torch.equal(part[:, 0], row[:, 1]) and whole[0, :, :128].isnan().all()
        torch.testing.assert_close(whole[0, :, 128:256], col.sum(0)[:, 128:256])


@pytest.mark.parametrize("m, c, k, d", SHAPES)
@pytest.mark.parametrize(
    "dtype, masked, scale",
    [
        (torch.bfloat16, False, 20.0),
        (torch.bfloat16, True, 2000.0),
        (torch.float32, True, -30.0),
        (torch.float16, True, 0.0),
    ],
)
def test_finish(ops, m, c, k, d, dtype, masked, scale):
    """Logarithms of parts that are in range are those of their sum, whatever the features;
    else the features are read again.
    """
    x, y, x_mask, y_mask, exponent, z = case(m, c, k, d, dtype, masked, scale)
    if scale == 0:
        z = z.nan_to_num(0.0, neginf=-torch.inf)
    for columns, dim, n, mask in ((False, 2, m, x_mask), (True, 1, c, y_mask)):
        top = z.amax(dim, keepdim=True).nan_to_num(0.0, neginf=0.0)
        gold = (torch.exp2(z - top).sum(dim).log2() + top.squeeze(dim)) / LOG2E
        parts = torch.rand(3, k, n).transpose(0, 1) + 0.5
        out = torch.full((k, n), torch.nan)
        ops.logsumexp_finish(x, y, x_mask, y_mask, *NO_IMAGES, *exponent, parts, columns, out)
        expected = (parts.double().sum(1).log2() + offset(scale)) / LOG2E
        expected = expected if mask is None else expected.masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        for bad in (0.0, torch.inf):
            ops.logsumexp_finish(x, y, x_mask, y_mask, *NO_IMAGES, *exponent, parts.fill_(bad), columns, out)
            torch.testing.assert_close(out.double(), gold, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("m, c, k, d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "masked, exact, diagonal, pad", [(False, False, None, 0), (True, False, 3, 1), (True, True, -2, 0)]
)
def test_gradient(ops, m, c, k, d, dtype, masked, exact, diagonal, pad):
    """G of a chunk that begins inside the rectangle, into rows that need not be whole pieces of 16 bytes."""
    x, y, x_mask, y_mask, exponent, z = case(m, c, k, d, dtype, masked)
    a, b, row, col = (torch.rand(k, n, generator=torch.Generator().manual_seed(n)) for n in (m, c, m, c))
    a, b = 1000 * a, 1000 * b  # as the common factor does it: float16's denormals are out of the way
    scaled = [v * torch.exp2(offset(exponent[0]) - log) for v, log in ((a, 10 + row), (b, 10 + col))]
    rows, cols = torch.stack([scaled[0], 10 + row, a]), torch.stack([scaled[1], 10 + col, b])
    gold = torch.exp2(z - 10 - row[:, :, None]) * a[:, :, None] + torch.exp2(z - 10 - col[:, None, :]) * b[:, None, :]
    if diagonal is not None:
        gold[:, (torch.arange(m)[:, None] == torch.arange(c)[None] + diagonal)] = 0
    first_row, first_col, first_slot = min(m - 1, 2), min(c - 1, 3), k - 1
    for at in ((0, 0, 0), (first_row, first_col, first_slot)):
        shape = (k - at[2], m - at[0], c - at[1])
        buffer = torch.full((shape[0], shape[1], -(-shape[2] // 8) * 8 + pad), torch.nan, dtype=dtype)
        g = buffer[..., : shape[2]]
        ops.logsumexp_gradient(
            x, y, x_mask, y_mask, *NO_IMAGES, *exponent, torch.tensor([int(exact)]), rows, cols, *at, diagonal, g
        )
        expected = gold[at[2] :, at[0] :, at[1] :]
        eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-5}[dtype]
        torch.testing.assert_close(g.double(), expected, rtol=eps, atol=2e-5 * float(gold.max()) + 1e-7)
        assert buffer[..., shape[2] :].isnan().all(), "written beyond the chunk"
