"""group_patches, patch_weights and the grouping loss against the float64 oracle, and the defined degenerate cases."""

import math
from functools import partial

import pytest
import torch
from numerics import assert_no_worse_than_torch, three_ways, value_and_grads, worst_of
from patch_cases import compare, degenerate, region_like
from torch._subclasses.fake_tensor import FakeTensorMode

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.ops.group_patches import group_patches_torch
from dreamlip_kernels.ops.group_patches.group_patches import NORMALIZATIONS

BACKENDS = ["torch", "cpp"]
CONTRASTS = ["image", "batch", "conditioned"]
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


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("direction", ["both", "t2v"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss(contrast, direction, masked, scale):
    mask = None
    if masked:
        mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(4)) > 0.4
        mask[2], mask[3] = False, torch.tensor([1, 0, 0, 0, 0]).bool()
    options = dict(text_mask=mask, contrast=contrast, direction=direction)
    op = lambda x, t, s: dk.subcaption_grouping_loss(x, t, s, **options)  # noqa: E731
    oracle = lambda x, t, s: reference.subcaption_grouping_loss(x, t, s, **options)  # noqa: E731
    draws = [
        three_ways(op, oracle, (*region_like(6, 25, 5, 24, first_seed=100 * i), torch.tensor(scale))) for i in range(6)
    ]
    assert_no_worse_than_torch("loss", *worst_of(draws))


@pytest.mark.parametrize("candidates", [2, 3, 4, 9])
def test_images_that_a_sub_caption_picks_among(candidates):
    """Seven images: a short last block, a single image in one, all in one. An absent image and its captions, NaN and
    all, are nobody's candidates.
    """
    patches, texts = region_like(7, 25, 3, 24, torch.float64)
    image_mask = torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool()
    text_mask = torch.rand(7, 3, generator=torch.Generator().manual_seed(4)) > 0.3
    broken = patches.masked_fill(~image_mask[:, None, None], torch.nan)
    options = dict(contrast="conditioned", candidates=candidates, image_mask=image_mask, text_mask=text_mask)
    for direction in ("both", "t2v"):
        oracle, op = (
            partial(loss, logit_scale=9.0, direction=direction, **options)
            for loss in (reference.subcaption_grouping_loss, dk.subcaption_grouping_loss)
        )
        expected = value_and_grads(oracle, (patches, texts))
        for inputs in ((patches, texts), (broken, texts)):
            for got, gold in zip(value_and_grads(op, inputs), expected, strict=True):
                torch.testing.assert_close(got, gold)
    present = [i for i in range(7) if image_mask[i]]
    alone = dk.subcaption_grouping_loss(patches[present[:1]], texts[present[:1]], 9.0, contrast="conditioned")
    assert alone == 0, "an image alone in its block has nothing to be told from"


def test_a_code_of_the_patches_that_ignores_the_picture_is_no_answer():
    """Patches that are the same in every image and hold each caption: within the image, and over the batch's captions,
    that is nearly a perfect answer, which is what training at full weight found; asked for the image it is chance.
    """
    texts = region_like(8, 16, 2, 64)[1]
    codebook = reference.unit(texts).flatten(0, 1).expand(8, -1, -1)
    options = dict(threshold=0.9, direction="t2v")
    losses = [float(dk.subcaption_grouping_loss(codebook, texts, 50.0, contrast=c, **options)) for c in CONTRASTS]
    assert max(losses[:2]) < 0.05 and losses[2] == pytest.approx(math.log(4), abs=1e-4)


@pytest.mark.parametrize("candidates", [1, 0, -4, True, 2.0, None])
def test_candidates_that_are_none(candidates):
    patches, texts = region_like(2, 4, 2, 8)
    with pytest.raises(ValueError, match="candidates must be an integer of at least 2"):
        dk.subcaption_grouping_loss(patches, texts, 1.0, contrast="conditioned", candidates=candidates)
    with pytest.raises(ValueError, match="candidates"):
        dk.DreamLIPLoss(contrast="conditioned", candidates=candidates)


@pytest.mark.parametrize("contrast", ["image", "batch"])
def test_patches_of_an_autocast_tower_with_float32_captions(contrast):
    """bf16 patches, fp32 captions: pooled at the patches' precision, contrasted with the captions as they are."""
    patches, texts = region_like(6, 25, 5, 24, torch.bfloat16)
    texts = reference.unit(texts.float()).requires_grad_()
    patches.requires_grad_()
    loss = dk.subcaption_grouping_loss(patches, texts, 20.0, contrast=contrast)
    pooled = reference.unit(dk.group_patches(patches, texts.bfloat16()).float())
    if contrast == "image":
        z = 20.0 * pooled @ reference.unit(texts).mT
        diagonal = z.diagonal(dim1=1, dim2=2)
        expected = (z.logsumexp(2) + z.logsumexp(1) - 2 * diagonal).mean() / 2
    else:
        z = 20.0 * pooled.flatten(0, 1) @ reference.unit(texts).flatten(0, 1).T
        expected = (z.logsumexp(1) + z.logsumexp(0) - 2 * z.diagonal()).mean() / 2
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = torch.autograd.grad(loss, (patches, texts)), torch.autograd.grad(expected, (patches, texts))
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-2)
    widened = dk.subcaption_grouping_loss(patches.float(), texts.bfloat16(), 20.0, contrast=contrast)
    same = dk.subcaption_grouping_loss(patches.float(), texts.bfloat16().float(), 20.0, contrast=contrast)
    torch.testing.assert_close(widened, same)


