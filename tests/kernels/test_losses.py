"""The loss modules: a one-line swap for the real open_clip ClipLoss, and the weighted terms its training loop sums."""

import math
import warnings

import pytest
import torch
from numerics import clip_like, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch

OPEN_CLIP_ARGUMENTS = dict(
    local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False
)


@pytest.fixture
def features():
    image, text = clip_like(12, 4, 16)
    patches = torch.randn(12, 9, 16, generator=torch.Generator().manual_seed(0))
    return image, text, patches


@pytest.mark.parametrize("module", [dk.MultiPositiveContrastiveLoss, dk.DreamLIPLoss])
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.filterwarnings("ignore:DreamLIPLoss")
def test_one_line_swap_for_clip_loss(module, output_dict):
    """What open_clip_train does: model -> dict -> ``loss(**model_out, output_dict=True)`` -> sum of the values."""
    open_clip = pytest.importorskip("open_clip", reason="the train extra is not installed")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, patch_size=16, width=32, head_width=16, layers=1),
        text_cfg=dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1),
        output_dict=True,
    )
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 63, (6, 8))
    grads = []
    for loss_module in (open_clip.ClipLoss(**OPEN_CLIP_ARGUMENTS), module(**OPEN_CLIP_ARGUMENTS)):
        out = loss_module(**model(images, tokens), output_dict=output_dict)
        total = sum(out.values()) if output_dict else out
        grads.append((total.detach(), *torch.autograd.grad(total, tuple(model.parameters()))))
        if output_dict:
            assert set(out) == {"contrastive_loss"}
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_positional_arguments_are_clip_loss_s():
    for module in (dk.MultiPositiveContrastiveLoss, dk.DreamLIPLoss, dk.SubcaptionGroupingLoss):
        module(True, True, False, 0, 1, False)


def test_dreamlip_loss_is_the_weighted_sum(features):
    image, text, patches = features
    mask = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) > 0.3
    module = dk.DreamLIPLoss(
        mpcl_weight=0.5, grouping_weight=2.0, negatives="all", threshold=0.3, contrast="batch", direction="t2v"
    )
    options = dict(patch_features=patches, text_mask=mask)
    terms = module(image, text, 10.0, output_dict=True, logit_scale_local=5.0, **options)
    expected = {
        "contrastive_loss": 0.5
        * dk.multi_positive_contrastive_loss(image, text, 10.0, text_mask=mask, negatives="all"),
        "grouping_loss": 2.0
        * dk.subcaption_grouping_loss(
            patches, text, 5.0, text_mask=mask, threshold=0.3, contrast="batch", direction="t2v"
        ),
    }
    assert set(terms) == set(expected)
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name])
    torch.testing.assert_close(module(image, text, 10.0, logit_scale_local=5.0, **options), sum(expected.values()))
    shared = module(image, text, 10.0, output_dict=True, **options)["grouping_loss"]
    assert shared != terms["grouping_loss"], "without logit_scale_local the grouping term takes logit_scale"


def test_gradients_reach_every_input(features):
    module = dk.DreamLIPLoss()
    image, text, patches = features
    fn = lambda i, t, p, s, sl: module(i, t, s, patch_features=p, logit_scale_local=sl)  # noqa: E731
    _, *grads = value_and_grads(fn, (image, text, patches, torch.tensor(10.0), torch.tensor(7.0)))
    assert all(g.abs().max() > 1e-6 for g in grads)


