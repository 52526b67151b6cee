"""The contrast's compiled code, executed: what the shipped launchers launch on sm_80, 86 and 90, run on a CPU against
the float64 oracle.
"""

import contrast_promises as promises
import pytest
import torch
from numerics import value_and_grads
from ptx import FIRST_AHEAD, LAST_AHEAD, TOGETHER, UnknownInstruction, contrast_cases, device
from ptx.cases import cases
from ptx.contrast_cases import KINDS, features, float32_errors, masks_of, within

import dreamlip_kernels as dk
from dreamlip_kernels.backends.settings import settings


@pytest.fixture
def kind(request, monkeypatch):
    """One of KINDS, with the setting that it needs."""
    monkeypatch.setattr(settings, "float32", KINDS[request.param][1])
    return request.param


def check(kind, capability, x, y, scale, schedule=TOGETHER, **masks):
    with device(capability, schedule=schedule) as launches:
        contrast_cases.check(kind, "triton", x, y, scale, **masks)
    return launches


ALL = pytest.mark.ptx


@pytest.mark.parametrize(
    "kind, capability, which",
    cases(
        {("bf16", 80, "x, y"), ("fp16", 90, "none"), ("fp32", 90, "y"), ("tf32x3", 90, "x, y")},
        KINDS,
        (80, 86, 90),
        ("none", "x", "y", "x, y"),
    ),
    indirect=["kind"],
)
def test_ragged_edges(kind, capability, which):
    """Two slots of 112 x 144, width 80: no tile is full, and there are two of each."""
    check(kind, capability, *features(kind, 112, 144, 2, 80), 14.3, **masks_of(112, 144, 2, which))


@ALL
@pytest.mark.parametrize(
    "m, c, k, d",
    [(1, 1, 1, 8), (3, 7, 2, 8), (128, 128, 1, 64), (130, 257, 3, 13), (64, 128, 1, 512), (40, 70, 1, 768)],
)
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_shapes(kind, capability, m, c, k, d):
    check(kind, capability, *features(kind, m, c, k, d), 14.3)


# The fixed offset does not hold these sums: the flag sends them to the kernels with running maxima and to the exact
# gradient.
@pytest.mark.parametrize(
    "kind, capability, scale, which",
    cases({("fp16", 80, 1000.0, "y")}, KINDS, (80, 90), (1000.0, 0.0, -100.0), ("none", "y", "x, y")),
    indirect=["kind"],
)
def test_the_exact_kernels(kind, capability, scale, which):
    x, y = features(kind, 40, 70, 2, 40)
    launches = check(kind, capability, x, y, scale, **masks_of(40, 70, 2, which))
    assert (
        any(launch.execution.instructions > 100 for launch in launches if launch.arguments.get("EXACT"))
        or scale == -100.0
    )