def test_masked_captions_change_nothing_and_take_no_gradient():
    patches, texts = region_like(4, 16, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    for contrast in CONTRASTS:
        op = lambda x, t, c=contrast: dk.subcaption_grouping_loss(x, t, 5.0, text_mask=mask, contrast=c)  # noqa: E731
        garbled = torch.where(mask[..., None], texts, 100 * torch.randn_like(texts))
        first, second = value_and_grads(op, (patches, texts)), value_and_grads(op, (patches, garbled))
        torch.testing.assert_close(first[0], second[0])
        assert (second[2][~mask] == 0).all()
        none = dk.subcaption_grouping_loss(patches, texts, 5.0, text_mask=torch.zeros_like(mask), contrast=contrast)
        assert none == 0


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


def test_autocast_changes_nothing():
    inputs = region_like(3, 16, 3, 32)
    fn = lambda x, t: dk.subcaption_grouping_loss(x, t, 50.0)  # noqa: E731

    def forward_under_autocast(x, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fn(x, t)

    plain, under = value_and_grads(fn, inputs), value_and_grads(forward_under_autocast, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


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


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_nan_captions_behind_a_mask_have_no_effect(contrast):
    patches, texts = region_like(4, 16, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    broken = texts.masked_fill(~mask[..., None], torch.nan)
    for module in (dk, reference):

        def op(x, t, m=module):
            return m.subcaption_grouping_loss(x, t, 5.0, text_mask=mask, contrast=contrast)

        same = value_and_grads(op, (patches, texts))
        for got, expected in zip(value_and_grads(op, (patches, broken)), same, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_large_mean_gradient_leaves_the_sum_right():
    """float32: the softmax's gradients about a mean of 24 lost the captions' gradient (four times the allowed error),
    for their sum is near zero.
    """
    patches, texts = region_like(2, 197, 1, 768, normalization="softmax", threshold=0.0)
    options = dict(normalization="softmax", threshold=0.0)
    op = lambda x, t: dk.group_patches(x, t, backend="torch", **options)  # noqa: E731
    compare("pooled, dx, dt", op, lambda x, t: reference.group_patches(x, t, **options), (patches, texts))


def test_nan_features_show():
    patches, texts = region_like(3, 9, 2, 8)
    bad_patches, bad_texts = patches.clone(), texts.clone()
    bad_patches[1, 2, 3], bad_texts[1, 0, 0] = torch.nan, torch.nan
    assert dk.group_patches(bad_patches, texts)[1].isnan().any()
    assert dk.group_patches(patches, bad_texts)[1, 0].isnan().any()
    assert dk.subcaption_grouping_loss(patches, bad_texts, 3.0).isnan()


BAD = [
    (dict(patches=torch.randn(4, 0, 8)), "patch_features needs at least one patch"),
    (dict(texts=torch.randn(4, 0, 8)), "text_features needs at least one sub-caption"),
    (dict(patches=torch.randn(4, 9, 0), texts=torch.randn(4, 2, 0)), "need a width D of at least 1"),
    (dict(patches=torch.randn(4, 9, 7)), "share their last dimension D"),
    (dict(patches=torch.randn(5, 9, 8)), "must share N"),
    (dict(patches=torch.randn(4, 8)), "3 dimensions"),
    (dict(patch_mask=torch.ones(4, 8).bool()), "patch_mask must have shape"),
    (dict(patch_mask=torch.ones(4, 9)), "patch_mask must be a bool"),
    (dict(normalization="max"), "normalization must be one of"),
    (dict(threshold="high"), "threshold must be a number"),
    (dict(backend="abacus"), "unknown backend='abacus'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    arguments = dict(patches=torch.randn(4, 9, 8), texts=torch.randn(4, 2, 8)) | change
    patches, texts = arguments.pop("patches"), arguments.pop("texts")
    with pytest.raises(ValueError, match=message):
        dk.group_patches(patches, texts, **arguments)
    with pytest.raises(ValueError, match=message):
        dk.subcaption_grouping_loss(patches, texts, 1.0, **arguments)


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


def the_papers(patches, texts, scale, sigma, mask):
    """Eq. 6 to 8 one caption at a time: similarities over the threshold, the mean of raw patches, each sub-caption
    among the groups of its image.
    """
    terms = []
    for i in range(len(texts)):
        groups = []
        for t in texts[i]:
            w = torch.stack([torch.dot(t, p) / t.norm() / p.norm() for p in patches[i]])
            w = torch.where(w >= sigma, w, 0.0)
            groups.append((w / w.sum()) @ patches[i])
        kept = [k for k in range(len(groups)) if mask[i, k]]
        for k in kept:
            cosines = torch.stack([torch.cosine_similarity(texts[i, k], groups[j], dim=0) for j in kept])
            terms.append(torch.logsumexp(scale * cosines, 0) - scale * cosines[kept.index(k)])
    return torch.stack(terms).mean()


def the_releases(patches, texts, scale):
    """Its finegrained_loss without its mistakes: min-max over a threshold of 0, unit patches, a cross-entropy each way
    over all captions of the batch.
    """
    p, t = (torch.nn.functional.normalize(x, dim=-1) for x in (patches, texts))
    w = torch.einsum("btd,bpd->btp", t, p)
    w = (w - w.amin(-1, keepdim=True)) / (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True))
    groups = torch.nn.functional.normalize(w / w.sum(-1, keepdim=True) @ p, dim=-1).flatten(0, 1)
    z, labels = scale * t.flatten(0, 1) @ groups.T, torch.arange(t.shape[0] * t.shape[1])
    return (torch.nn.functional.cross_entropy(z, labels) + torch.nn.functional.cross_entropy(z.T, labels)) / 2


def test_the_papers_and_the_releases_grouping_loss():
    """Their forms, written out on their own, are options of the oracle and of the loss."""
    patches, texts = region_like(3, 25, 4, 16, torch.float64, 0.1, "none")
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.bool)
    paper = dict(normalization="none", normalize_patches=False, contrast="image", direction="t2v", threshold=0.1)
    release = dict(normalization="minmax", threshold=0.0, contrast="batch", direction="both")
    cases = [
        (lambda p, t: the_papers(p, t, 14.3, 0.1, mask), paper | {"text_mask": mask}),
        (lambda p, t: the_releases(p, t, 14.3), release),
    ]
    for by_hand, options in cases:
        expected = value_and_grads(by_hand, (patches, texts))
        for loss in (reference.subcaption_grouping_loss, dk.subcaption_grouping_loss):
            got = value_and_grads(lambda p, t, loss=loss, o=options: loss(p, t, 14.3, **o), (patches, texts))
            for g, e in zip(got, expected, strict=True):
                torch.testing.assert_close(g, e, atol=1e-11, rtol=1e-9)
