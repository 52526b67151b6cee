"""group_patches and patch_weights against the float64 oracle, and the defined degenerate cases."""

import pytest
import torch
from numerics import value_and_grads
from patch_cases import compare, degenerate, region_like
from torch._subclasses.fake_tensor import FakeTensorMode

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.ops.group_patches import group_patches_torch
from dreamlip_kernels.ops.group_patches.group_patches import NORMALIZATIONS

BACKENDS = ["torch", "cpp"]
# (N, P, K, D): one of everything; tiny; B/32's and B/16's grids, with and without a class token;
# the widths of real towers; a width and a number of captions that fill no vector and no block.
SHAPES = [(1, 1, 1, 8), (3, 49, 3, 96), (4, 196, 8, 512), (2, 197, 1, 768), (5, 16, 8, 8), (2, 25, 13, 37)]


@pytest.mark.parametrize("n, p, k, d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_group_patches(n, p, k, d, dtype, normalization, backend):
    patches, texts = region_like(n, p, k, d, dtype, normalization=normalization)
    op = lambda x, t: dk.group_patches(x, t, normalization=normalization, backend=backend)  # noqa: E731
    oracle = lambda x, t: reference.group_patches(x, t, normalization=normalization)  # noqa: E731
    if p == 1:  # nothing to choose from: the value is the patch, its caption has no gradient
        assert (value_and_grads(op, (patches, texts))[2] == 0).all()
        op, oracle = (lambda x, f=f: f(x, texts.to(x.dtype)) for f in (op, oracle))
        return compare("pooled, dx", op, oracle, (patches,))
    compare("pooled, dx, dt", op, oracle, (patches, texts))


@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5, 0.9, -1.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_and_patch_masks(monkeypatch, normalization, threshold, padded, backend):
    monkeypatch.setattr(group_patches_torch, "CHUNK_VALUES", {"cpu": 2 * 49 * 16})  # two images a chunk
    patches, texts = region_like(5, 49, 4, 16, torch.float64, threshold if threshold > 0 else None, normalization)
    mask = torch.rand(5, 49, generator=torch.Generator().manual_seed(1)) > 0.3 if padded else None
    options = dict(threshold=threshold, normalization=normalization, patch_mask=mask)
    op = lambda x, t: dk.group_patches(x, t, backend=backend, **options)  # noqa: E731
    oracle = lambda x, t: reference.group_patches(x, t, **options)  # noqa: E731
    got, expected = value_and_grads(op, (patches, texts)), value_and_grads(oracle, (patches, texts))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-12, rtol=1e-10)
    if padded:
        assert (got[1][~mask] == 0).all(), "padding patches take no gradient"


