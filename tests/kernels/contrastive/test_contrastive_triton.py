"""The Triton kernels themselves, run by Triton's interpreter on the CPU, against the float64 oracle.

float32 inputs are computed in float16, so the bar is the oracle on float16-rounded inputs: what the rounding alone
costs, twice over."""

from dataclasses import replace

import contrast_promises as promises
import pytest
import torch
from numerics import clip_like, value_and_grads
from triton_runs import require_triton

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops.rectangle import Rectangle

require_triton()


@pytest.fixture(autouse=True)
def where_it_runs():
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled; test_contrastive_gpu.py runs them there")


@pytest.fixture(autouse=True)
def float32_as_float16(monkeypatch):
    """float32 features as the kernels' 16-bit code multiplies them, unless a test says otherwise."""
    monkeypatch.setattr(settings, "float32", "fp16")


# numpy warns of the overflow that raises the flag; that is the case being tested.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rounded(v):
    return v.half().double() if v.dtype == torch.float32 and v.ndim > 1 else v.double()


def close(name, op, oracle, draws):
    """Largest error over the draws, at most twice that of the float64 oracle on float16-rounded inputs, plus G's own
    rounding.

    Several draws, because the scale's gradient is one number, left over where large terms cancel.
    """
    got = [value_and_grads(op, inputs) for inputs in draws]
    gold = [value_and_grads(oracle, [v.double() for v in inputs]) for inputs in draws]
    low = [value_and_grads(oracle, [rounded(v) for v in inputs]) for inputs in draws]
    for i, (g, lo, go) in enumerate(
        zip(*(map(torch.stack, zip(*way, strict=True)) for way in (got, low, gold)), strict=True)
    ):
        finite = torch.isfinite(go)
        assert torch.equal(torch.isfinite(g), finite), f"{name}[{i}]: infinities differ"
        largest = go[finite].abs().max().item()
        error = (g.double() - go)[finite].abs().max().item()
        # 2^-9: G and the inputs are rounded to 11 bits, a gradient is a sum of such terms of either sign.
        bound = 2 * (lo - go)[finite].abs().max().item() + 2**-9 * largest
        assert error <= bound, f"{name}[{i}]: error {error:.2e} exceeds {bound:.2e} (largest {largest:.2e})"


def compare(make, scale, op=None, **masks):
    """``make(seed)`` -> x, y."""
    op = op or (lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, backend="triton", **masks))

    def oracle(x, y, s):
        return reference.bidirectional_logsumexp(x, y, s, masks.get("y_mask"), masks.get("x_mask"))

    close("row, col, dx, dy, dscale", op, oracle, [(*make(seed), torch.tensor(scale)) for seed in range(4)])