def test_no_patch_features_is_said_once(features):
    image, text, _ = features
    module = dk.DreamLIPLoss()
    with pytest.warns(UserWarning, match="no patch_features"):
        loss = module(image, text, 10.0)
    torch.testing.assert_close(loss, dk.multi_positive_contrastive_loss(image, text, 10.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.DreamLIPLoss(grouping_weight=0)(image, text, 10.0)
    with pytest.raises(ValueError, match="patch_features"):
        dk.DreamLIPLoss(mpcl_weight=0)(image, text, 10.0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_are_the_oracles(features, reduction):
    image, text, patches = (v.double() for v in features)
    options = dict(text_mask=torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) > 0.3, reduction=reduction)
    for name, inputs in (
        ("multi_positive_contrastive_loss", (image, text)),
        ("subcaption_grouping_loss", (patches, text)),
        ("multi_positive_sigmoid_loss", (image, text)),
    ):
        fn, oracle = ((lambda *v, f=f: f(*v, 10.0, **options)) for f in (getattr(dk, name), getattr(reference, name)))
        expected = oracle(*inputs)
        torch.testing.assert_close(fn(*inputs), expected)
        assert expected.shape == ((12, 4) if reduction == "none" else ())
        results = [value_and_grads(lambda *v, f=f: f(*v).square().sum(), inputs) for f in (fn, oracle)]
        torch.testing.assert_close(*results)
    module = dk.DreamLIPLoss(reduction=reduction)
    terms = module(image, text, 10.0, patch_features=patches, text_mask=options["text_mask"], output_dict=True)
    both = dk.multi_positive_contrastive_loss(image, text, 10.0, **options)
    torch.testing.assert_close(terms["contrastive_loss"], both)
    torch.testing.assert_close(terms["grouping_loss"], dk.subcaption_grouping_loss(patches, text, 10.0, **options))
    sigmoid = dk.DreamLIPLoss(pairs="sigmoid", reduction=reduction, grouping_weight=0.5)
    both = dk.multi_positive_sigmoid_loss(image, text, 10.0, -3.0, **options) + 0.5 * terms["grouping_loss"]
    torch.testing.assert_close(
        sigmoid(image, text, 10.0, -3.0, patch_features=patches, text_mask=options["text_mask"]), both
    )
    with pytest.raises(ValueError, match="reduction must be one of .'mean', 'sum', 'none'"):
        dk.DreamLIPLoss(reduction="median")


def test_each_captions_sigmoid_loss_is_torch_code_alone(features):
    image, text, _ = features
    with pytest.raises(ValueError, match="MultiPositiveSigmoidLoss: reduction='none' is torch code alone, got"):
        dk.MultiPositiveSigmoidLoss(reduction="none", backend="triton")
    with pytest.raises(ValueError, match="multi_positive_sigmoid_loss: reduction='none' is torch code alone"):
        dk.multi_positive_sigmoid_loss(image, text, 10.0, reduction="none", backend="triton")
    assert dk.multi_positive_sigmoid_loss(image, text, 10.0, reduction="none", backend="torch").shape == (12, 4)


def test_open_clips_newest_sigmoid_arguments_are_taken(features):
    """Its SigLipLoss has five positional arguments since 2026; the fifth bounds its memory, which is bounded here."""
    image, text, _ = features
    ours = dk.MultiPositiveSigmoidLoss(True, 0, 1, "gather", 64)(image, text, 10.0, -10.0)
    assert ours == dk.multi_positive_sigmoid_loss(image, text, 10.0, -10.0)


def test_logit_bias_cancels(features):
    image, text, _ = features
    module = dk.MultiPositiveContrastiveLoss()
    assert module(image, text, 10.0, torch.tensor(-3.0)) == module(image, text, 10.0)


def test_logit_scale_of_shape_one_gets_its_gradient(features):
    image, text, _ = features
    scale = torch.tensor([10.0], requires_grad=True)
    dk.MultiPositiveContrastiveLoss()(image, text, scale).backward()
    assert scale.grad.shape == (1,) and scale.grad.abs() > 1e-6


def test_bad_construction_is_named():
    with pytest.raises(ValueError, match="use_horovod"):
        dk.MultiPositiveContrastiveLoss(use_horovod=True)
    with pytest.raises(ValueError, match="world_size=4"):
        dk.DreamLIPLoss(rank=1, world_size=4)
    with pytest.raises(ValueError, match="grouping_weight"):
        dk.DreamLIPLoss(grouping_weight=-1)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: dk.MultiPositiveContrastiveLoss(negatives="none"),
            "MultiPositiveContrastiveLoss: negatives must be one of",
        ),
        (lambda: dk.DreamLIPLoss(positives="logsum"), "positives='logsum' needs negatives='all'"),
        (lambda: dk.SubcaptionGroupingLoss(contrast="world"), "SubcaptionGroupingLoss: contrast must be one of"),
        (lambda: dk.DreamLIPLoss(normalization="max"), "normalization must be one of"),
        (lambda: dk.DreamLIPLoss(threshold="high"), "threshold must be a number"),
        (lambda: dk.MultiPositiveSigmoidLoss(dist_impl="ring"), "dist_impl must be one of .'bidir', 'shift'"),
        (lambda: dk.MultiPositiveSigmoidLoss(backend="cpp"), "sigmoid_pairs has no backend 'cpp'"),
    ],
)
def test_options_are_checked_when_built(build, message):
    """They were checked at the first step: after the towers had been loaded."""
    with pytest.raises(ValueError, match=message):
        build()


