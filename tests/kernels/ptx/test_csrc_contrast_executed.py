"""csrc's kernels of the contrast as nvcc's PTX, executed for sm_80 and sm_90: sums, logarithms, pairs and G tiles,
against the float64 oracle; and defects planted in them."""

import re

import pytest
import torch
from ptx import FIRST_AHEAD, LAST_AHEAD, TOGETHER, Deadlock, Misaligned, OutOfBounds, nvcc
from ptx.cases import cases
from ptx.contrast_cases import KINDS, check, features, float32_errors, masks_of
from ptx.csrc.logsumexp import ExecutedOps

from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops.logsumexp import logsumexp_cuda

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc (CUDA_HOME, or on PATH)")
ALL = pytest.mark.ptx


@pytest.fixture
def kind(request, monkeypatch):
    """One of KINDS, with the setting that it needs."""
    monkeypatch.setattr(settings, "float32", KINDS[request.param][1])
    return request.param


@pytest.fixture
def launch_on(monkeypatch):
    """launch_on(capability, ..): ExecutedOps, in place of the extension's from now on."""
    monkeypatch.setitem(dispatch._BACKENDS["bidirectional_logsumexp"], "cuda", lambda case: None)

    def launch_on(capability, **options):
        ops = ExecutedOps(capability, **options)
        monkeypatch.setattr(logsumexp_cuda, "_ops", ops)
        return ops

    return launch_on


@ALL
@pytest.mark.parametrize("kind", ["bf16", "tf32x3"], indirect=True)
def test_every_kernel(launch_on, kind):
    """Two slots of less than a tile, one box deep, forward and backward; float32 takes nvcc 20 seconds."""
    launch_on(80)
    check(kind, "cuda", *features(kind, 20, 24, 2, 16), 14.3, **masks_of(20, 24, 2, "x, y"))


@pytest.mark.parametrize(
    "kind, capability, which",
    cases(set(), KINDS, (80, 90), ("none", "x", "y", "x, y")),
    indirect=["kind"],
)
def test_ragged_edges(launch_on, kind, capability, which):
    """Two slots of 112 x 144, width 48: no tile is full, and there are two of the columns."""
    launch_on(capability)
    check(kind, "cuda", *features(kind, 112, 144, 2, 48), 14.3, **masks_of(112, 144, 2, which))


@ALL
@pytest.mark.parametrize(
    "m, c, k, d", [(1, 1, 1, 8), (3, 7, 2, 8), (128, 128, 1, 64), (130, 257, 2, 13), (64, 128, 1, 512)]
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_shapes(launch_on, kind, capability, m, c, k, d):
    launch_on(capability)
    check(kind, "cuda", *features(kind, m, c, k, d), 14.3)


@pytest.mark.parametrize(
    "kind, capability, scale, which",
    cases(set(), KINDS, (80, 90), (1000.0, 0.0, -100.0), ("none", "y", "x, y")),
    indirect=["kind"],
)
def test_the_exact_path(launch_on, kind, capability, scale, which):
    """Sums that the fixed offset does not hold: running maxima, and the gradient by two exponentials a pair."""
    launch_on(capability)
    x, y = features(kind, 40, 70, 2, 40)
    check(kind, "cuda", x, y, scale, **masks_of(40, 70, 2, which))


@ALL
@pytest.mark.parametrize("schedule", [FIRST_AHEAD, LAST_AHEAD])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_any_order_of_warps(launch_on, kind, schedule):
    launch_on(80, schedule=schedule)
    for scale in (14.3, 1000.0):
        check(kind, "cuda", *features(kind, 140, 70, 1, 200), scale, **masks_of(140, 70, 1, "x, y"))


@pytest.mark.parametrize("n, k, d, capability", cases(set(), (64, 128), (1,), (256, 512), (80, 90)))
def test_positives_carry_the_error_of_their_sums(monkeypatch, launch_on, n, k, d, capability):
    """Three TF32 products in sums that are cut 192 times: by positives from other products the scale's gradient erred
    by 3.7e-3, and by 6e-4 on an H100."""
    monkeypatch.setattr(settings, "float32", "torch")
    launch_on(capability)
    errors = float32_errors("cuda", n, k, d)
    assert max(errors) < 2e-5, errors


def error(launch_on, mutate=None, schedule=TOGETHER):
    """Of the log-sum-exps of a masked problem with ragged edges, on sm_80; infinite where one isn't finite."""
    launch_on(80, schedule=schedule, mutate=mutate and (lambda kernel, text: mutate(text)))
    x, y = features("bf16", 112, 144, 1, 136)
    masks = masks_of(112, 144, 1, "x, y")
    z = 14.3 * torch.einsum("md,kcd->kmc", x.double(), y.double())
    z = z.masked_fill(~masks["x_mask"][:, None], -torch.inf).masked_fill(~masks["y_mask"][:, None], -torch.inf)
    worst = 0.0
    for got, gold in zip(dispatched(x, y, masks), (z.logsumexp(2), z.logsumexp(1)), strict=True):
        finite = torch.isfinite(gold)
        if not torch.equal(torch.isfinite(got), finite):
            return torch.inf
        worst = max(worst, (got - gold)[finite].abs().max().item())
    return worst


def dispatched(x, y, masks):
    from dreamlip_kernels import bidirectional_logsumexp

    return bidirectional_logsumexp(x, y, 14.3, backend="cuda", **masks)


BOUND = 2e-5
# What is planted in every kernel: pattern, replacement, and the error it is caught by or None for wrong results.
DEFECTS = {
    "a wait for copies lets more groups be under way": (r"cp\.async\.wait_group\s+1", "cp.async.wait_group 3", None),
    "a matrix loaded from further on": (r"(ldmatrix.*?\[%r\d+)\]", r"\1+64]", None),
    "a matrix loaded transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared", None),
    "another function for exp2": (r"ex2\.approx(\.ftz)?\.f32", "neg.f32", None),
    "lanes keep to themselves": (r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+), [^;]*;", r"mov.b32 \1, \2;", None),
    "stores one row further": (r"(st\.global\.f32\s+\[%rd\d+)\]", r"\1+4]", OutOfBounds),
    "a store that is not aligned": (r"(st\.global\.f32\s+\[%rd\d+)\]", r"\1+2]", Misaligned),
    "the masks are not read": (r"ld\.global\.u8\s+(%rs\d+), \[[^]]*\]", r"mov.u16 \1, 1", None),
    "copies write everywhere": (r"(cp\.async\.c[ag]\.shared\.global \[%r\d+)\]", r"\1+65536]", OutOfBounds),
    "a barrier for more threads than there are": (r"bar\.sync\s+0;", "bar.sync 0, 256;", Deadlock),
}


def test_the_untouched_code_is_right(launch_on):
    assert error(launch_on) <= BOUND


@pytest.mark.parametrize(
    "defect", [name if i == 0 else pytest.param(name, marks=ALL) for i, name in enumerate(DEFECTS)]
)
def test_a_planted_defect_is_caught(launch_on, defect):
    pattern, by, kind = DEFECTS[defect]

    def mutate(text):
        changed, count = re.subn(pattern, by, text)
        assert count, f"no match of {pattern!r}"
        return changed

    if kind is None:
        assert error(launch_on, mutate) > 100 * BOUND
    else:
        with pytest.raises(kind):
            error(launch_on, mutate)
