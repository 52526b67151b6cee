"""The sigmoid loss's compiled code, executed: what the shipped launcher launches on sm_80, 86 and 90, run on a CPU
against the float64 oracle.
"""

import re

import pytest
import torch
from numerics import clip_like, value_and_grads
from ptx import FIRST_AHEAD, LAST_AHEAD, TOGETHER, OutOfBounds, device
from ptx.cases import cases

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends.settings import settings


@pytest.mark.parametrize(
    "capability, same_image", cases({(80, "ignore"), (90, "positive")}, (80, 90), ("none", "ignore", "positive"))
)
def test_the_loss_and_its_gradients(capability, same_image):
    """144 captions of 48 images: ragged tiles, masks, numbers of images compared in them."""
    n, k, d = 48, 3, 40
    gen = torch.Generator().manual_seed(1)
    options = dict(image_mask=torch.rand(n, generator=gen) > 0.2, text_mask=torch.rand(n, k, generator=gen) > 0.3)
    if same_image != "none":
        options |= dict(image_ids=torch.arange(n) * 5 % 31, same_image=same_image)
    inputs = (*clip_like(n, k, d, torch.float16), torch.tensor(14.3), torch.tensor(-7.0))
    with device(capability) as launches:
        got = value_and_grads(lambda *v: dk.multi_positive_sigmoid_loss(*v, backend="triton", **options), inputs)
    assert [launch.kernel for launch in launches] == ["sigmoid_tile"]
    gold = value_and_grads(
        lambda *v: reference.multi_positive_sigmoid_loss(*v, **options), [v.double() for v in inputs]
    )
    for name, value, wanted in zip(("loss", "dx", "dy", "dscale", "dbias"), got, gold, strict=True):
        error, largest = (value.double() - wanted).abs().max().item(), wanted.abs().max().item()
        assert error <= 2**-9 * largest, f"{name}: error {error:.2e} of {largest:.2e}"


# dtype, settings.float32, and the bound of the features' gradients, which carry one rounding of G to the operands' type
# (float32 features are multiplied as float16, or as three TF32 products). The sums are float32's.
KINDS = {
    "bf16": (torch.bfloat16, "fp16", 2**-8),
    "fp16": (torch.float16, "fp16", 2**-11),
    "fp32": (torch.float32, "fp16", 2**-9),
    "tf32x3": (torch.float32, "torch", 1e-6),
}


def check(monkeypatch, kind, capability, sizes, masked, **options):
    dtype, float32, bound = KINDS[kind]
    monkeypatch.setattr(settings, "float32", float32)
    inputs = (*clip_like(*sizes, dtype), torch.tensor(10.0), torch.tensor(-10.0))
    gen = torch.Generator().manual_seed(1)
    mask = torch.rand(sizes[:2], generator=gen) > 0.3 if masked else None
    gold = value_and_grads(
        lambda *i: reference.multi_positive_sigmoid_loss(*i, text_mask=mask), [v.double() for v in inputs]
    )
    with device(capability, **options) as launches:
        got = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, text_mask=mask, backend="triton"), inputs)
    assert {launch.kernel for launch in launches} == {"sigmoid_tile"}
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, gold, strict=True)]
    loose = 1e-3 if kind == "fp32" else 2e-6  # rounded features
    of_scale = loose + bound * _share_of_negatives(*inputs, mask, gold[3])  # whose coefficients are rounded
    assert errors[0] <= loose and max(errors[1:3]) <= bound, errors
    assert errors[3] <= of_scale and errors[4] <= loose, errors


def _share_of_negatives(image, text, scale, bias, mask, d_scale):
    """The sizes of what the negatives add to the scale's gradient, as a share of it."""
    dots = torch.einsum("md,nkd->mnk", image.double(), text.double())
    terms = (dots * torch.sigmoid(scale * dots + bias)).abs()
    terms[range(len(image)), range(len(image))] = 0
    kept = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
    return float((terms * kept).sum() / kept.sum() / d_scale.abs())


@pytest.mark.parametrize(
    "kind, capability, masked",
    cases({("bf16", 80, True), ("fp16", 90, False), ("tf32x3", 90, True)}, KINDS, (80, 86, 90), (False, True)),
)
def test_ragged_edges(monkeypatch, kind, capability, masked):
    check(monkeypatch, kind, capability, (70, 2, 80), masked)


@pytest.mark.ptx
@pytest.mark.parametrize("sizes", [(1, 1, 8), (7, 3, 13), (64, 2, 512), (130, 1, 64)])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(monkeypatch, kind, capability, sizes):
    check(monkeypatch, kind, capability, sizes, sizes[1] > 1)


@pytest.mark.ptx
@pytest.mark.parametrize("schedule", [TOGETHER, FIRST_AHEAD, LAST_AHEAD], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_chunks_in_any_order_of_warps(monkeypatch, capability, schedule):
    monkeypatch.setattr(settings, "workspace_bytes", 2**15)
    check(monkeypatch, "bf16", capability, (150, 2, 48), True, schedule=schedule)


def test_planted_defects_are_caught(monkeypatch):
    """A store without its predicate, and another function in place of the exponential."""

    def planted(pattern, by):
        def mutate(_, text):
            changed, count = re.subn(pattern, by, text)
            assert count, f"no match of {pattern!r}"
            return changed

        return mutate

    with pytest.raises(OutOfBounds):
        check(monkeypatch, "bf16", 80, (70, 2, 80), True, mutate=planted(r"@%p\d+ (st\.global)", r"\1"))
    with pytest.raises(AssertionError):
        check(monkeypatch, "bf16", 80, (70, 2, 80), True, mutate=planted(r"ex2\.approx(\.ftz)?\.f32", "neg.f32"))
