"""The contrastive loss by the Triton kernels, run by Triton's interpreter on the CPU, against the float64 oracle; the
bar as in test_logsumexp_triton.py.
"""

from dataclasses import replace

import pytest
import torch
from numerics import clip_like, value_and_grads
from triton_runs import close, require_triton

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops.rectangle import Rectangle

require_triton()
# numpy warns of the overflow that raises the flag; that is the case being tested.
pytestmark = [pytest.mark.usefixtures("interpreted"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def test_compiles_whole():
    inputs = (*clip_like(12, 3, 8), torch.tensor(7.0))
    fn = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="triton")  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, expected in zip(value_and_grads(compiled, inputs), value_and_grads(fn, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("negatives, positives", [("slot", "mean"), ("all", "mean"), ("all", "logsum")])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_with_its_positives_kept_out_of_the_rounded_gradient(negatives, positives, masked):
    mask = (torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) > 0.4) if masked else None
    options = dict(text_mask=mask, negatives=negatives, positives=positives)
    op = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="triton", **options)  # noqa: E731
    oracle = lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s, **options)  # noqa: E731
    close("loss", op, oracle, [(*clip_like(40, 3, 24, seed=seed), torch.tensor(30.0)) for seed in range(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("negatives, positives", [("slot", "mean"), ("all", "mean"), ("all", "logsum")])
def test_at_least_as_close_as_eager_amp(dtype, negatives, positives):
    """Captions at a cosine of 0.37, and eager code with 16-bit logits: bfloat16 where the features are float32, as
    under autocast.
    """
    options = dict(negatives=negatives, positives=positives)
    inputs = (*clip_like(128, 3, 64, dtype, noise=2.5), torch.tensor(30.0))
    oracle = lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s.to(i.dtype), **options)  # noqa: E731
    gold = value_and_grads(oracle, [v.double() for v in inputs])
    amp = value_and_grads(oracle, [v.bfloat16() if dtype == torch.float32 and v.ndim > 1 else v for v in inputs])
    got = value_and_grads(
        lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="triton", **options), inputs
    )
    for name, ours, theirs, expected in zip(("loss", "d_image", "d_text", "d_scale"), got, amp, gold, strict=True):
        error, allowed = ((v.double() - expected).norm() for v in (ours, theirs))
        assert error <= (allowed / 5 if expected.ndim else allowed), f"{name}: {error:.2e}, eager {allowed:.2e}"


def test_positives_kept_out_of_the_rounded_gradient_lose_nothing(monkeypatch):
    """A nearly certain positive has p - 1 far below float16's step at 1: the gradient is several times better with it
    added apart.
    """
    from dreamlip_kernels.ops.logsumexp import logsumexp

    image, text = clip_like(32, 2, 32, noise=0.6)
    inputs = (image, text, torch.tensor(20.0))
    gold = value_and_grads(
        lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s), [v.double() for v in inputs]
    )

    def error():
        got = value_and_grads(lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="triton"), inputs)
        return max((g.double() - e).abs().max() / e.abs().max() for g, e in zip(got[1:3], gold[1:3], strict=True))

    apart = error()
    real = logsumexp._BACKWARD["triton"]

    def together(rectangle, upstream, *options):
        dx, dy, dscale = real(rectangle, replace(upstream, d_pos=None), *options)
        x, y, scale, d_pos = rectangle.x, rectangle.y, rectangle.scale, upstream.d_pos
        pull = scale * d_pos[..., None]
        return dx + (pull * y).sum(0), dy + pull * x, dscale + (d_pos[..., None] * x * y).sum()

    monkeypatch.setitem(logsumexp._BACKWARD, "triton", together)
    assert apart < 0.02 and apart < error() / 3


@pytest.mark.parametrize("case", ["plain", "masked", "flagged"])
def test_float32_as_float32(monkeypatch, case):
    """configure(float32="torch") with torch's precision at "highest"; the interpreter multiplies in float32."""
    monkeypatch.setattr(settings, "float32", "torch")
    mask = torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) > 0.4 if case == "masked" else None
    image, text = clip_like(40, 3, 26, noise=2.0)
    inputs = (image, -text if case == "flagged" else text, torch.tensor(100.0 if case == "flagged" else 30.0))
    options = dict(text_mask=mask)
    op = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="triton", **options)  # noqa: E731
    oracle = lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s, **options)  # noqa: E731
    gold = value_and_grads(oracle, [v.double() for v in inputs])
    for got, want in zip(value_and_grads(op, inputs), gold, strict=True):
        # 4e-6: the loss is a difference of numbers up to the scale.
        torch.testing.assert_close(got.double(), want, atol=4e-6 + 1e-5 * float(want.abs().max()), rtol=0)
    torch.set_float32_matmul_precision("high")
    try:
        assert not Rectangle(image, text, None, float32="torch").exact_float32
        rough = value_and_grads(op, inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any((a.double() - e).abs().max() > 4e-6 + 1e-5 * e.abs().max() for a, e in zip(rough, gold, strict=True)), (
        "float16 would show"
    )


def test_settings_are_checked_and_kept(monkeypatch):
    monkeypatch.setattr(settings, "workspace_bytes", settings.workspace_bytes)
    monkeypatch.setattr(settings, "float32", settings.float32)
    dk.configure(workspace_bytes=2**28)
    dk.configure(float32="torch")
    assert (settings.workspace_bytes, settings.float32) == (2**28, "torch")
    with pytest.raises(ValueError, match="workspace_bytes must be at least 1048576"):
        dk.configure(workspace_bytes=1000)
    with pytest.raises(ValueError, match="float32 must be one of"):
        dk.configure(float32="tf32", workspace_bytes=2**27)
    assert (settings.workspace_bytes, settings.float32) == (2**28, "torch"), "a refused call changes nothing"
