"""What the Triton backend of the contrast launches, counted without a device."""

from types import SimpleNamespace

import pytest
import torch
from launch_counts import all_launches
from numerics import clip_like

import dreamlip_kernels as dk
from dreamlip_kernels.backends import tuned_tiles
from dreamlip_kernels.backends.settings import settings

pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize(
    "dtype, float32",
    [(torch.bfloat16, "torch"), (torch.float32, "fp16"), (torch.float32, "torch")],
    ids=["bfloat16", "float32 as float16", "float32"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_launches_of_a_step(counted, monkeypatch, dtype, float32, masked):
    """The whole loss with its gradients, N=4096, K=8 on one rank: about 270 before slots went together."""
    monkeypatch.setattr(settings, "float32", float32)
    operands = "vectors vectors" if (dtype, float32) == (torch.float32, "fp16") else ""
    image, text = (v.requires_grad_() for v in clip_like(4096, 8, 32, dtype))
    scale = torch.tensor(14.3, requires_grad=True)
    mask = torch.ones(4096, 8, dtype=torch.bool) if masked else None
    with all_launches(counted, many=image.numel()) as passes:
        loss = dk.multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend="triton")
        torch.autograd.grad(loss, (image, text, scale))
    print(len(counted), counted)
    assert len(counted) <= 40, counted
    # One matrix of all slots, without what is masked; the kernel that rounds features makes both.
    expected = [] if operands else ["masked_fill" if masked else "contiguous"]
    assert passes == expected, "elementwise passes over features or their gradients"
    assert [name for name in counted if "aten" not in name] == (
        f"{operands} exp_sums finish_sums finish_sums {operands} vectors vectors gradient_tile gradient_tile "
        "matmul matmul finish_gradient finish_gradient"
    ).split()


def test_launches_of_a_further_rectangle(counted):
    """What another rank's rows, or another stretch of them, cost: 512 captions of 8 slots against 4096 rows."""
    x, y = clip_like(4096, 8, 32, torch.bfloat16)
    y, scale = y[:512].transpose(0, 1), torch.tensor(14.3)
    ops = torch.ops.dreamlip_kernels
    with all_launches(counted):
        row, col, _, _ = ops.bidirectional_logsumexp(x, y, scale, None, None, False, False, "torch", "triton")
    assert len(counted) <= 12, counted
    pos, upstream = torch.zeros_like(col), (torch.ones_like(row), torch.ones_like(col), torch.ones_like(col))
    args = (x, y, scale, None, None, row, col, pos, None, *upstream, 100, 0, 512, True, True, "torch", "triton", True)
    with all_launches(counted):
        ops.bidirectional_logsumexp_backward(*args)
    print(len(counted), counted)
    assert len(counted) <= 12, counted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_the_benchmark_tunes_is_launched(counted, monkeypatch, dtype):
    """Its exp_sums had not followed a signature: on a GPU each candidate would have been printed as a failure."""
    from benchmarks import tune_contrastive

    monkeypatch.setattr(tune_contrastive, "N", 256)
    for name in ("workspace_bytes", "resident"):
        monkeypatch.setattr(settings, name, getattr(settings, name))  # and back at the end
    monkeypatch.setattr(tuned_tiles, "_instead", None)
    for name, (step, key) in tune_contrastive.steps(64, dtype, device="cpu").items():
        counted.clear()
        step()
        assert set(counted) == {name} and key == (name, dtype.itemsize, 8)


def test_a_tile_that_spills_in_any_variant_is_no_candidate(monkeypatch):
    """The least over the variants was taken: a masked kernel that spilled went by a plain one that did not."""
    from benchmarks import tune_contrastive

    def variant(spilled, exact):
        return SimpleNamespace(n_spills=spilled, src=SimpleNamespace(constants={(1,): exact}))

    variants = dict(enumerate((variant(0, False), variant(6, False), variant(9, True))))
    kernel = SimpleNamespace(device_caches={0: (variants,)}, arg_names=["x", "EXACT"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert tune_contrastive.spills(kernel) == 6


@pytest.mark.parametrize("columns", [45, 48])
def test_rows_of_the_gradients_coefficients_begin_at_lines_of_the_cache(counted, monkeypatch, columns):
    """Without a pitch, a number of columns that 8 does not divide made 64 stores of two bytes for 8 of 16."""
    from dreamlip_kernels.ops.logsumexp import logsumexp_gradient_triton

    pitches = []
    for product in ("matmul", "accumulate"):
        monkeypatch.setattr(logsumexp_gradient_triton, product, lambda a, b, out: pitches.append(max(a.stride())))
    x, y = clip_like(columns, 3, 32, torch.bfloat16)
    inputs = [v.requires_grad_() for v in (x[:40].clone(), y.transpose(0, 1).contiguous())]
    for room in (2**29, 2**20):
        monkeypatch.setattr(settings, "workspace_bytes", room)
        row, col = dk.bidirectional_logsumexp(*inputs, 14.3, backend="triton")
        torch.autograd.grad(row.sum() + col.sum(), inputs)
    assert len(pitches) >= 4 and all(pitch % 64 == 0 for pitch in pitches), pitches
