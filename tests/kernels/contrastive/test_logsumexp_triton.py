"""bidirectional_logsumexp by the Triton kernels themselves, run by Triton's interpreter on the CPU, against the float64
oracle.

float32 inputs are computed in float16, so the bar is the oracle on float16-rounded inputs: what the rounding alone
costs, twice over.
"""

import contrast_promises as promises
import pytest
import torch
from numerics import clip_like, value_and_grads
from triton_runs import close, require_triton

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings

require_triton()
# numpy warns of the overflow that raises the flag; that is the case being tested.
pytestmark = [pytest.mark.usefixtures("interpreted"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def compare(make, scale, op=None, **masks):
    """``make(seed)`` -> x, y."""
    op = op or (lambda x, y, s: dk.bidirectional_logsumexp(x, y, s, backend="triton", **masks))

    def oracle(x, y, s):
        return reference.bidirectional_logsumexp(x, y, s, x_mask=masks.get("x_mask"), y_mask=masks.get("y_mask"))

    close("row, col, dx, dy, dscale", op, oracle, [(*make(seed), torch.tensor(scale)) for seed in range(4)])


SHAPES = [(1, 1, 1, 8), (3, 7, 2, 8), (33, 70, 3, 13), (64, 64, 1, 32), (96, 65, 2, 40)]
CASES = [(*shape, 14.3) for shape in SHAPES] + [(33, 70, 2, 13, scale) for scale in (1.0, 100.0)]


@pytest.mark.parametrize("m, c, k, d, scale", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logsumexp(m, c, k, d, scale, dtype):
    def make(seed):
        x, y = clip_like(max(m, c), k, d, dtype, seed)
        return x[:m], y[:c].transpose(0, 1)

    compare(make, scale)


@pytest.mark.parametrize(
    "slot, scale, dtype, held",
    [
        ("some", 14.3, torch.float32, 0.0),
        ("a whole slot", 14.3, torch.float16, 0.0),
        *(("some", scale, torch.float32, 1e30) for scale in (-14.3, 0.0, 100.0, 1000.0)),
        *(("some", scale, torch.float16, 6e4) for scale in (14.3, -14.3, 0.0, 1000.0)),
    ],
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
    operands = x, y, scale, None, None, *sums, pos, None, *upstream
    for full_precision in (False, True):
        args = *operands, 0, 0, 9, True, True, "fp16", "triton", full_precision
        torch.library.opcheck(torch.ops.dreamlip_kernels.bidirectional_logsumexp_backward.default, args)
        dx, dy, _ = torch.ops.dreamlip_kernels.bidirectional_logsumexp_backward(*args)
        assert dx.is_contiguous() and dy.stride() == y.stride()  # which opcheck does not compare


def test_strides_are_any():
    def make(seed):
        x, y = clip_like(40, 2, 24, seed=seed)
        return x.T.contiguous().T, y.transpose(0, 1).repeat_interleave(2, -1)[..., ::2]

    compare(make, 14.3)


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
