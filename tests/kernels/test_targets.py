"""Smoothed labels and images known to be the same, in the contrast and the sigmoid loss: against the oracle."""

import pytest
import torch
from numerics import assert_no_worse_than_torch, clip_like, three_ways

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops import tiles
from dreamlip_kernels.targets.same_image import image_numbers

N, K, D = 13, 3, 16
# Two images twice, one four times, others once; ids are any integers.
IDS = torch.tensor([4, -1, 4, 10**12, 7, 7, 0, 10**12, 3, 10**12, 5, 10**12, 6])
OPTIONS = [
    dict(label_smoothing=0.1),
    dict(image_ids=IDS, same_image="ignore"),
    dict(image_ids=IDS, same_image="ignore", label_smoothing=0.25),
    dict(image_ids=IDS, same_image="positive"),
    dict(image_ids=IDS, same_image="positive", label_smoothing=0.25),
]
MODES = [{}, dict(negatives="all"), dict(reduction="none")]
each_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{v}" for n, v in o.items() if n != "image_ids")
)


def masks():
    gen = torch.Generator().manual_seed(3)
    image_mask, text_mask = torch.rand(N, generator=gen) > 0.2, torch.rand(N, K, generator=gen) > 0.3
    text_mask[4] = False  # an image without captions, whose twin has some
    return dict(image_mask=image_mask, text_mask=text_mask)


def case(dtype, scale=14.3):
    return [v.to(dtype) for v in clip_like(N, K, D, noise=2.0)] + [torch.tensor(scale, dtype=dtype)]


@pytest.fixture
def many_tiles(monkeypatch):
    monkeypatch.setitem(tiles.TILE_LOGITS, "cpu", 16)


@each_option
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keeps", [False, True], ids=["recomputed", "kept"])
def test_the_contrast_in_float64(options, mode, masked, keeps, many_tiles, monkeypatch):
    monkeypatch.setattr(settings, "workspace_bytes", 2**30 if keeps else 8)
    options = {**options, **mode, **(masks() if masked else {})}
    for scale in (14.3, 100.0):
        got, _, gold = three_ways(
            lambda *v: dk.multi_positive_contrastive_loss(*v, **options),
            lambda *v: reference.multi_positive_contrastive_loss(*v, **options),
            case(torch.float64, scale),
        )
        for g, want in zip(got, gold, strict=True):
            torch.testing.assert_close(g, want, atol=1e-11, rtol=1e-10)


@each_option
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_sigmoid_loss_in_float64(options, masked, reduction, many_tiles):
    options = {**options, **(masks() if masked else {}), "reduction": reduction}
    inputs = [*case(torch.float64), torch.tensor(-7.0, dtype=torch.float64)]
    got, _, gold = three_ways(
        lambda *v: dk.multi_positive_sigmoid_loss(*v, **options),
        lambda *v: reference.multi_positive_sigmoid_loss(*v, **options),
        inputs,
    )
    for g, want in zip(got, gold, strict=True):
        torch.testing.assert_close(g, want, atol=1e-11, rtol=1e-10)
    value = dk.multi_positive_sigmoid_loss(*inputs, **options)  # without any gradient
    torch.testing.assert_close(value, gold[0], atol=1e-11, rtol=1e-10)


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_no_less_accurate_than_eager_code(loss, dtype, options):
    name = f"multi_positive_{loss}_loss"
    inputs = case(torch.float32)
    inputs = [*(v.to(dtype) for v in inputs[:2]), inputs[2]]
    bias = () if loss == "contrastive" else (-7.0,)

    def by(module):
        return lambda *v: getattr(module, name)(*v, *bias, **options, **masks())

    assert_no_worse_than_torch(name, *three_ways(by(dk), by(reference), inputs))


def test_the_sum_inside_the_logarithm():
    options = dict(negatives="all", positives="logsum", label_smoothing=0.1, image_ids=IDS, **masks())
    got, _, gold = three_ways(
        lambda *v: dk.multi_positive_contrastive_loss(*v, **options),
        lambda *v: reference.multi_positive_contrastive_loss(*v, **options),
        case(torch.float64),
    )
    for g, want in zip(got, gold, strict=True):
        torch.testing.assert_close(g, want, atol=1e-11, rtol=1e-10)


