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

M, C, K, D = 112, 144, 2, 80
SCALE = 14.3


def replaced(pattern, by, which=0, count=1):
    """A mutation of PTX: ``count`` matches of the pattern from number ``which`` on, of which there must be as many."""

    def mutate(text):
        matches = list(re.finditer(pattern, text))
        chosen = matches[which : which + count] if which >= 0 else matches[which:]
        assert chosen, f"no match number {which} of {pattern!r} among {len(matches)}"
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
    return x, y, y_mask, x_mask, reference.bidirectional_logsumexp(x.double(), y.double(), SCALE, y_mask, x_mask)


def error(problem, capability, mutate=None, schedule=TOGETHER):
    """Of row and col, relative to the largest; infinite where a value isn't finite that should be, or where NaN sent
    everything to the exact kernels."""
    x, y, y_mask, x_mask, gold = problem
    change = mutate and (lambda kernel, text: mutate(text) if kernel == "exp_sums" else text)
    with device(capability, mutate=change, schedule=schedule) as launches:
        got = dk.bidirectional_logsumexp(x, y, SCALE, y_mask=y_mask, x_mask=x_mask, backend="triton")
    if any(launch.kernel == "online_rows" and launch.execution.instructions > 100 for launch in launches):
        return torch.inf
    worst = 0.0
    for value, wanted in zip(got, gold, strict=True):
        finite = torch.isfinite(wanted)
        if not torch.equal(torch.isfinite(value), finite):
            return torch.inf
        worst = max(worst, ((value - wanted)[finite].abs().max() / wanted[finite].abs().max()).item())
    return worst


BOUND = 3e-6  # as test_contrast_executed.py's


def test_the_untouched_code_is_right(problem):
    assert all(error(problem, capability) <= BOUND for capability in (80, 90))


WAIT_LOOP = r"(try_wait\.parity\.shared\.b64 complete, \[%r\d+\]), (%r\d+)"
SWIZZLED = r"4611686293305294848"  # of a matrix descriptor: 128-byte swizzle, and the stride of its blocks

# What is planted: capability, mutation, schedule, and the error by which it is caught, or None for a result out of
# bounds.
DEFECTS = {
    "a wait for copies lets two groups more be under way": (
        80, replaced(r"(cp\.async\.wait_group\s+)\d", r"\g<1>4", count=9), TOGETHER, None),
    "the last products are not waited for": (
        90, replaced(r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 9", -1), TOGETHER, None),
    "no fence before the first product": (90, replaced(r"wgmma\.fence\.sync\.aligned;", "", count=9), TOGETHER, AsyncHazard),
    "no fence between stores and products that read them": (
        90, replaced(r"fence\.proxy\.async\.shared::cta;", "", count=9), TOGETHER, AsyncHazard),
    "a descriptor of another swizzle": (90, replaced(SWIZZLED, "9223372105574252544"), TOGETHER, None),
    "a descriptor that begins in the middle of a block": (
        90, replaced(SWIZZLED, "4611686293305294864"), TOGETHER, Misaligned),
    "a descriptor with reserved bits": (90, replaced(SWIZZLED, "4611756662049472512"), TOGETHER, BadOperand),
    "the barrier is told of half the bytes": (90, replaced(r"(expect_tx.*?), 32768", r"\1, 16384", count=9), TOGETHER, PtxError),
    "the barrier is told of two bytes more": (
        90, replaced(r"(expect_tx.*?), 32768", r"\1, 32770", count=9), TOGETHER, Deadlock),
    "the other parity is waited for": (90, replaced(WAIT_LOOP, r"\1, 1"), TOGETHER, PtxError),
    "one thread arrives that should not": (90, replaced(r"@%p\d+ (mbarrier\.arrive\.expect_tx)", r"\1", count=9), TOGETHER, PtxError),
    "a box copied to where another belongs": (
        90, replaced(r"(add\.s32\s+%r\d+, %r\d+), 49152", r"\1, 0"), TOGETHER, None),
    "a store without its predicate": (80, replaced(r"@%p\d+ (st\.global)", r"\1", count=99), TOGETHER, OutOfBounds),
    "a load without its predicate": (80, replaced(r"@%p\d+ (ld\.global\.b8)", r"\1", count=99), TOGETHER, OutOfBounds),
    "a store one row further": (80, replaced(r"(st\.global\.b32 \[ %rd\d+ \+) 0", r"\1 4", count=99), TOGETHER, PtxError),
    "a store far outside": (90, replaced(r"(st\.global\.b32 \[ %rd\d+ \+) 0", r"\1 1048576"), TOGETHER, OutOfBounds),
    "a store that is not aligned": (90, replaced(r"(st\.global\.b32 \[ %rd\d+ \+) 0", r"\1 2"), TOGETHER, Misaligned),
    "the mask of columns is not read": (
        80, replaced(r"@%p\d+ ld\.global\.b8 \{ (%rs\d+) \}, \[[^]]*\]", r"mov.u16 \1, 1", count=99), TOGETHER, None),
    "the other columns are dropped": (80, replaced(r"0f7F800000, 0fFF800000", "0f00000000, 0f00000000"), TOGETHER, None),
    "another function for exp2": (80, replaced(r"ex2\.approx(\.ftz)?\.f32", "neg.f32", count=1), TOGETHER, None),
    "lanes exchanged with others": (80, replaced(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 1,", r"\1, 4,"), TOGETHER, None),
    "a matrix loaded one row further": (80, replaced(r"(ldmatrix.*?\[%r\d+\+)16384", r"\g<1>16448"), TOGETHER, None),
    "a matrix loaded transposed": (80, replaced(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared"), TOGETHER, None),
    "another offset of a row of the tile": (
        80, replaced(r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0", r"\1 64"), TOGETHER, None),
    "a barrier that some threads do not reach": (
        90, replaced(r"(bar\.sync\s+0;)", r"@%p1 \1", 5), TOGETHER, Deadlock),
    "a barrier for more threads than there are": (80, replaced(r"bar\.sync\s+0;", "bar.sync 0, 512;"), TOGETHER, Deadlock),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught(problem, defect):
    capability, mutate, schedule, kind = DEFECTS[defect]
    if kind is None:
        assert error(problem, capability, mutate, schedule) > 100 * BOUND
    else:
        with pytest.raises(kind):
            error(problem, capability, mutate, schedule)


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
                if error(problem, capability, replaced(pattern, "", number), schedule) > BOUND:
                    caught.add(number)
            except PtxError:
                caught.add(number)
    assert len(caught) >= 4, caught
