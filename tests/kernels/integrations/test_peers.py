"""The benchmarks' peers compute what ours compute, as they are called there: their Triton kernels, by the interpreter.

memeff and siglip-kernel ask for CUDA tensors; these say that they are, and no line of theirs is replaced.
"""

from types import SimpleNamespace

import pytest
import torch
from numerics import clip_like, value_and_grads
from triton_runs import require_triton

import dreamlip_kernels as dk

N, K, D = 24, 2, 32
# numpy warns of log(0) in lanes beyond the batch, which the kernels drop.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    require_triton()
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled; the benchmark states every peer's errors there")
    h100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # asked at siglip-kernel's import
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: h100)


def theirs(loss, inputs):
    """Value and gradients of a peer, to which tensors are a GPU's."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        return value_and_grads(loss, inputs)


def assert_agree(got, ours, bound):
    for number, (a, b) in enumerate(zip(got, ours, strict=True)):
        assert (a.double() - b.double()).norm() <= bound * b.double().norm(), number


@pytest.fixture
def features():
    return clip_like(N, K, D)


def test_memeff(features):
    """Its gradient of the scale is missing: it takes the temperature as a number."""
    pytest.importorskip("memeff", reason="the benchmark extra is not installed")
    import contrastive_peers as peers

    inputs = (*features, torch.tensor(peers.SCALE))
    got = theirs(peers.memeff, inputs)
    ours = value_and_grads(lambda *i: dk.multi_positive_contrastive_loss(*i, backend="torch"), inputs)
    assert_agree(got[:3], ours[:3], 1e-5)
    assert got[3] == 0 != ours[3]


def test_memeffs_label_smoothing(features):
    memeff = pytest.importorskip("memeff", reason="the benchmark extra is not installed")
    image, text = features
    loss = memeff.MemoryEfficientCLIPLoss(0.1, normalized_inputs=True, stable=False, label_smoothing=0.2)
    got = theirs(lambda i, t: loss(i, t.contiguous()), (image, text[:, 0]))
    ours = value_and_grads(
        lambda i, t: dk.multi_positive_contrastive_loss(i, t[:, None], 10.0, label_smoothing=0.2, backend="torch"),
        (image, text[:, 0]),
    )
    assert_agree(got, ours, 1e-5)


def test_siglip_kernel(features):
    """float16, as its router then takes the kernel that bfloat16 takes on a GPU: 16-bit logits and gradients."""
    pytest.importorskip("siglip_kernel", reason="the benchmark extra is not installed")
    from benchmarks.bench_sigmoid import siglip_kernel

    inputs = [v.half() for v in features] + [torch.tensor(10.0), torch.tensor(-10.0)]
    got = theirs(siglip_kernel, inputs)
    ours = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, backend="torch"), inputs)
    assert_agree(got, ours, 4e-3)