@each_option
@pytest.mark.parametrize("loss", [dk.multi_positive_contrastive_loss, dk.multi_positive_sigmoid_loss])
def test_gradcheck(loss, options):
    options = {**options, **({"image_ids": IDS[:4]} if "image_ids" in options else {})}
    inputs = [v[:4].clone() if v.ndim else v for v in case(torch.float64, 3.0)]
    inputs = [v.requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(lambda *v: loss(*v, **options), inputs)


@pytest.mark.parametrize("same_image", ["ignore", "positive"])
@pytest.mark.parametrize("loss", [dk.multi_positive_contrastive_loss, dk.multi_positive_sigmoid_loss])
def test_images_that_are_all_others_change_nothing(loss, same_image):
    inputs = [v.requires_grad_() for v in case(torch.float64)]
    plain, other = loss(*inputs), loss(*inputs, image_ids=torch.arange(N).flip(0), same_image=same_image)
    torch.testing.assert_close(other, plain)
    for got, want in zip(torch.autograd.grad(other, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(got, want)


BACKENDS = ["torch"] + ["triton"] * (dispatch.why_not("sigmoid_pairs", "triton", torch.ones(1)) is None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_an_image_whose_only_candidate_is_its_own_caption(backend, smoothing):
    """All images are the same: nothing is left to tell apart, the loss is 0 and so is every gradient."""
    inputs = [v.requires_grad_() for v in case(torch.float32)]
    loss = dk.multi_positive_contrastive_loss(
        *inputs, image_ids=torch.zeros(N, dtype=torch.int64), label_smoothing=smoothing, backend=backend
    )
    assert loss.abs() < 1e-5
    for grad in torch.autograd.grad(loss, inputs):
        assert grad.isfinite().all() and grad.abs().max() < 1e-5


def test_numbers_of_images():
    numbers = image_numbers(IDS)
    assert numbers.dtype == torch.int32 and numbers.min() >= 0 and numbers.max() < N
    assert torch.equal(numbers[:, None] == numbers, IDS[:, None] == IDS)
    assert image_numbers(IDS[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["multi_positive_contrastive_loss", "multi_positive_sigmoid_loss"])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(image_ids=IDS[1:]), r"image_ids must have shape \(13,\), one an image, got \(12,\)"),
        (dict(image_ids=IDS.int()), r"image_ids must be an int64 tensor, got torch.int32; use image_ids.long\(\)"),
        (dict(image_ids=IDS.to("meta")), "image_ids must be on cpu like the features, got meta"),
        (dict(label_smoothing=-0.1), "label_smoothing must be a number at least 0 and below 1, got -0.1"),
        (dict(label_smoothing=1.0), "label_smoothing must be a number at least 0 and below 1, got 1.0"),
        (dict(label_smoothing=float("nan")), "got nan"),
        (dict(label_smoothing=True), "got True"),
        (dict(same_image="drop"), r"same_image must be one of \('ignore', 'positive'\), got 'drop'"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}" if message[0] != "g" else message):
        getattr(dk, name)(*case(torch.float32), **options)


def test_what_does_not_go_together():
    options = dict(negatives="all", positives="logsum", same_image="positive")
    with pytest.raises(ValueError, match="same_image='positive' needs positives='mean'"):
        dk.multi_positive_contrastive_loss(*case(torch.float32), image_ids=IDS, **options)
    with pytest.raises(ValueError, match="label_smoothing must be"):
        dk.MultiPositiveContrastiveLoss(label_smoothing=1)
    with pytest.raises(ValueError, match="same_image must be"):
        dk.DreamLIPLoss(pairs="sigmoid", same_image="drop")


@pytest.mark.parametrize("pairs", ["softmax", "sigmoid"])
def test_modules_pass_the_options_on(pairs):
    image, text, scale = case(torch.float32)
    fn = dk.multi_positive_contrastive_loss if pairs == "softmax" else dk.multi_positive_sigmoid_loss
    bias = () if pairs == "softmax" else (torch.tensor(-3.0),)
    options = dict(label_smoothing=0.1, same_image="positive")
    expected = fn(image, text, scale, *bias, image_ids=IDS, **options)
    whole = dk.DreamLIPLoss(pairs=pairs, grouping_weight=0, **options)
    assert torch.equal(whole(image, text, scale, *bias, image_ids=IDS), expected)
    assert "same_image='positive'" in repr(whole) and "label_smoothing=0.1" in repr(whole)


def test_the_sigmoid_module_asks_for_its_backend():
    """The module once took a backend and never passed it on."""
    loss = dk.MultiPositiveSigmoidLoss(backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: it computes in float32 or less|not installed"):
        loss(*case(torch.float64))


@each_option
def test_compiled_whole(options):
    def loss(image, text, scale):
        return dk.multi_positive_contrastive_loss(image, text, scale, **options) + dk.multi_positive_sigmoid_loss(
            image, text, scale, **options
        )

    inputs = [v.requires_grad_() for v in case(torch.float32)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@each_option
def test_on_the_meta_device(options):
    options = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    inputs = [v.to("meta").requires_grad_() for v in case(torch.float32)]
    for loss in (dk.multi_positive_contrastive_loss, dk.multi_positive_sigmoid_loss):
        grads = torch.autograd.grad(loss(*inputs, **options), inputs)
        assert [g.shape for g in grads] == [v.shape for v in inputs]
