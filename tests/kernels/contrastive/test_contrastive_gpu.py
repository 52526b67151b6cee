"""The contrastive kernels on a CUDA device: dtypes and masks at real shapes, large indices, memory, graphs, repeats to
the bit. `make gpu` runs these.
"""

import contrast_promises as promises
import pytest
import torch
from numerics import clip_like, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings

pytestmark = pytest.mark.gpu
MODES = [("slot", "mean"), ("all", "mean"), ("all", "logsum")]


@pytest.fixture(autouse=True)
def float32_as_float16(monkeypatch):
    """float32 features as the kernels' 16-bit code multiplies them, unless a test says otherwise."""
    monkeypatch.setattr(settings, "float32", "fp16")


def inputs_like(n, k, d, dtype, seed=0, scale=50.0):
    """Captions at a cosine of 0.24 to their image, as trained CLIP models have them: surer positives leave a loss that
    is nothing but rounding.
    """
    return (*(v.cuda() for v in clip_like(n, k, d, dtype, seed, noise=4.0)), torch.tensor(scale, device="cuda"))


# All of one, then all of the other: Triton compiles for minutes, and the time on a device may end.
@pytest.fixture(scope="module", params=["cuda", "triton"])
def backend(request):
    like = torch.empty(1, device="cuda", dtype=torch.bfloat16)
    if why := dispatch.why_not("bidirectional_logsumexp", request.param, like):
        pytest.skip(f"backend={request.param!r} cannot run here: {why}")
    return request.param


@pytest.fixture
def ours(backend):
    return lambda i, t, s, **options: dk.multi_positive_contrastive_loss(i, t, s, backend=backend, **options)


def exact(inputs, **options):
    """Value and gradients in float64 by the torch backend, which test_contrastive.py holds against the oracle."""
    fn = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="torch", **options)  # noqa: E731
    return value_and_grads(fn, [v.double() for v in inputs])


def eager(inputs, **options):
    """The oracle at the inputs' dtype: its logits are rounded as eager code under AMP rounds them."""
    return value_and_grads(
        lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s.to(i.dtype), **options), inputs
    )


def relative(got, gold):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, gold, strict=True)]


