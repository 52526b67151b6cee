"""The Gluon forward, compiled for sm_90 and executed on a CPU, against float64."""

import pytest
import torch
from ptx import FIRST_AHEAD, LAST_AHEAD, TOGETHER, device, shuffled

from dreamlip_kernels.ops.logsumexp import logsumexp_resident_triton as resident

LOG2E = 1.4426950408889634


def executed(x, y, scale, x_mask=None, y_mask=None, bands=1, tiles_a_launch=None, schedule=TOGETHER):
    """row [K, M] and col [K, C], in float64, of what the kernel wrote."""
    m, (k, c, _) = x.shape[0], y.shape
    tiles, row_tiles = -(-c // resident.BLOCK_C), -(-m // resident.BLOCK_M)
    band_rows = -(-row_tiles // bands) * resident.BLOCK_M
    columns = torch.empty(-(-m // band_rows) * 8, k, c)
    scale = torch.tensor(scale)
    row = 0
    with device(90, schedule=schedule):
        for first in range(0, tiles, tiles_a_launch or tiles):
            rows = torch.empty(k, min(tiles_a_launch or tiles, tiles - first), m)
            resident.launch(x, y, scale, scale, x_mask, y_mask, first, band_rows, rows, columns)
            row = row + rows.double().sum(1)
    bound = abs(float(scale)) * LOG2E
    offset = max(bound - 106, min(0.0, 82 - bound))
    return (row.log2() + offset) / LOG2E, (columns.double().sum(0).log2() + offset) / LOG2E


def expected(x, y, scale, x_mask=None, y_mask=None):
    z = scale * torch.einsum("md,kcd->kmc", x.double(), y.double())
    if x_mask is not None:
        z.masked_fill_(~x_mask[None, :, None], -torch.inf)
    if y_mask is not None:
        z.masked_fill_(~y_mask[:, None], -torch.inf)
    return z.logsumexp(2), z.logsumexp(1)


def features(m, k, c, d, dtype=torch.bfloat16, by_image=False):
    """Unit rows; by_image gives y [K, C, D] as a view of captions stored [C, K, D]."""
    x = torch.nn.functional.normalize(torch.randn(m, d), dim=-1).to(dtype)
    shape = (c, k, d) if by_image else (k, c, d)
    y = torch.nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype)
    return x, y.transpose(0, 1) if by_image else y


CASES = {
    "whole tiles": dict(sizes=(256, 1, 128, 128)),
    "ragged, two slots": dict(sizes=(200, 2, 150, 512)),
    "captions by image": dict(sizes=(130, 3, 140, 128), by_image=True),
    "float16, bands": dict(sizes=(400, 1, 128, 64), dtype=torch.float16, bands=3),
    "a tile a launch": dict(sizes=(64, 2, 300, 64), tiles_a_launch=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_sums(name, masked):
    case = dict(CASES[name])
    sizes, dtype, by_image = case.pop("sizes"), case.pop("dtype", torch.bfloat16), case.pop("by_image", False)
    x, y = features(*sizes, dtype, by_image)
    assert resident.takes(x, y, 90)
    masks = (torch.rand(sizes[0]) > 0.3, torch.rand(sizes[1], sizes[2]) > 0.3) if masked else (None, None)
    for got, gold in zip(executed(x, y, 20.0, *masks, **case), expected(x, y, 20.0, *masks), strict=True):
        torch.testing.assert_close(got, gold, atol=4e-6, rtol=0)


@pytest.mark.parametrize("schedule", [FIRST_AHEAD, LAST_AHEAD, shuffled(1)], ids=["first", "last", "shuffled"])
def test_any_order_of_warps(schedule):
    x, y = features(300, 1, 128, 192)
    for scale in (100.0, -20.0):
        mask = torch.rand(1, 128) > 0.3
        got = executed(x, y, scale, y_mask=mask, schedule=schedule)
        for a, b in zip(got, expected(x, y, scale, y_mask=mask), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_what_it_does_not_take():
    x, y = features(64, 2, 64, 128)
    assert not resident.takes(x, y, 80) and not resident.takes(x.float(), y.float(), 90)
    assert not resident.takes(*features(64, 2, 64, 72), 90) and not resident.takes(*features(64, 2, 64, 576), 90)
    assert not resident.takes(x, y.expand(2, 64, 128)[:1].expand(2, 64, 128), 90), "slots that share their memory"
