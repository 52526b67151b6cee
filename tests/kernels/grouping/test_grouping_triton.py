"""The grouping's Triton kernels, run by Triton's interpreter on the CPU, against the oracle under the same rule as the
other backends.
"""

import pytest
import torch
from numerics import value_and_grads
from patch_cases import compare, degenerate, region_like
from tensor_cores import tensor_cores  # noqa: F401 - a fixture
from triton_runs import require_triton

import dreamlip_kernels as dk
from dreamlip_kernels import reference

require_triton()
# Both sides of a tl.where are computed: the interpreter's numpy warns of the one that is not taken.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def where_it_runs():
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled, and test_grouping_gpu.py runs them there")


def both(**options):
    op = lambda x, t: dk.group_patches(x, t, backend="triton", **options)  # noqa: E731
    return op, lambda x, t: reference.group_patches(x, t, **options)


# One patch; several chunks with a rest; more than 16 captions; a width of several blocks with a rest; B/16's grid.
@pytest.mark.parametrize(
    "n, p, k, d", [(1, 1, 1, 8), (3, 49, 3, 96), (2, 37, 19, 40), (2, 33, 2, 150), (1, 196, 8, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
def test_group_patches(n, p, k, d, dtype, normalization):
    patches, texts = region_like(n, p, k, d, dtype, normalization=normalization)
    op, oracle = both(normalization=normalization)
    if p == 1:
        assert (value_and_grads(op, (patches, texts))[2] == 0).all()
        op, oracle = (lambda x, f=f: f(x, texts.to(x.dtype)) for f in (op, oracle))
        return compare("pooled, dx", op, oracle, (patches,))
    compare("pooled, dx, dt", op, oracle, (patches, texts))


@pytest.mark.parametrize(
    "dtype, normalization, masked",
    [
        (torch.float16, "softmax", False),
        pytest.param(torch.float16, "none", True, marks=pytest.mark.slow),
        pytest.param(torch.float32, "softmax", False, marks=pytest.mark.slow),
        (torch.float32, "minmax", True),
    ],
)
def test_small_weights_on_tensor_cores(tensor_cores, dtype, normalization, masked):  # noqa: F811
    """197 patches with norms near 100: float16 lost the low half of weights of 1e-5, and float32 the sum of the
    gradients about a large mean.

    An H100 showed both; with its roundings here they fail here too. The upstream gradient is the region's own
    direction.
    """
    options = dict(normalization=normalization, threshold=0.0 if normalization == "softmax" else None)
    patches, texts = region_like(2, 197, 1, 768, dtype, **options)
    mask = torch.rand(2, 197, generator=torch.Generator().manual_seed(0)) > 0.2 if masked else None
    op, oracle = both(patch_mask=mask, **options)
    compare("pooled, dx, dt", op, oracle, (patches, texts))


@pytest.mark.parametrize("normalization", ["minmax", "softmax", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, -1.0])
def test_thresholds_with_a_patch_mask(normalization, threshold):
    if normalization == "softmax":
        threshold /= 22  # of 49 weights that add up to one, some reach it
    patches, texts = region_like(
        3, 49, 4, 16, threshold=threshold if threshold > 0 else None, normalization=normalization
    )
    mask = torch.rand(3, 49, generator=torch.Generator().manual_seed(1)) > 0.3
    op, oracle = both(threshold=threshold, normalization=normalization, patch_mask=mask)
    compare("pooled, dx, dt", op, oracle, (patches, texts))
    assert (value_and_grads(op, (patches, texts))[1][~mask] == 0).all(), "padding patches take no gradient"


def test_strided_masks():
    """A column of a table, a transposed and an expanded mask are masks like any other."""
    patches, texts = region_like(3, 49, 4, 16)
    mask = torch.rand(3, 49, generator=torch.Generator().manual_seed(1)) > 0.3
    table, row = torch.zeros(3, 49, 2, dtype=torch.bool), mask[:1]
    table[..., 1] = mask
    for strided in (table[..., 1], mask.T.contiguous().T, row.expand(3, 49)):
        (op, _), (same, _) = (
            both(patch_mask=strided),
            both(patch_mask=strided.clone(memory_format=torch.contiguous_format)),
        )
        for got, want in zip(
            value_and_grads(op, (patches, texts)), value_and_grads(same, (patches, texts)), strict=True
        ):
            assert torch.equal(got, want)


def test_nan_behind_a_mask_has_no_effect():
    patches, texts = region_like(3, 49, 4, 16)
    mask = torch.rand(3, 49, generator=torch.Generator().manual_seed(1)) > 0.3
    op, _ = both(patch_mask=mask)
    broken = patches.masked_fill(~mask[..., None], torch.nan)
    for got, expected in zip(value_and_grads(op, (broken, texts)), value_and_grads(op, (patches, texts)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "case", ["constant patches", "nothing kept", "zero text", "tie at the minimum", "no valid patch", "zero patch"]
)
def test_degenerate_cases_are_defined(case):
    patches, texts, options = degenerate(case)
    op, oracle = both(**options)
    for g, e in zip(
        value_and_grads(op, (patches, texts)), value_and_grads(oracle, (patches.double(), texts.double())), strict=True
    ):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g.double(), e, atol=1e-5, rtol=1e-4)


def test_strides_nan_and_too_many_captions():
    patches, texts = region_like(4, 9, 3, 8)
    op, _ = both()
    same = value_and_grads(op, (patches, texts))
    for x, t in (
        (patches.transpose(1, 2).contiguous().transpose(1, 2), texts),
        (patches, texts.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        for got, expected in zip(value_and_grads(op, (x, t)), same, strict=True):
            torch.testing.assert_close(got, expected)
    broken = patches.clone()
    broken[1, 4, 2] = torch.nan
    got = op(broken, texts)
    assert got[1].isnan().any() and torch.equal(got[[0, 2, 3]], same[0][[0, 2, 3]])
    assert op(patches[:0], texts[:0]).shape == (0, 3, 8)
    with pytest.raises(RuntimeError, match="takes K up to 32 sub-captions, got K=33"):
        op(patches[:2], torch.randn(2, 33, 8))
    with pytest.raises(RuntimeError, match="float64 needs backend='torch'"):
        op(patches.double(), texts.double())
