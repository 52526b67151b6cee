"""backend="cuda" of bidirectional_logsumexp as a whole, without a GPU: its launches go to the emulated kernels.

float32 inputs outside "fp16" are multiplied as float32; with it in float16, where the bar is the oracle on rounded
inputs.
"""

import itertools

import contrast_promises as promises
import pytest
import torch
from emulated_logsumexp import EmulatedOps
from emulation import needs_emulation
from numerics import clip_like, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops.logsumexp import logsumexp_cuda

pytestmark = needs_emulation


@pytest.fixture(scope="module")
def compiled():
    return EmulatedOps()


@pytest.fixture(autouse=True)
def ops(compiled, monkeypatch):
    monkeypatch.setattr(logsumexp_cuda, "_ops", compiled)
    monkeypatch.setitem(dispatch._BACKENDS["bidirectional_logsumexp"], "cuda", lambda case: None)
    compiled.calls.clear()
    return compiled


EPS = {torch.float32: 2**-9, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def close(op, oracle, make, rounded=None):
    """Largest error over two draws, at most twice the float64 oracle's on inputs as the kernels round them,
    and G's own rounding.
    """
    draws = [make(seed) for seed in range(2)]
    got = [value_and_grads(op, inputs) for inputs in draws]
    gold = [value_and_grads(oracle, [v.double() for v in inputs]) for inputs in draws]
    low = [
        value_and_grads(oracle, [v.to(rounded or v.dtype).double() if v.ndim > 1 else v.double() for v in inputs])
        for inputs in draws
    ]
    # G is rounded to the operands' dtype; of float32 the logits are, a hundred of them leave 2^-17 of an exponential.
    exact = rounded is None and draws[0][0].dtype == torch.float32
    eps = 2**-16 * max(1.0, float(draws[0][-1]) / 100) if exact else EPS[draws[0][0].dtype]
    for i, (g, lo, go) in enumerate(
        zip(*(map(torch.stack, zip(*way, strict=True)) for way in (got, low, gold)), strict=True)
    ):
        finite = torch.isfinite(go)
        assert torch.equal(torch.isfinite(g), finite), f"{i}: infinities differ"
        largest = go[finite].abs().max().item()
        error = (g.double() - go)[finite].abs().max().item()
        bound = 2 * (lo - go)[finite].abs().max().item() + eps * largest
        assert error <= bound, f"{i}: error {error:.2e} exceeds {bound:.2e} (largest {largest:.2e})"


def both(**masks):
    op = lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, backend="cuda", **masks)  # noqa: E731
    return op, lambda x, y, s: reference.bidirectional_logsumexp(
        x, y, s, x_mask=masks.get("x_mask"), y_mask=masks.get("y_mask")
    )


def pairs(m, c, k, d, dtype, scale):
    def make(seed):
        x, y = clip_like(max(m, c), k, d, dtype, seed)
        return x[:m], y[:c].transpose(0, 1), torch.tensor(scale)

    return make