def test_modules_say_what_they_are():
    text = repr(dk.DreamLIPLoss(grouping_weight=0.5, negatives="all", contrast="batch"))
    for part in ("grouping_weight=0.5", "negatives='all'", "contrast='batch'", "grouping_backend='auto'"):
        assert part in text


def test_the_image_mask_reaches_both_terms(features):
    image, text, patches = features
    mask = torch.arange(12) < 9
    for pairs in ("softmax", "sigmoid"):
        module = dk.DreamLIPLoss(pairs=pairs)
        masked = module(image, text, 10.0, patch_features=patches, image_mask=mask)
        torch.testing.assert_close(masked, module(image[:9], text[:9], 10.0, patch_features=patches[:9]))


@pytest.mark.parametrize("direct", [False, True])
def test_forward_mode_is_refused(features, direct):
    """torch.func.jvp gave a derivative of 0.0."""
    image, text, patches = features
    loss = dk.DreamLIPLoss()
    with pytest.raises(NotImplementedError, match="image_features carries a tangent"):
        if direct:
            with torch.autograd.forward_ad.dual_level():
                loss(torch.autograd.forward_ad.make_dual(image, image), text, 10.0, patch_features=patches)
        else:
            torch.func.jvp(lambda i: loss(i, text, 10.0, patch_features=patches), (image,), (image,))


def test_transforms_of_torch_func_are_refused(features):
    image, text, _ = features
    with pytest.raises(NotImplementedError, match="image_features is inside a transform of torch.func"):
        torch.func.grad(lambda i: dk.MultiPositiveContrastiveLoss()(i, text, 10.0))(image)


@pytest.mark.parametrize("contrast", ["image", "batch"])
def test_the_meta_device(features, contrast):
    image, text, patches = (v.to("meta").requires_grad_() for v in features)
    loss = dk.DreamLIPLoss(contrast=contrast)(image, text, 10.0, patch_features=patches)
    loss.backward()
    assert loss.is_meta and image.grad.shape == image.shape and patches.grad.shape == patches.shape
    assert dk.multi_positive_sigmoid_loss(image, text, 10.0).is_meta


def test_each_op_has_a_backend_of_its_own(features, monkeypatch):
    """``backend="cpp"`` was refused, for the contrast has none of that name: the compiled pooling could not be
    chosen.
    """
    taken = []
    real = dispatch.select
    monkeypatch.setattr(
        dispatch, "select", lambda op, x, name="auto", **sizes: taken.append((op, name)) or real(op, x, name, **sizes)
    )
    image, text, patches = features
    loss = dk.DreamLIPLoss(backend="torch")(image, text, 10.0, patch_features=patches)
    for options, contrast, pooling in (
        (dict(backend="cpp"), "auto", "cpp"),
        (dict(contrastive_backend="torch", grouping_backend="cpp"), "torch", "cpp"),
        (dict(backend="torch", grouping_backend="auto"), "torch", "auto"),
    ):
        taken.clear()
        torch.testing.assert_close(dk.DreamLIPLoss(**options)(image, text, 10.0, patch_features=patches), loss)
        assert taken == [("bidirectional_logsumexp", contrast), ("group_patches", pooling)]
        dk.SubcaptionGroupingLoss(contrast="batch", **options)(patches, text, 10.0)
        assert taken[2:] == [("bidirectional_logsumexp", contrast), ("group_patches", pooling)]
    with pytest.raises(ValueError, match="DreamLIPLoss: unknown backend='abacus'; choose from .'auto', 'cpp'"):
        dk.DreamLIPLoss(backend="abacus")
    with pytest.raises(ValueError, match="bidirectional_logsumexp has no backend 'cpp'"):
        dk.DreamLIPLoss(contrastive_backend="cpp")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mpcl_weight=math.nan), "must be finite, >= 0 and not both 0, got nan and 1.0"),  # was no contrast at all
        (dict(grouping_weight=math.inf), "must be finite"),
        (dict(mpcl_weight=0, grouping_weight=0), "not both 0"),
        (dict(threshold=math.nan), "threshold must be a number or None .*, got nan"),
        (dict(threshold="0.5"), "threshold must be a number or None .*, got '0.5'"),
        (dict(normalization="max"), "normalization must be one of"),
        (dict(contrast="world"), "contrast must be one of"),
    ],
)
def test_options_are_checked_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        dk.DreamLIPLoss(**options)