@pytest.mark.parametrize(
    "case",
    [
        "one patch",
        "constant patches",
        "nothing kept",
        "zero text",
        "tie at the minimum",
        "no valid patch",
        "zero patch",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_cases_are_defined(case, dtype, backend):
    patches, texts, options = degenerate(case, dtype)
    got = value_and_grads(lambda x, t: dk.group_patches(x, t, backend=backend, **options), (patches, texts))
    gold = value_and_grads(lambda x, t: reference.group_patches(x, t, **options), (patches.double(), texts.double()))
    for g, e in zip(got, gold, strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g.double(), e, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=1e-4)
    uniform = {"one patch", "constant patches", "nothing kept", "zero text"}
    if case in uniform:
        expected = reference.unit(patches).mean(1, keepdim=True).expand(-1, 2, -1)
        torch.testing.assert_close(got[0], expected, atol=1e-6, rtol=1e-5)
        assert (got[2] == 0).all(), "uniform weights carry no gradient to the captions"
    if case == "no valid patch":
        assert (got[0][1] == 0).all() and (got[1][1] == 0).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_patch_weights(normalization, masked):
    patches, texts = region_like(3, 49, 4, 32, normalization=normalization)
    mask = torch.rand(3, 49, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    options = dict(normalization=normalization, patch_mask=mask)
    weights = dk.patch_weights(patches, texts, **options)
    gold = reference.patch_weights(patches.double(), texts.double(), **options)
    torch.testing.assert_close(weights.double(), gold, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))
    pooled = dk.group_patches(patches, texts, **options)
    torch.testing.assert_close(weights @ reference.unit(patches), pooled, atol=1e-5, rtol=1e-4)


def _loss(patches, texts, scale, contrast, normalization, backend):
    """The loss through one grouping backend; the contrast itself is torch's."""
    if contrast == "batch":
        return dk.group_patches(patches, texts, normalization=normalization, backend=backend).square().sum() * scale
    return dk.subcaption_grouping_loss(
        patches, texts, scale, contrast=contrast, normalization=normalization, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    patches, texts = region_like(3, 9, 3, 6, torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (patches, texts, scale)]
    for contrast in ("image", "batch"):
        for normalization in NORMALIZATIONS:
            fn = lambda x, t, s, c=contrast, n=normalization: _loss(x, t, s, c, n, backend)  # noqa: E731
            assert torch.autograd.gradcheck(fn, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    patches, texts = (t.requires_grad_() for t in region_like(3, 9, 2, 8))
    mask = torch.ones(3, 9, dtype=torch.bool)
    for threshold, patch_mask in ((None, None), (0.3, mask)):
        args = (patches, texts, threshold, "minmax", patch_mask, backend)
        torch.library.opcheck(torch.ops.dreamlip_kernels.group_patches.default, args)
    fn = lambda x, t: dk.group_patches(x, t, backend=backend)  # noqa: E731
    loss = lambda x, t: dk.subcaption_grouping_loss(x, t, 9.0, contrast="batch")  # noqa: E731
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(patches, texts), loss(patches, texts)
    )
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        value_and_grads(compiled, (patches, texts)), value_and_grads(fn, (patches, texts)), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fakes_have_the_strides_of_what_is_computed(backend):
    """Inductor lays memory out by the fake's strides, and opcheck does not compare them for inputs that are not
    contiguous.
    """
    patches, texts = region_like(3, 9, 2, 8)
    forward, backward = (
        getattr(torch.ops.dreamlip_kernels, f"group_patches{name}").default for name in ("", "_backward")
    )
    for x, t in ((patches.mT.contiguous().mT, texts), (patches, texts.transpose(0, 1).contiguous().transpose(0, 1))):
        _, w, inv_norm = outputs = forward(x, t, None, "minmax", None, backend)
        arguments = (x, t, w, inv_norm, None, "minmax", None, t, backend)
        with FakeTensorMode() as mode:
            fake = [v if v is None or isinstance(v, str) else mode.from_tensor(v) for v in arguments]
            expected = [*forward(*fake[:2], *arguments[4:7], backend), *backward(*fake)]
        for got, want in zip([*outputs, *backward(*arguments)], expected, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_empty_batch(backend):
    for d in (8, 64):
        patches, texts = region_like(4, 9, 3, d)
        fn = lambda x, t: dk.group_patches(x, t, backend=backend)  # noqa: E731
        same = value_and_grads(fn, (patches, texts))
        # [N, D, P] in memory, [K, N, D] in memory, a slice of wider rows, every second image
        wide = torch.randn(4, 9, d + 3)
        wide[..., 1 : d + 1] = patches
        doubled = torch.stack([patches, torch.zeros_like(patches)], 1).flatten(0, 1)
        for x in (patches.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 1 : d + 1], doubled[::2]):
            for got, expected in zip(value_and_grads(fn, (x, texts)), same, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        for got, expected in zip(
            value_and_grads(fn, (patches, texts.transpose(0, 1).contiguous().transpose(0, 1))), same, strict=True
        ):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        leaf = patches.clone().requires_grad_()
        fn(leaf, texts).sum().backward()  # the upstream gradient is one number, expanded
        one = patches.clone().requires_grad_()
        (fn(one, texts) * torch.ones(4, 3, d)).sum().backward()
        torch.testing.assert_close(leaf.grad, one.grad)
        assert fn(patches[:0], texts[:0]).shape == (0, 3, d)
    assert dk.subcaption_grouping_loss(patches[:0], texts[:0], 3.0) == 0


@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_image_stays_there(backend, normalization):
    patches, texts = region_like(3, 9, 2, 8)
    clean = dk.group_patches(patches, texts, normalization=normalization, backend=backend)
    patches[1, 4, 2] = torch.nan
    got = dk.group_patches(patches, texts, normalization=normalization, backend=backend)
    assert got[1].isnan().any() and torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_a_mask_has_no_effect(backend, normalization):
    patches, texts = region_like(3, 9, 2, 8, normalization=normalization)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    options = dict(normalization=normalization, patch_mask=mask)
    broken = patches.masked_fill(~mask[..., None], torch.nan)
    for op in (
        lambda x, t: dk.group_patches(x, t, backend=backend, **options),
        lambda x, t: reference.group_patches(x, t, **options),
    ):
        same = value_and_grads(op, (patches, texts))
        for got, expected in zip(value_and_grads(op, (broken, texts)), same, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_large_mean_gradient_leaves_the_sum_right():
    """float32: the softmax's gradients about a mean of 24 lost the captions' gradient (four times the allowed error),
    for their sum is near zero.
    """
    patches, texts = region_like(2, 197, 1, 768, normalization="softmax", threshold=0.0)
    options = dict(normalization="softmax", threshold=0.0)
    op = lambda x, t: dk.group_patches(x, t, backend="torch", **options)  # noqa: E731
    compare("pooled, dx, dt", op, lambda x, t: reference.group_patches(x, t, **options), (patches, texts))


@pytest.mark.parametrize("normalization", ["minmax", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_patches_pooled_as_they_are(normalization, dtype):
    """DreamLIP's eq. 7 prints the mean of raw patches; other backends say that they pool unit ones."""
    patches, texts = region_like(3, 49, 4, 32, dtype, normalization=normalization)
    mask = torch.rand(3, 49, generator=torch.Generator().manual_seed(1)) > 0.2 if dtype == torch.float64 else None
    options = dict(normalization=normalization, normalize_patches=False, patch_mask=mask)
    compare(
        "raw",
        lambda x, t: dk.group_patches(x, t, **options),
        lambda x, t: reference.group_patches(x, t, **options),
        (patches, texts),
    )
    for backend in ("cpp", "triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run: it pools patches of unit length"):
            dk.group_patches(patches, texts, normalize_patches=False, backend=backend)
    dk.group_patches(patches, texts, normalize_patches=False, backend="torch")
