"""Defects planted into the compiled code, each of which the executor must catch:
by name, or by a result outside the bounds of the untouched code.
"""

import re

import pytest
import torch
from numerics import clip_like
from ptx import (
    FIRST_AHEAD,
    LAST_AHEAD,
    TOGETHER,
    AsyncHazard,
    BadOperand,
    Deadlock,
    Misaligned,
    OutOfBounds,
    PtxError,
    device,
)

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.ops.logsumexp.logsumexp_tiles import FINISH

M, C, K, D = 112, 144, 2, 80
SCALE = 14.3


EVERY, FIRST, LAST = slice(None), slice(0, 1), slice(-1, None)  # of the places where a pattern matches


def replaced(pattern, by, places=FIRST):
    """A mutation of PTX, at these of the places where the pattern matches; there must be one."""

    def mutate(text):
        chosen = list(re.finditer(pattern, text))[places]
        assert chosen, f"no such match of {pattern!r}"
        for m in reversed(chosen):
            text = text[: m.start()] + m.expand(by) + text[m.end() :]
        return text

    return mutate


@pytest.fixture(scope="module")
def problem():
    x, y = clip_like(C, K, D, torch.bfloat16)
    gen = torch.Generator().manual_seed(1)
    y_mask, x_mask = torch.rand(K, C, generator=gen) > 0.3, torch.rand(M, generator=gen) > 0.3
    x, y = x[:M], y.transpose(0, 1)
    return (
        x,
        y,
        y_mask,
        x_mask,
        reference.bidirectional_logsumexp(x.double(), y.double(), SCALE, x_mask=x_mask, y_mask=y_mask),
    )


def error(problem, capability, mutate=None, schedule=TOGETHER):
    """Of row and col, relative to the largest; infinite where a value isn't finite that should be, or where NaN sent
    everything to the exact kernels."""
    x, y, y_mask, x_mask, gold = problem
    change = mutate and (lambda kernel, text: mutate(text) if kernel == "exp_sums" else text)
    with device(capability, mutate=change, schedule=schedule) as launches:
        got = dk.bidirectional_logsumexp(x, y, SCALE, y_mask=y_mask, x_mask=x_mask, backend="triton")
    most = WITHOUT_PRODUCTS * (1 if schedule == TOGETHER else FINISH[2][2])  # warps apart, each counts
    if any(launch.kernel == "finish_sums" and launch.execution.instructions > most for launch in launches):
        return torch.inf
    worst = 0.0
    for value, wanted in zip(got, gold, strict=True):
        finite = torch.isfinite(wanted)
        if not torch.equal(torch.isfinite(value), finite):
            return torch.inf
        worst = max(worst, ((value - wanted)[finite].abs().max() / wanted[finite].abs().max()).item())
    return worst


WITHOUT_PRODUCTS = 1000  # instructions of a warp of finish_sums that recomputes nothing, at most
BOUND = 3e-6  # as test_contrast_executed.py's


def test_the_untouched_code_is_right(problem):
    assert all(error(problem, capability) <= BOUND for capability in (80, 90))


WAIT_LOOP = r"(try_wait\.parity\.shared\.b64 complete, \[%r\d+\]), (%r\d+)"
SWIZZLED = r"4611686293305294848"  # of a matrix descriptor: 128-byte swizzle, and the stride of its blocks

GLOBAL_STORE = r"(st\.global\.b32 \[ %rd\d+ \+) 0"
BOX_BYTES = r"(expect_tx.*?), 49152"  # of x 256 rows, of y 128, 64 columns each

