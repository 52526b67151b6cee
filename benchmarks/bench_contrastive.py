"""Multi-positive contrast: this package's backends against what people run today, torch.compile, Inf-CL, memeff, and
matrix products with elementwise passes.

    make bench
    pytest benchmarks/bench_contrastive.py --benchmark-only
    pytest benchmarks/bench_contrastive.py --benchmark-only --peer my_loss.py:my_loss     # your own beside them

Beside times the summary gives each one's share of the floor (1 U forward, 4 U both ways, U = 2 N N K D operations, at
this run's own rate of a large matrix product), its peak memory, and once per shape its errors against float64.
`python benchmarks/plot_contrastive.py RESULTS.json PICTURE.png` draws time and memory against N.
"""

import contrastive_peers as peers
import pytest
import torch
from shapes import CONTRASTIVE_GPU_SHAPES, CONTRASTIVE_SHAPES, DEVICE, named

import dreamlip_kernels as dk
from dreamlip_kernels.backends import dispatch


def ours(backend):
    return lambda image, text, scale: dk.multi_positive_contrastive_loss(image, text, scale, backend=backend)


PROVIDERS = {
    "torch": ours("torch"),
    "triton": ours("triton"),
    "cuda": ours("cuda"),
    "open_clip per slot": peers.open_clip_per_slot,
    "flattened": peers.flattened,
    "chunked": peers.chunked_unfused,
    "Inf-CL": peers.inf_cl,
    "memeff": peers.memeff,
    "torch.compile": peers.cross_entropy_per_slot,  # last: compiling takes longest
}
OURS, OTHERS = ("torch", "triton", "cuda"), tuple(PROVIDERS)
COMPILED = [(8192, 8, 512), (512, 8, 512)]  # on a GPU, on a CPU
DTYPES = ["float32", "bfloat16"] if DEVICE == "cuda" else ["float32"]


def pytest_generate_tests(metafunc):
    """The providers, and the peers that the command line names."""
    if "provider" in metafunc.fixturenames:
        PROVIDERS.update(peers.named_by(metafunc.config.getoption("--peer"), OTHERS))
        metafunc.parametrize("provider", PROVIDERS)


def require(provider, image):
    """The provider's function, or a skip that says why it cannot run here."""
    if provider in OURS:
        why = dispatch.why_not("bidirectional_logsumexp", provider, image)
        if DEVICE == "cpu" and provider == "triton" and not why:
            why = "Triton's interpreter is no benchmark"
    else:
        why = peers.why_not(provider)
    if why:
        pytest.skip(why)
    return peers.compiled(PROVIDERS[provider]) if provider == "torch.compile" else PROVIDERS[provider]


def features(shape, dtype):
    """Unit images and captions that resemble theirs, and a scale."""
    n, k, d = shape
    image = torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
    text = torch.nn.functional.normalize(image[:, None] + torch.randn(n, k, d, device=DEVICE) / d**0.5, dim=-1)
    dtype = getattr(torch, dtype)
    return (
        image.to(dtype).requires_grad_(),
        text.to(dtype).requires_grad_(),
        torch.tensor(peers.SCALE, device=DEVICE, requires_grad=True),
    )


@pytest.mark.parametrize(
    "shape", named(CONTRASTIVE_SHAPES, {}) if DEVICE == "cpu" else named({}, CONTRASTIVE_GPU_SHAPES)
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_contrastive(run, matmul_rate, provider, phase, dtype, shape):
    n, k, d = shape
    if provider == "torch.compile" and (shape not in COMPILED or phase == "forward"):
        pytest.skip(f"compiling takes its time: once a dtype, forward and backward, at {COMPILED}")
    if dtype == "float32" and DEVICE == "cuda" and n != 8192:
        pytest.skip("float32 inputs at N=8192 alone")
    image, text, scale = features(shape, dtype)
    loss_fn = require(provider, image)

    def step():
        loss = loss_fn(image, text, scale)
        if phase != "forward":
            torch.autograd.grad(loss, (image, text, scale))

    floor = (1 if phase == "forward" else 4) * 2 * n * n * k * d / matmul_rate
    run(step, floor=floor)


@pytest.mark.parametrize("shape", named({"N512-K8-D512": (512, 8, 512)}, {"N8192-K8-D512": (8192, 8, 512)})[-1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error(run, provider, dtype, shape):
    """Relative errors against float64 of the same inputs: of the loss, and of each gradient by its norm."""
    image, text, scale = features(shape, dtype)
    loss_fn = require(provider, image)

    def value_and_grads(fn, inputs):
        loss = fn(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    gold = value_and_grads(ours("torch"), [v.detach().double().requires_grad_() for v in (image, text, scale)])
    got = value_and_grads(loss_fn, (image, text, scale))
    errors = [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, gold, strict=True)]
    run(
        lambda: None,
        rounds=1,
        warmup=0,
        extra={
            f"error_{name}": error for name, error in zip(("loss", "d_image", "d_text", "d_scale"), errors, strict=True)
        },
    )


@pytest.mark.parametrize("shape", named({"N2048-K8-D512": (2048, 8, 512)}, {"N32768-K8-D512": (32768, 8, 512)})[-1:])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dropped", [0.0, 0.2])
def test_mask(run, dropped, backend, shape):
    """What a mask costs, forward and backward: training always has one, for images with fewer than K captions."""
    n, k, _ = shape
    image, text, scale = features(shape, DTYPES[-1])
    require(backend, image)
    mask = torch.rand(n, k, device=DEVICE) >= dropped if dropped else None

    def step():
        loss = dk.multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend=backend)
        torch.autograd.grad(loss, (image, text, scale))

    run(step)