@pytest.mark.parametrize("m, c, k, d", [(1, 1, 1, 8), (3, 7, 2, 8), (33, 70, 3, 13), (64, 64, 1, 32), (96, 65, 2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_logsumexp(m, c, k, d, dtype, scale):
    def make(seed):
        x, y = clip_like(max(m, c), k, d, dtype, seed)
        return x[:m], y[:c].transpose(0, 1)

    compare(make, scale)


@pytest.mark.parametrize(
    "slot, scale",
    [("some", 14.3), ("a whole slot", 14.3), ("some", -14.3), ("some", 0.0), ("some", 100.0), ("some", 1000.0)],
)
@pytest.mark.parametrize(
    "dtype, held", [(torch.float32, 0.0), (torch.float32, 1e30), (torch.float16, 0.0), (torch.float16, 6e4)]
)
def test_masks(slot, scale, dtype, held):
    """Whichever way a scale turns infinity, in the exact kernels too (1000), and whatever is ``held`` where something
    is dropped.
    """
    gen = torch.Generator().manual_seed(1)
    y_mask = (torch.rand(45, 3, generator=gen) > 0.4).T  # not contiguous, as the loss passes it
    if slot != "some":
        y_mask = y_mask.clone()
        y_mask[1] = False
    x_mask = torch.rand(45, generator=gen) > 0.3
    masks = dict(y_mask=y_mask, x_mask=x_mask)

    def make(seed):
        x, y = clip_like(45, 3, 20, dtype, seed)
        return x, y.transpose(0, 1)

    def op(x, y, s):
        x, y = (v + (held * ~mask[..., None]).to(dtype) for v, mask in ((x, x_mask), (y, y_mask)))
        return dk.bidirectional_logsumexp(x, y, s, backend="triton", **masks)

    compare(make, scale, op, **masks)


@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_pairs_of_one_image(monkeypatch, scale):
    """In chunks of rows and columns; at 1000 by running maxima and the exact gradient, of which few programs make all
    tiles.
    """
    from dreamlip_kernels.ops.logsumexp import logsumexp_gradient_triton

    monkeypatch.setattr(logsumexp_gradient_triton, "EXACT_PROGRAMS", 3)
    monkeypatch.setattr(settings, "workspace_bytes", 2**15)
    promises.pairs_of_one_image_are_left_out("triton", torch.device("cpu"), scale, n=140)
    promises.pairs_of_one_image_in_a_stretch_of_rows("triton", torch.device("cpu"), scale)


@pytest.mark.parametrize("case", ["opposed at scale 100", "not normalized", "scale 1000", "large and small"])
def test_the_flagged_fallback_is_right(case, monkeypatch):
    """Sums that leave float32's range at the fixed offset: the flag sends everything to the exact kernels, of which few
    programs make all tiles.
    """
    from dreamlip_kernels.ops.logsumexp import logsumexp_gradient_triton

    monkeypatch.setattr(logsumexp_gradient_triton, "EXACT_PROGRAMS", 3)  # for four tiles
    scale = {"opposed at scale 100": 100.0, "scale 1000": 1000.0}.get(case, 3.0)

    def make(seed):
        x, y = clip_like(40, 2, 24, seed=seed)
        y = y.transpose(0, 1)
        if case.startswith("opposed"):
            y = -x[None].expand(2, -1, -1).roll(1, 1).contiguous()
        if case == "not normalized":
            x, y = 40 * x, 7 * y
        if case == "large and small":
            x, y = 3e4 * x, 1e-4 * y
        return x, y

    compare(make, scale)


def test_opcheck():
    """Compiled code is told the truth about shapes, dtypes and strides, of a D that the kernels pad too."""
    x, y = clip_like(9, 2, 13)
    x, y, scale = x.requires_grad_(), y.transpose(0, 1).requires_grad_(), torch.tensor(3.0, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dreamlip_kernels.bidirectional_logsumexp.default,
        (x, y, scale, None, None, True, False, "fp16", "triton"),
    )
    x, y, scale = x.detach(), y.detach(), scale.detach()
    sums, upstream = reference.bidirectional_logsumexp(x, y, scale), torch.rand(3, 2, 9)
    pos = scale * torch.einsum("cd,kcd->kc", x, y)
    for wide in (False, True):
        args = (x, y, scale, None, None, *sums, pos, None, *upstream, 0, 0, 9, True, True, "fp16", "triton", wide)
        torch.library.opcheck(torch.ops.dreamlip_kernels.bidirectional_logsumexp_backward.default, args)
        dx, dy, _ = torch.ops.dreamlip_kernels.bidirectional_logsumexp_backward(*args)
        assert dx.is_contiguous() and dy.stride() == y.stride()  # which opcheck does not compare


def test_compiles_whole():
    inputs = (*clip_like(12, 3, 8), torch.tensor(7.0))
    fn = lambda i, t, s: dk.multi_positive_contrastive_loss(i, t, s, backend="triton")  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, expected in zip(value_and_grads(compiled, inputs), value_and_grads(fn, inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_strides_are_any():
    def make(seed):
        x, y = clip_like(40, 2, 24, seed=seed)
        return x.T.contiguous().T, y.transpose(0, 1).repeat_interleave(2, -1)[..., ::2]

    compare(make, 14.3)


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


@pytest.mark.parametrize("diagonal", [0, 5, -7, 30, -30, 200])
def test_positives_may_lie_anywhere(diagonal):
    """A stretch of the world's rows holds the positives of some columns, or of none."""
    x, y = clip_like(40, 2, 24)
    x, y = (
        v.half().float() for v in (x[:33].contiguous(), y.transpose(0, 1).contiguous())
    )  # so that only G is rounded
    scale, gen = torch.tensor(14.3), torch.Generator().manual_seed(0)
    row, col = reference.bidirectional_logsumexp(x.double(), y.double(), scale.double())
    upstream = torch.rand(2, 33, generator=gen), torch.rand(2, 40, generator=gen)
    positives = -torch.rand(2, 40, generator=gen)
    columns = torch.arange(40)
    there = (diagonal + columns >= 0) & (diagonal + columns < 33)
    x64, y64, scale64 = (v.double().requires_grad_() for v in (x, y, scale))
    for d_pos in (None, positives):
        value = sum(
            (lse * d).sum()
            for lse, d in zip(reference.bidirectional_logsumexp(x64, y64, scale64), upstream, strict=True)
        )
        if d_pos is not None:
            value = value + scale64 * (d_pos[:, there, None] * x64[(diagonal + columns)[there]] * y64[:, there]).sum()
        gold = torch.autograd.grad(value, (x64, y64, scale64))
        for backend, rounding, dtype in (("torch", 1e-12, torch.float64), ("triton", 2**-10, torch.float32)):
            inputs, sums = ([v.to(dtype) for v in values] for values in ((x, y, scale), (row, col, *upstream)))
            upstream_pos = None if d_pos is None else d_pos.to(dtype)
            logits = torch.zeros_like(positives).to(dtype)  # of columns without a positive: anything
            logits[:, there] = (scale * (x[(diagonal + columns)[there]] * y[:, there]).sum(-1)).to(dtype)
            got = torch.ops.dreamlip_kernels.bidirectional_logsumexp_backward(
                *inputs,
                None,
                None,
                *sums[:2],
                logits,
                None,
                *sums[2:],
                upstream_pos,
                diagonal,
                0,
                40,
                True,
                True,
                "fp16",
                backend,
                True,
            )
            for g, expected in zip(got, gold, strict=True):
                assert (g - expected).abs().max() <= rounding * expected.abs().max(), (backend, d_pos is None)


@pytest.mark.parametrize(
    "m, c, k, room, chunk",
    [
        (40, 45, 3, 2**29, (3, 40, 45)),  # all at once
        (140, 140, 4, 2**17, (2, 140, 140)),  # two slots at a time
        (140, 140, 2, 2**15, (1, 128, 128)),  # less than a slot, and less than its rows
        (100, 200, 2, 2**15, (1, 100, 128)),  # all rows of some columns
        (300, 40, 2, 2**15, (2, 128, 40)),  # some rows of all slots
    ],
)
def test_chunks_of_the_workspace_meet_without_seams(monkeypatch, m, c, k, room, chunk):
    from dreamlip_kernels.ops.chunks import chunks

    x, y = clip_like(max(m, c), k, 16)
    inputs = (x[:m], y[:c].transpose(0, 1), torch.tensor(14.3))
    y_mask = torch.rand(k, c, generator=torch.Generator().manual_seed(1)) > 0.2
    op = lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, y_mask=y_mask, backend="triton")  # noqa: E731
    whole = value_and_grads(op, inputs)
    monkeypatch.setattr(settings, "workspace_bytes", room)
    assert chunks(m, c, k, 2) == chunk
    for a, b in zip(value_and_grads(op, inputs), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


@pytest.fixture
def pointers(monkeypatch):
    """The kernels' loads as on a device without TMA."""
    from dreamlip_kernels.ops.logsumexp.operands_triton import TritonOperands

    real = TritonOperands.arguments
    monkeypatch.setattr(
        TritonOperands,
        "arguments",
        lambda self, blocks: real(self, blocks) | dict(x=self.x, y=self.y, DESCRIPTOR=False),
    )


@pytest.mark.parametrize("m, c, k, d", [(1, 1, 1, 8), (33, 70, 3, 13), (96, 65, 2, 40)])
def test_pointer_loads_give_what_descriptors_give(monkeypatch, request, m, c, k, d):
    x, y = clip_like(max(m, c), k, d)
    inputs = (x[:m], y[:c].transpose(0, 1), torch.tensor(14.3))
    y_mask = torch.rand(k, c, generator=torch.Generator().manual_seed(1)) > 0.2
    op = lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, y_mask=y_mask, backend="triton")  # noqa: E731
    expected = value_and_grads(op, inputs)
    request.getfixturevalue("pointers")
    for got, want in zip(value_and_grads(op, inputs), expected, strict=True):
        assert torch.equal(got, want)


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


def test_empty_inputs():
    row, col = dk.bidirectional_logsumexp(torch.randn(0, 8), torch.randn(2, 5, 8), 1.0, backend="triton")
    assert row.shape == (2, 0) and torch.isneginf(col).all()


def test_float64_is_refused_by_name():
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it computes in float32 or less"):
        dk.bidirectional_logsumexp(x, x[None], 1.0, backend="triton")


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        dispatch.select("bidirectional_logsumexp", torch.zeros(1), "triton")
