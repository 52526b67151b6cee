"""The grouping loss against the float64 oracle, the paper's form of it and the release's."""

import math
from functools import partial

import pytest
import torch
from numerics import assert_no_worse_than_torch, three_ways, value_and_grads, worst_of
from patch_cases import region_like

import dreamlip_kernels as dk
from dreamlip_kernels import reference

CONTRASTS = ["image", "batch", "conditioned"]


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


def test_autocast_changes_nothing():
    inputs = region_like(3, 16, 3, 32)
    fn = lambda x, t: dk.subcaption_grouping_loss(x, t, 50.0)  # noqa: E731

    def forward_under_autocast(x, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fn(x, t)

    plain, under = value_and_grads(fn, inputs), value_and_grads(forward_under_autocast, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


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