@pytest.mark.parametrize(
    "kind, capability, schedule",
    cases({("bf16", 80, LAST_AHEAD), ("bf16", 90, FIRST_AHEAD)}, KINDS, (80, 90), (FIRST_AHEAD, LAST_AHEAD)),
    indirect=["kind"],
)
def test_the_order_of_warps_does_not_matter(kind, capability, schedule):
    """To the bit: whichever warp runs ahead, barriers hold it where they must."""
    x, y = features(kind, 70, 40, 1, 48)
    scale = torch.tensor(14.3)

    def op(x, y, s):
        return dk.bidirectional_logsumexp(x, y, s, y_mask=masks_of(70, 40, 1, "y")["y_mask"], backend="triton")

    results = []
    for order in (TOGETHER, schedule):
        with device(capability, schedule=order):
            results.append(value_and_grads(op, (x, y, scale)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "kind, capability, diagonal",
    cases({("bf16", 90, 37)}, KINDS, (80, 90), (0, 37, -50)),
    indirect=["kind"],
)
def test_chunks_and_the_diagonal(kind, capability, diagonal, monkeypatch):
    """The gradient in chunks of pairs, as of a rectangle between ranks, where the positives lie off the main diagonal
    and are added in float32.
    """
    monkeypatch.setattr(settings, "workspace_bytes", 2**15)
    m, c, k, d = 200, 150, 2, 40
    x, y = features(kind, m, c, k, d)
    scale, masks = torch.tensor(14.3), masks_of(m, c, k, "x, y")
    logits = 14.3 * torch.einsum("md,kcd->kmc", x.double(), y.double())
    z = logits.masked_fill(~masks["y_mask"][:, None], -torch.inf).masked_fill(
        ~masks["x_mask"][None, :, None], -torch.inf
    )
    row, col = z.logsumexp(2), z.logsumexp(1)
    gen = torch.Generator().manual_seed(3)
    d_row, d_col, d_pos = (torch.randn(k, n, generator=gen) for n in (m, c, c))
    g = d_row[..., None] * (z - row[..., None]).exp().nan_to_num(0) + d_col[:, None] * (
        z - col[:, None]
    ).exp().nan_to_num(0)
    j = torch.arange(c)[(torch.arange(c) + diagonal >= 0) & (torch.arange(c) + diagonal < m)]
    pos = torch.zeros(k, c)
    pos[:, j] = logits[:, j + diagonal, j].float()
    d_pos[:, j] = d_pos[:, j].masked_fill(torch.isneginf(z[:, j + diagonal, j]), 0)
    g[:, j + diagonal, j] += d_pos[:, j]
    dx, dy = (14.3 * torch.einsum(f"kmc,{other}", g, v.double()) for other, v in (("kcd->md", y), ("md->kcd", x)))
    dscale = (x.double() * dx).sum() / 14.3
    operands = dict(
        x=x, y=y, scale=scale, **masks, row=row.float(), col=col.float(), d_row=d_row, d_col=d_col, d_pos=d_pos, pos=pos
    )
    options = dict(backend="triton", full_precision=True, float32=KINDS[kind][1], needs_x=True, needs_y=True)
    options |= dict(saved_pairs=None, diagonal=diagonal, first_pair=0, stop_pair=c)
    with device(capability) as launches:
        got = torch.ops.dreamlip_kernels.bidirectional_logsumexp_backward(**operands, **options)
    assert len(launches) > 2 + 2 * k  # two of the coefficients, two for each chunk
    within(kind, (row, col, *got), (row, col, dx, dy, dscale), (x * dx).abs().sum().item() / 14.3)


@ALL
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_positives_carry_the_error_of_their_sums(monkeypatch, capability):
    """Three TF32 products, cut as a tensor core cuts them, at a scale where positives and sums nearly cancel: positives
    from products that were not cut took the scale's gradient to 1.1e-4, and on an H100 beyond its bound too."""
    monkeypatch.setattr(settings, "float32", "torch")
    with device(capability):
        errors = float32_errors("triton", 128, 2, 512)
    assert max(errors) < 2e-5, errors


@pytest.mark.parametrize("capability, scale", cases(set(), (80, 90), (14.3, 1000.0)))
def test_pairs_of_one_image(capability, scale):
    """Numbers of images compared in the tiles of every kernel."""
    with device(capability) as launches:
        promises.pairs_of_one_image_are_left_out("triton", torch.device("cpu"), scale)
    assert not any("resident" in launch.kernel for launch in launches), "it compares no images"


@pytest.mark.parametrize(
    "scale", [pytest.param(14.3, marks=pytest.mark.ptx), pytest.param(1000.0, marks=pytest.mark.ptx)]
)
def test_products_read_what_is_visible_to_them(scale):
    """On sm_90 a copy by threads is of another proxy than the product that reads it:
    a fence belongs between, or a box copy.
    """
    launches = check("bf16", 90, *features("bf16", 40, 70, 2, 80), scale)
    unfenced = {launch.kernel: launch.execution.unfenced_products for launch in launches}
    assert not any(unfenced.values()), unfenced


def test_another_architecture_says_what_is_unknown():
    """sm_100 multiplies by tcgen05, which the executor does not know, and says so."""
    x, y = features("bf16", 40, 40, 1, 64)
    with pytest.raises(UnknownInstruction, match=r"tcgen05\.\w+.*does not know"), device(100):
        dk.bidirectional_logsumexp(x, y, 14.3, backend="triton")