@pytest.mark.parametrize("m, c, k, d", [(1, 1, 1, 8), (3, 7, 2, 13), (140, 70, 2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logsumexp(m, c, k, d, dtype):
    for scale in (14.3, 100.0):
        close(*both(), pairs(m, c, k, d, dtype, scale))


def test_float32_in_float16(monkeypatch):
    monkeypatch.setattr(settings, "float32", "fp16")
    close(*both(), pairs(40, 33, 2, 24, torch.float32, 14.3), torch.float16)


@pytest.mark.parametrize("scale", [14.3, -14.3, 0.0, 1000.0])
@pytest.mark.parametrize("dtype, held", [(torch.float32, torch.nan), (torch.float16, 6e4), (torch.bfloat16, torch.inf)])
def test_masks(scale, dtype, held):
    """Whichever way a scale goes, in the exact path too (1000), and whatever is held where something is dropped."""
    gen = torch.Generator().manual_seed(1)
    y_mask = (torch.rand(45, 3, generator=gen) > 0.4).T  # not contiguous, as the loss passes it
    x_mask = (torch.rand(45, 2, generator=gen) > 0.3)[:, 0]
    masks = dict(y_mask=y_mask, x_mask=x_mask)
    op, oracle = both(**masks)

    def dropped(x, y, s):
        x, y = (v.masked_fill(~mask[..., None], held) for v, mask in ((x, x_mask), (y, y_mask)))
        return op(x, y, s)

    close(dropped, oracle, pairs(45, 45, 3, 20, dtype, scale))


@pytest.mark.parametrize("negatives, positives", [("slot", "mean"), ("all", "mean"), ("all", "logsum")])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss(negatives, positives, masked):
    """Its positives are kept out of the rounded G; chunks of one slot, and of some rows and columns of it."""
    mask = (torch.rand(40, 3, generator=torch.Generator().manual_seed(5)) > 0.3) if masked else None
    options = dict(text_mask=mask, negatives=negatives, positives=positives)
    op = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="cuda", **options)  # noqa: E731
    oracle = lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s, **options)  # noqa: E731
    close(op, oracle, lambda seed: (*clip_like(40, 3, 24, torch.float32, seed), torch.tensor(10.0)))


@pytest.mark.parametrize("workspace, launches", [(2**29, 1), (2 * 150 * 152, 2), (2**15, 8)])
def test_chunks_of_the_gradient(ops, monkeypatch, workspace, launches):
    """All slots in one launch, a slot each, and rows of a slot: the same gradients."""
    monkeypatch.setattr(settings, "workspace_bytes", workspace)
    x, y = clip_like(150, 2, 16, torch.float16)
    fn = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="cuda")  # noqa: E731
    oracle = lambda i, t, s: reference.multi_positive_contrastive_loss(i, t, s)  # noqa: E731
    pitches = []
    with monkeypatch.context() as patched:
        for name in ("matmul", "accumulate"):
            product = getattr(logsumexp_cuda, name)
            noting = lambda a, b, out, f=product: pitches.append(max(a.stride())) or f(a=a, b=b, out=out)  # noqa: E731
            patched.setattr(logsumexp_cuda, name, noting)
        value_and_grads(fn, (x, y, torch.tensor(10.0)))
    assert ops.calls.count("gradient") == launches
    assert pitches and all(pitch % 64 == 0 for pitch in pitches), "rows of G begin at lines of the caches"
    close(fn, oracle, lambda seed: (*clip_like(150, 2, 16, torch.float16, seed), torch.tensor(10.0)))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_each_subset_of_gradients(needs):
    make = pairs(20, 30, 2, 16, torch.float32, 5.0)
    results = []
    for fn in both():
        inputs = [v.detach().requires_grad_(n) for v, n in zip(make(0), needs, strict=True)]
        row, col = fn(*inputs)
        wanted = [v for v in inputs if v.requires_grad]
        results.append(torch.autograd.grad(row.square().sum() + col.sum(), wanted))
    for got, gold in zip(*results, strict=True):
        torch.testing.assert_close(got, gold, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_pairs_of_one_image(ops, monkeypatch, scale):
    """Tiles whole and ragged, and chunks of rows and columns; at 1000 by running maxima and the exact gradient."""
    promises.pairs_of_one_image_are_left_out("cuda", torch.device("cpu"), scale, n=140)
    promises.pairs_of_one_image_in_a_stretch_of_rows("cuda", torch.device("cpu"), scale)
    monkeypatch.setattr(settings, "workspace_bytes", 2**15)
    promises.pairs_of_one_image_are_left_out("cuda", torch.device("cpu"), scale, n=140)


def test_sums_in_parts_of_the_workspace(ops, monkeypatch):
    make = pairs(150, 300, 2, 16, torch.bfloat16, 14.3)
    whole = value_and_grads(both()[0], make(0))[:2]
    monkeypatch.setattr(settings, "workspace_bytes", 4 * 2 * 150)
    ops.calls.clear()
    parts = dk.bidirectional_logsumexp(*make(0), backend="cuda")
    assert ops.calls == ["sums"] * 3 + ["finish"] * 2
    torch.testing.assert_close(parts, whole)


def test_opcheck():
    x, y = clip_like(9, 2, 13)
    x, y, scale = x.requires_grad_(), y.transpose(0, 1).requires_grad_(), torch.tensor(3.0, requires_grad=True)
    args = (x, y, scale, None, None, True, False, "torch", "cuda")
    torch.library.opcheck(torch.ops.dreamlip_kernels.bidirectional_logsumexp.default, args)
