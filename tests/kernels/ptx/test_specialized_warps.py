"""A kernel of specialized warps, executed: registers that change hands, named barriers, a copying warp that runs
ahead, and what goes wrong without its barriers.
"""

import re

import pytest
import torch
from ptx import FIRST_AHEAD, LAST_AHEAD, TOGETHER, Deadlock, PtxError, device


def run(schedule=TOGETHER, mutate=None, m=50, steps=5):
    from ptx.specialized_kernel import products
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block, depth = 64, 64
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, steps * depth, generator=gen).bfloat16() for n in (m, block))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_map, y_map = (TensorDescriptor(v, list(v.shape), list(v.stride()), [block, depth], layout) for v in (x, y))
    out = torch.full((m, block), torch.nan)
    with device(90, schedule=schedule, mutate=mutate and (lambda _, text: mutate(text))) as launches:
        products[(1,)](x_map, y_map, out, m, steps, BLOCK=block, DEPTH=depth, STAGES=2, num_warps=4)
    return out, x.double() @ y.double().T, launches[0].compiled.ptx


@pytest.mark.parametrize("schedule", [TOGETHER, FIRST_AHEAD, LAST_AHEAD], ids=str)
def test_specialized_warps(schedule):
    out, gold, text = run(schedule)
    assert all(instruction in text for instruction in ("setmaxnreg", "elect.sync", "barrier.sync", "wgmma.mma_async"))
    torch.testing.assert_close(out.double(), gold, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "pattern, by, kind",
    [
        (r"(expect_tx\S* _, \[%r\d+\]), 16384", r"\1, 16386", Deadlock),
        (r"(expect_tx\S* _, \[%r\d+\]), 16384", r"\1, 8192", PtxError),
        (r"@\S+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\](, 1)?;", "", Deadlock),
        (r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), 1;", r"\1, 2;", Deadlock),
    ],
    ids=["too many bytes", "too few bytes", "nothing is given back", "one arrival too many is waited for"],
)
def test_what_goes_wrong_without_its_barriers(pattern, by, kind):
    def mutate(text):
        assert re.search(pattern, text), text
        return re.sub(pattern, by, text)

    with pytest.raises(kind):
        out, gold, _ = run(mutate=mutate)
        if not torch.allclose(out.double(), gold, atol=1e-4, rtol=1e-5):
            raise PtxError("wrong results")