# What is planted, by capability: pattern, replacement, places, and the error that it is caught by;
# or None for a result out
# of bounds.
DEFECTS = {
    80: {
        "a wait for copies lets more groups be under way": (r"(cp\.async\.wait_group\s+)\d", r"\g<1>4", EVERY, None),
        "another offset of a row of the tile": (
            r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0",
            r"\1 64",
            FIRST,
            None,
        ),
        "a matrix loaded one row further": (r"(ldmatrix.*?\[%r\d+\+)16384", r"\g<1>16448", FIRST, None),
        "a matrix loaded transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared", FIRST, None),
        "a store without its predicate": (r"@%p\d+ (st\.global)", r"\1", EVERY, OutOfBounds),
        "a load without its predicate": (r"@%p\d+ (ld\.global\.b8)", r"\1", EVERY, OutOfBounds),
        "stores one row further": (GLOBAL_STORE, r"\1 4", EVERY, OutOfBounds),
        "the mask is not read": (r"@%p\d+ ld\.global\.b8 \{ (%rs\d+) \}, \[[^]]*\]", r"mov.u16 \1, 1", EVERY, None),
        "no column is dropped": (r"0f7F800000, 0fFF800000", "0f00000000, 0f00000000", EVERY, None),
        "another function for exp2": (r"ex2\.approx(\.ftz)?\.f32", "neg.f32", FIRST, None),
        "lanes exchanged with others": (r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 1,", r"\1, 4,", FIRST, None),
        "a barrier for more threads than there are": (r"bar\.sync\s+0;", "bar.sync 0, 512;", FIRST, Deadlock),
    },
    90: {
        "the last products are not waited for": (r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 9", LAST, None),
        "no fence before products": (r"wgmma\.fence\.sync\.aligned;", "", EVERY, AsyncHazard),
        "no fence between stores and the products that read them": (r"fence\.proxy\.async\S*;", "", EVERY, AsyncHazard),
        "a descriptor of another swizzle": (SWIZZLED, "9223372105574252544", FIRST, None),
        "a descriptor that begins inside a block": (SWIZZLED, "4611686293305294864", FIRST, Misaligned),
        "a descriptor with reserved bits": (SWIZZLED, "4611756662049472512", FIRST, BadOperand),
        "a barrier is told of half the bytes": (BOX_BYTES, r"\1, 24576", EVERY, PtxError),
        "a barrier is told of two bytes more": (BOX_BYTES, r"\1, 49154", EVERY, Deadlock),
        "the other parity is waited for": (WAIT_LOOP, r"\1, 1", FIRST, PtxError),
        "all threads arrive where one should": (r"@%p\d+ (mbarrier\.arrive\.expect_tx)", r"\1", EVERY, BadOperand),
        "a box copied to where another belongs": (r"(add\.s32\s+%r\d+, %r\d+), 98304", r"\1, 0", FIRST, None),
        "a store far outside": (GLOBAL_STORE, r"\1 1048576", FIRST, OutOfBounds),
        "a store that is not aligned": (GLOBAL_STORE, r"\1 2", FIRST, Misaligned),
        "a barrier that some threads do not reach": (r"(bar\.sync\s+0;)", r"@%p1 \1", slice(5, 6), Deadlock),
    },
}


@pytest.mark.parametrize("capability, defect", [(cc, defect) for cc, defects in DEFECTS.items() for defect in defects])
def test_a_planted_defect_is_caught(problem, capability, defect):
    pattern, by, places, kind = DEFECTS[capability][defect]
    mutate = replaced(pattern, by, places)
    if kind is None:
        assert error(problem, capability, mutate) > 100 * BOUND
    else:
        with pytest.raises(kind):
            error(problem, capability, mutate)


@pytest.mark.ptx
@pytest.mark.parametrize("capability", [80, 90])
def test_missing_barriers_are_caught(problem, capability):
    """Without one barrier after the other. Triton places more of them than this shape needs, so not each must show;
    several
    do, in one order of warps or the other, and none in the untouched code."""
    pattern, texts, caught = r"bar\.sync\s+0;", [], set()
    assert error(problem, capability, lambda text: texts.append(text) or text, FIRST_AHEAD) <= BOUND
    for number in range(len(re.findall(pattern, texts[0]))):
        for schedule in (FIRST_AHEAD, LAST_AHEAD):
            try:
                if error(problem, capability, replaced(pattern, "", slice(number, number + 1)), schedule) > BOUND:
                    caught.add(number)
            except PtxError:
                caught.add(number)
    assert len(caught) >= 4, caught
