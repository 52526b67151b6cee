"""The multi-positive sigmoid loss against the float64 oracle, the real SigLipLoss, and what a user may give it."""

import pytest
import torch
from numerics import assert_no_worse_than_torch, clip_like, three_ways, value_and_grads
from torch.utils._python_dispatch import TorchDispatchMode

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.backends.settings import settings
from dreamlip_kernels.ops import tiles
from dreamlip_kernels.ops.sigmoid_pairs import sigmoid_pairs, sigmoid_pairs_torch

TRITON = dispatch.TRITON_INSTALLED and dispatch.ADDS_SIXTEEN_BIT_PRODUCTS and not torch.cuda.is_available()
triton_only = pytest.mark.skipif(
    not TRITON, reason="Triton's interpreter, from torch 2.10 on; with a CUDA device the kernels are compiled"
)
BACKENDS = ["torch", pytest.param("triton", marks=triton_only)]
SHAPES = [(1, 1, 8), (3, 2, 8), (37, 5, 96), (65, 8, 123)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of about 16 x 16, so that an image's captions lie on both sides of many edges."""
    monkeypatch.setattr(tiles, "TILE_LOGITS", {"cpu": 2**8})


def case(n, k, d, dtype=torch.float32):
    image, text = clip_like(n, k, d, dtype)
    return image, text, torch.tensor(14.3, dtype=dtype), torch.tensor(-4.0, dtype=dtype)


class CountProducts(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func._schema.name in ("aten::mm", "aten::matmul", "aten::addmm_")
        return func(*args, **(kwargs or {}))


def rough(got, gold, bound):
    """Every value and gradient within ``bound`` of its norm: what 16-bit operands allow."""
    for g, e in zip(got, gold, strict=True):
        assert (g.double() - e).norm() <= bound * e.norm(), ((g.double() - e).norm() / e.norm()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n, k, d", SHAPES)
def test_against_the_oracle(small_tiles, n, k, d, dtype, masked):
    mask = torch.rand(n, k, generator=torch.Generator().manual_seed(3)) > 0.3 if masked and n > 1 else None
    ways = three_ways(
        lambda *inputs: dk.multi_positive_sigmoid_loss(*inputs, text_mask=mask),
        lambda *inputs: reference.multi_positive_sigmoid_loss(*inputs, text_mask=mask),
        case(n, k, d, dtype),
    )
    assert_no_worse_than_torch("sigmoid loss", *ways)


@pytest.mark.parametrize("scale, bias", [(0.01, 0.0), (100.0, -10.0), (1000.0, 50.0), (-5.0, 3.0)])
def test_any_finite_input_is_right(small_tiles, scale, bias):
    """Confident positives, whose loss is a small difference of large numbers to code that adds softplus and subtracts
    z; and opposed vectors.
    """
    image, text = clip_like(40, 3, 64, torch.float64, noise=0.1)
    text[:5] = -text[:5]
    inputs = (image, text, torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64))
    got = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i), [x.float() for x in inputs])
    low = value_and_grads(lambda *i: reference.multi_positive_sigmoid_loss(*i), [x.float() for x in inputs])
    gold = value_and_grads(lambda *i: reference.multi_positive_sigmoid_loss(*i), [x.float().double() for x in inputs])
    assert_no_worse_than_torch("sigmoid loss", got, low, gold)


def test_one_caption_is_siglip():
    image, text, scale, bias = case(24, 1, 32)
    ours = value_and_grads(
        lambda i, t, s, b: dk.MultiPositiveSigmoidLoss()(i, t, s, b), (image, text[:, 0], scale, bias)
    )
    loss = pytest.importorskip("open_clip.loss", reason="the train extra is not installed").SigLipLoss()
    theirs = value_and_grads(lambda i, t, s, b: loss(i, t, s, b), (image, text[:, 0], scale, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    loss = dk.MultiPositiveSigmoidLoss(False, 0, 1, "gather")(image, text, scale, output_dict=True)
    torch.testing.assert_close(loss["contrastive_loss"], dk.multi_positive_sigmoid_loss(image, text, scale))


def test_as_the_contrast_of_dreamlip_loss():
    image, text, scale, bias = case(8, 3, 16)
    mask = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    loss = dk.DreamLIPLoss(pairs="sigmoid", grouping_weight=0.0, mpcl_weight=0.5)(
        image, text, scale, bias, text_mask=mask
    )
    torch.testing.assert_close(loss, 0.5 * dk.multi_positive_sigmoid_loss(image, text, scale, bias, text_mask=mask))
    with pytest.raises(ValueError, match="pairs must be one of"):
        dk.DreamLIPLoss(pairs="softmin")
    with pytest.raises(ValueError, match="no meaning with pairs='sigmoid'"):
        dk.DreamLIPLoss(pairs="sigmoid", negatives="all")


def test_nothing_present_is_zero_with_zero_gradients():
    image, text, scale, bias = case(4, 2, 8)
    mask = torch.zeros(4, 2, dtype=torch.bool)
    values = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, text_mask=mask), (image, text, scale, bias))
    assert all(torch.equal(v, torch.zeros_like(v)) for v in values)