@pytest.mark.parametrize("n, k, d", [(1111, 5, 512), (2048, 8, 512), (300, 16, 768), (640, 1, 1024), (777, 3, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("negatives, positives", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_at_least_as_close_as_eager_amps(ours, n, k, d, dtype, negatives, positives, masked):
    inputs = inputs_like(n, k, d, dtype)
    mask = (torch.rand(n, k, device="cuda") > 0.3) if masked else None
    options = dict(text_mask=mask, negatives=negatives, positives=positives)
    gold = exact(inputs, **options)
    amp = [v.bfloat16() if dtype == torch.float32 and v.ndim > 1 else v for v in inputs]
    theirs = relative(eager(amp, **options), gold)
    for error, bound in zip(
        relative(value_and_grads(lambda *i: ours(*i, **options), inputs), gold), theirs, strict=True
    ):
        assert error <= bound + 1e-4, (error, bound)


def test_float32_as_float32(ours, monkeypatch):
    """configure(float32="torch") at torch's own default precision."""
    inputs = inputs_like(1000, 4, 512, torch.float32)
    gold = exact(inputs)
    rough = relative(value_and_grads(ours, inputs), gold)
    monkeypatch.setattr(settings, "float32", "torch")
    fine = relative(value_and_grads(ours, inputs), gold)
    assert max(fine) < 2e-5 and max(fine) < max(rough) / 10, (fine, rough)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_small_and_odd(ours, dtype, masked):
    """What compute-sanitizer watches: ragged edges on every side."""
    inputs = inputs_like(131, 3, 40, dtype, scale=14.3)
    options = dict(text_mask=(torch.rand(131, 3, device="cuda") > 0.3) if masked else None)
    assert max(relative(value_and_grads(lambda *i: ours(*i, **options), inputs), exact(inputs, **options))) < 0.05


@pytest.mark.parametrize("scale, opposed", [(100.0, True), (1000.0, False), (0.0, False), (-20.0, False)])
def test_any_scale(ours, scale, opposed):
    image, text, s = inputs_like(500, 2, 256, torch.float32, scale=scale)
    text = -text if opposed else text
    got, gold = (fn((image, text, s)) for fn in (lambda i: value_and_grads(ours, i), exact))
    assert all(torch.isfinite(v).all() for v in got) and abs(got[0] - gold[0]) <= 1e-3 * max(1.0, abs(float(gold[0])))


def test_nan_and_inf_show_and_nothing_hangs(ours):
    image, text, s = inputs_like(300, 2, 64, torch.bfloat16)
    for value in (torch.nan, torch.inf):
        broken = image.clone()
        broken[7, 3] = value
        assert not torch.isfinite(ours(broken, text, s))


def test_columns_beyond_two_to_the_31_elements(backend):
    """K * C * D > 2^31: offsets are 64-bit. 16 slots of 270,000 captions of width 512 are 4.4 GB."""
    k, c, d = 16, 270_000, 512
    x = torch.nn.functional.normalize(torch.randn(256, d, device="cuda"), dim=-1).bfloat16()
    y = torch.randn(k, c, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    row, col = dk.bidirectional_logsumexp(x, y, 14.3, backend=backend)
    picked = torch.randint(c, (512,), device="cuda")
    for slot in (0, k - 1):
        z = 14.3 * x.double() @ y[slot].double().T
        torch.testing.assert_close(row[slot].double(), z.logsumexp(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(col[slot, picked].double(), z[:, picked].logsumexp(0), atol=1e-4, rtol=0)


def test_the_same_bits_each_time(ours):
    inputs = inputs_like(3000, 4, 512, torch.bfloat16)
    runs = [value_and_grads(ours, inputs) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_extra_memory_at_the_full_shape(ours):
    """N=32768, K=8, D=512: at most 1 GB beyond inputs and gradients; the logits would be 17 GB at 16 bits."""
    n, k, d = 32768, 8, 512
    image = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=-1).bfloat16().requires_grad_()
    text = torch.nn.functional.normalize(torch.randn(n, k, d, device="cuda"), dim=-1).bfloat16().requires_grad_()
    scale = torch.tensor(14.3, device="cuda", requires_grad=True)
    ours(image[:256].detach(), text[:256].detach(), scale)  # compiled, handles made
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(ours(image, text, scale), (image, text, scale))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in grads)
    assert extra <= 2**30, f"{extra / 2**30:.2f} GB"


def test_graph_capture_of_forward_and_backward(ours):
    inputs = [v.requires_grad_() for v in inputs_like(500, 3, 256, torch.bfloat16)]

    def step():
        loss = ours(*inputs)
        return (loss, *torch.autograd.grad(loss, inputs))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [v.detach().clone() for v in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    with torch.no_grad():
        inputs[0].copy_(inputs[0].roll(1, 0))
        inputs[1].copy_(inputs[1].roll(1, 0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(outs[0], expected[0], atol=1e-5), "rolled pairs have the same loss"
    torch.testing.assert_close(outs[1], expected[1].roll(1, 0), atol=1e-6, rtol=1e-2)


def test_tensors_need_not_be_on_the_current_device(ours):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    inputs = inputs_like(64, 2, 32, torch.bfloat16)
    there = [v.to("cuda:1") for v in inputs]
    for got, expected in zip(value_and_grads(ours, there), value_and_grads(ours, inputs), strict=True):
        assert got.device.index == 1 and torch.equal(got.to(0), expected)


def test_opcheck(backend):
    image, text, scale = (v.requires_grad_() for v in inputs_like(64, 2, 32, torch.float32))
    args = (
        image,
        text.detach().transpose(0, 1).contiguous().requires_grad_(),
        scale,
        None,
        None,
        True,
        False,
        "fp16",
        backend,
    )
    torch.library.opcheck(torch.ops.dreamlip_kernels.bidirectional_logsumexp.default, args)


def test_compiles_whole(ours):
    inputs = inputs_like(200, 3, 64, torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True)
    torch.testing.assert_close(value_and_grads(compiled, inputs), value_and_grads(ours, inputs))


@pytest.mark.parametrize("check", promises.CHECKS, ids=lambda check: check.__name__)
def test_promise(backend, check):
    check(backend, torch.device("cuda"))


@pytest.mark.parametrize("check", promises.CHECKS, ids=lambda check: check.__name__)
def test_promise_of_torch(check):
    """Whose 16-bit products, and what it leaves out of rounded ones, are CUDA's alone."""
    check("torch", torch.device("cuda"))


def test_torch_multiplies_16_bit_features_as_they_are():
    """Gradients at most a rounding of G from float64's; the positives' part is float32's."""
    inputs = inputs_like(1000, 4, 256, torch.bfloat16)
    torch_code = lambda *i: dk.multi_positive_contrastive_loss(*i, backend="torch")  # noqa: E731
    assert max(relative(value_and_grads(torch_code, inputs), exact(inputs))) < 2**-7


def test_float32_is_float32_unless_torch_or_autocast_say_otherwise(monkeypatch, backend, ours):
    """By default as a drop-in should: torch's own precision, and 16-bit products under autocast, in backward too."""
    monkeypatch.setattr(settings, "float32", "torch")
    inputs = inputs_like(500, 3, 256, torch.float32)
    gold = exact(inputs)
    fine = relative(value_and_grads(ours, inputs), gold)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        rough = relative(value_and_grads(ours, inputs), gold)
    assert max(fine) < 2e-5 < max(rough[1:3]) < 0.02, (fine, rough)
