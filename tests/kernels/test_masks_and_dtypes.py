"""What every loss does with images that only fill a batch, and with features of two dtypes."""

import pytest
import torch
from numerics import clip_like

import dreamlip_kernels as dk
from dreamlip_kernels import reference

N, K, D = 10, 3, 16
IMAGES = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
LOSSES = {
    "slot": lambda m, i, p, t, **o: m.multi_positive_contrastive_loss(i, t, 9.0, **o),
    "all": lambda m, i, p, t, **o: m.multi_positive_contrastive_loss(i, t, 9.0, negatives="all", **o),
    "logsum": lambda m, i, p, t, **o: m.multi_positive_contrastive_loss(
        i, t, 9.0, negatives="all", positives="logsum", **o
    ),
    "sigmoid": lambda m, i, p, t, **o: m.multi_positive_sigmoid_loss(i, t, 9.0, -5.0, **o),
    "grouping": lambda m, i, p, t, **o: m.subcaption_grouping_loss(p, t, 9.0, **o),
    "grouping-batch": lambda m, i, p, t, **o: m.subcaption_grouping_loss(p, t, 9.0, contrast="batch", **o),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def case():
    image, text = clip_like(N, K, D)
    patches = torch.randn(N, 9, D, generator=torch.Generator().manual_seed(1))
    return image, patches, text


def grads(loss, inputs, module=dk, **options):
    leaves = [v.detach().clone().requires_grad_() for v in inputs]
    value = loss(module, *leaves, **options)
    return value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


@each_loss
@pytest.mark.parametrize("captions_too", [False, True])
def test_image_mask(loss, captions_too):
    """As in the oracle; as without those images; and whatever they hold, a NaN too, has no effect."""
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(2)) > 0.3 if captions_too else None
    options = dict(image_mask=IMAGES, text_mask=mask)
    inputs = case()
    got = grads(loss, inputs, **options)
    gold = grads(loss, [v.double() for v in inputs], reference, **options)
    for g, e in zip(got, gold, strict=True):
        torch.testing.assert_close(g.double(), e, atol=1e-6, rtol=1e-4)
    fewer = grads(loss, [v[IMAGES] for v in inputs], text_mask=None if mask is None else mask[IMAGES])
    torch.testing.assert_close(got[0], fewer[0])
    for g, e in zip(got[1:], fewer[1:], strict=True):
        torch.testing.assert_close(g[IMAGES], e)
        assert (g[~IMAGES] == 0).all()
    garbled = [torch.where(IMAGES.view(-1, *[1] * (v.ndim - 1)), v, torch.nan) for v in inputs]
    for g, e in zip(grads(loss, garbled, **options), got, strict=True):
        torch.testing.assert_close(g, e)


@each_loss
@pytest.mark.parametrize("wide", ["image", "text"])
def test_two_dtypes_meet_in_the_wider(loss, wide):
    """float32 images with bfloat16 captions, as autocast gives them: ClipLoss takes them.
    Gradients come back in each one's dtype.
    """
    image, patches, text = case()
    narrow = torch.bfloat16
    image, patches, text = (
        (image, patches, text.to(narrow)) if wide == "image" else (image.to(narrow), patches.to(narrow), text)
    )
    got = grads(loss, (image, patches, text))
    assert [g.dtype for g in got[1:]] == [image.dtype, patches.dtype, text.dtype]
    expected = grads(loss, (image.float(), patches.float(), text.float()))
    for g, e in zip(got, expected, strict=True):
        assert (g.float() - e).norm() <= 0.02 * e.norm() + 1e-6


def test_the_ops_promote():
    image, patches, text = case()
    row, col = dk.bidirectional_logsumexp(image.bfloat16(), text.transpose(0, 1), 9.0)
    expected = dk.bidirectional_logsumexp(image.bfloat16().float(), text.transpose(0, 1), 9.0)
    assert torch.equal(row, expected[0]) and torch.equal(col, expected[1])
    pooled = dk.group_patches(patches.bfloat16(), text)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, dk.group_patches(patches.bfloat16().float(), text))
    assert dk.patch_weights(patches.half(), text.bfloat16()).dtype == torch.float32


def test_image_mask_is_checked():
    image, _, text = case()
    with pytest.raises(ValueError, match="image_mask must have shape .10,., got .9,."):
        dk.multi_positive_contrastive_loss(image, text, 9.0, image_mask=IMAGES[:9])