def test_gradcheck(small_tiles):
    inputs = [x.requires_grad_() for x in case(7, 3, 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *i: dk.multi_positive_sigmoid_loss(*i), inputs)


def test_opcheck():
    image, text, scale, bias = (x.requires_grad_() for x in case(6, 2, 8))
    captions = text.detach().flatten(0, 1).requires_grad_()
    for mask, needs in ((None, (True, True, True)), (torch.ones(12, dtype=torch.bool), (True, False, True))):
        args = (image, captions, scale, bias, None, mask, 0, 2, *needs, "torch", "torch")
        if all(needs):
            torch.library.opcheck(torch.ops.dreamlip_kernels.sigmoid_pairs.default, args)
        else:
            torch.library.opcheck(
                torch.ops.dreamlip_kernels.sigmoid_pairs.default,
                [v.detach() if isinstance(v, torch.Tensor) else v for v in args],
            )


def test_nan_features_show_in_the_loss():
    image, text, scale, bias = case(6, 2, 8)
    image[2, 3] = torch.nan
    assert dk.multi_positive_sigmoid_loss(image, text, scale, bias).isnan()


def test_repeats_are_bit_equal():
    inputs = case(130, 8, 64)
    first, second = (value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BAD = [
    (dict(image=torch.randn(4, 3)), "share their last dimension D"),
    (dict(image=torch.randn(5, 8)), "must share N"),
    (dict(text=torch.randn(4, 8)), "3 dimensions"),
    (dict(bias=torch.ones(2)), "logit_bias must hold one value"),
    (dict(text_mask=torch.ones(4, 2)), "bool"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    arguments = dict(image=torch.randn(4, 8), text=torch.randn(4, 2, 8), bias=0.0) | change
    image, text, bias = (arguments.pop(name) for name in ("image", "text", "bias"))
    with pytest.raises(ValueError, match=message):
        dk.multi_positive_sigmoid_loss(image, text, 3.0, bias, **arguments)


@pytest.mark.parametrize(
    "frozen", [(), ("image",), ("text",), ("image", "text"), ("scale",), ("image", "text", "scale", "bias")]
)
def test_what_is_frozen_costs_nothing(monkeypatch, frozen):
    """Matrix products of a step: three, two with a frozen side, one at inference; and the other gradients are the
    same.
    """
    names = ("image", "text", "scale", "bias")
    inputs = dict(zip(names, case(40, 4, 16), strict=True))
    all_needed = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    expected = torch.autograd.grad(dk.multi_positive_sigmoid_loss(*all_needed.values()), all_needed.values())
    everything = dict(zip(names, expected, strict=True))
    leaves = {name: v.clone().requires_grad_(name not in frozen) for name, v in inputs.items()}
    counted = CountProducts()

    def forward(*arguments):  # inside the op, where a mode of the caller does not reach
        with counted:
            return sigmoid_pairs_torch.forward(*arguments)

    monkeypatch.setitem(sigmoid_pairs._FORWARD, "torch", forward)
    loss = dk.multi_positive_sigmoid_loss(*leaves.values())
    wanted = [v for v in leaves.values() if v.requires_grad]
    grads = torch.autograd.grad(loss, wanted) if wanted else ()
    products = 1 + ("image" not in frozen) + ("text" not in frozen)
    if frozen == ("image", "text"):
        products = 2  # the scale's gradient needs the logits once more
    assert counted.products == products
    for name, grad in zip([n for n in names if n not in frozen], grads, strict=True):
        torch.testing.assert_close(grad, everything[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_a_mask_has_no_effect(backend):
    image, text, scale, bias = case(6, 3, 16)
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    loss = lambda i, t: dk.multi_positive_sigmoid_loss(i, t, scale, bias, text_mask=mask, backend=backend)  # noqa: E731
    same = value_and_grads(loss, (image, text))
    broken = value_and_grads(loss, (image, text.masked_fill(~mask[..., None], torch.nan)))
    for got, want in zip(broken, same, strict=True):
        torch.testing.assert_close(got, want)


# The kernel's chunks and tiles: whole, many, with rests, a caption's image in another tile; a width that needs padding.
@triton_only
@pytest.mark.parametrize("n, k, d, workspace", [(1, 1, 8, 2**29), (37, 5, 24, 2**29), (70, 3, 123, 2**20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_triton(monkeypatch, n, k, d, workspace, dtype, masked):
    monkeypatch.setattr(settings, "workspace_bytes", workspace)
    monkeypatch.setattr(settings, "float32", "fp16")
    mask = torch.rand(n, k, generator=torch.Generator().manual_seed(3)) > 0.3 if masked and n > 1 else None
    if mask is not None:  # a column of a table
        mask = torch.stack([mask, ~mask], -1)[..., 0]
    inputs = case(n, k, d, dtype)
    op = lambda *i: dk.multi_positive_sigmoid_loss(*i, text_mask=mask, backend="triton")  # noqa: E731
    gold = value_and_grads(
        lambda *i: reference.multi_positive_sigmoid_loss(*i, text_mask=mask), [v.double() for v in inputs]
    )
    rough(value_and_grads(op, inputs), gold, 4e-3)  # 2^-11 of a logit of 14 is 0.35 % of exp(-z)


@triton_only
@pytest.mark.parametrize("same_image", ["ignore", "positive"])
@pytest.mark.parametrize("masked", [False, True])
def test_triton_compares_images(monkeypatch, same_image, masked):
    monkeypatch.setattr(settings, "workspace_bytes", 2**20)
    n, k, d = 70, 3, 24
    options = dict(image_ids=torch.arange(n) * 5 % 41, same_image=same_image, label_smoothing=0.1)
    if masked:
        gen = torch.Generator().manual_seed(3)
        options |= dict(text_mask=torch.rand(n, k, generator=gen) > 0.3, image_mask=torch.rand(n, generator=gen) > 0.2)
    inputs = case(n, k, d, torch.float16)
    op = lambda *i: dk.multi_positive_sigmoid_loss(*i, **options, backend="triton")  # noqa: E731
    gold = value_and_grads(
        lambda *i: reference.multi_positive_sigmoid_loss(*i, **options), [v.double() for v in inputs]
    )
    rough(value_and_grads(op, inputs), gold, 4e-3)


@triton_only
@pytest.mark.parametrize("scale, bias", [(100.0, -10.0), (1000.0, 50.0), (-5.0, 3.0), (14.3, -60.0), (0.0, 0.0)])
def test_triton_in_float32_at_any_scale(monkeypatch, scale, bias):
    """As three TF32 products: confident pairs, whose loss is near exp(-60), keep their relative precision."""
    monkeypatch.setattr(settings, "float32", "torch")
    image, text = clip_like(40, 3, 64, noise=0.1)
    inputs = (image, text, torch.tensor(scale), torch.tensor(bias))
    got = value_and_grads(lambda *i: dk.multi_positive_sigmoid_loss(*i, backend="triton"), inputs)
    gold = value_and_grads(reference.multi_positive_sigmoid_loss, [v.double() for v in inputs])
    rough(got[:1] + got[3:], gold[:1] + gold[3:], 1e-4)
    if scale:
        rough(got[1:3], gold[1:3], 1e-4)


@triton_only
@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text"), ("image", "text", "scale", "bias")])
def test_triton_with_frozen_sides(frozen):
    names = ("image", "text", "scale", "bias")
    inputs = dict(zip(names, case(20, 3, 16), strict=True))
    grads = []
    for backend in ("torch", "triton"):
        leaves = {name: v.clone().requires_grad_(name not in frozen) for name, v in inputs.items()}
        loss = dk.multi_positive_sigmoid_loss(*leaves.values(), backend=backend)
        wanted = [v for v in leaves.values() if v.requires_grad]
        grads.append((loss.detach(), *(torch.autograd.grad(loss, wanted) if wanted else ())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=2e-3)
