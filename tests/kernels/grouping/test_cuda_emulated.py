"""The CUDA kernels without a GPU: csrc/patch_pool.cuh compiled for the CPU, every thread a fiber,
against the oracle (tests/csrc/emulate.h).

It shows that indices, fragments, waits and barriers fit together; what only a device can show is in
tests/kernels/grouping/test_grouping_gpu.py.
"""

import ctypes

import pytest
import torch
from emulation import emulated, needs_emulation
from numerics import value_and_grads
from patch_cases import compare, region_like

from dreamlip_kernels import reference

pytestmark = needs_emulation


@pytest.fixture(scope="module")
def library():
    return emulated("emulate")


class Emulated(torch.autograd.Function):
    """group_patches by the emulated kernels: patches [N, P, D], texts [N, K, D] in bfloat16, float16 or float32."""

    @staticmethod
    def forward(ctx, library, patches, texts, threshold, normalization, mask, slots, tall, blocks):
        n, p, _ = patches.shape
        k = texts.shape[1]
        pooled, s, inv = torch.empty_like(texts), torch.empty(n, k, p), torch.empty(n, p)
        ctx.call = (library, threshold, normalization, slots, tall, blocks)
        ctx.save_for_backward(patches, texts, s, inv, mask)
        _call(ctx.call, patches, texts, None, mask, pooled, s, inv, None, None)
        ctx.mark_non_differentiable(s, inv)
        return pooled

    @staticmethod
    def backward(ctx, upstream):
        patches, texts, s, inv, mask = ctx.saved_tensors
        dx, dt = torch.empty_like(patches), torch.empty_like(texts)
        _call(ctx.call, patches, texts, upstream.contiguous(), mask, None, s, inv, dx, dt)
        return None, dx, dt, None, None, None, None, None, None


def _call(call, patches, texts, *tensors):
    library, threshold, normalization, slots, tall, blocks = call
    n, p, d = patches.shape
    pointers = [ctypes.c_void_p(0 if x is None else x.data_ptr()) for x in (patches, texts, *tensors)]
    kind = ("minmax", "softmax", "none").index(normalization)
    shape = (n, p, texts.shape[1], d, (torch.bfloat16, torch.float16, torch.float32).index(patches.dtype))
    code = library.emulate(
        *shape, ctypes.c_double(-1e38 if threshold is None else threshold), kind, slots, tall, blocks, 1, *pointers
    )
    assert code == 0, code


def both(library, *, threshold=None, normalization="minmax", mask=None, slots=0, tall=256, blocks=2):
    op = lambda x, t: Emulated.apply(library, x, t, threshold, normalization, mask, slots, tall, blocks)  # noqa: E731
    return op, lambda x, t: reference.group_patches(
        x, t, threshold=threshold, normalization=normalization, patch_mask=mask
    )


# (N, P, K, D, slots, tall): everything in shared memory (0), or a ring of so many boxes of at most so many patches.
# One patch; rows and columns that fill no tile, several images a block; a column box more than the ring holds;
# more than 8 sub-captions; more than one box of rows, the tallest and the shortest.
CASES = [
    (3, 1, 1, 8, 0, 256),
    (5, 20, 3, 40, 0, 256),
    (5, 49, 8, 136, 2, 256),
    (3, 33, 5, 72, 3, 256),
    (2, 50, 13, 64, 0, 256),
    (3, 18, 9, 200, 2, 256),
    (2, 270, 2, 72, 2, 256),
    (2, 77, 3, 136, 3, 32),
    (2, 130, 9, 72, 2, 64),
]


@pytest.mark.parametrize("n, p, k, d, slots, tall", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_group_patches(library, n, p, k, d, slots, tall, dtype):
    patches, texts = region_like(n, p, k, d, dtype)
    op, oracle = both(library, slots=slots, tall=tall)
    if p == 1:
        assert (value_and_grads(op, (patches, texts))[2] == 0).all()
        op, oracle = (lambda x, f=f: f(x, texts.to(x.dtype)) for f in (op, oracle))
        return compare("pooled, dx", op, oracle, (patches,))
    compare("pooled, dx, dt", op, oracle, (patches, texts))


# Where an H100 erred more than allowed: weights of 1e-5 in float16, and sums of many terms that nearly cancel.
H100_FAILED = [
    ("softmax", torch.float16, 2, 197, 1, 768),
    ("none", torch.float16, 2, 197, 1, 768),
    ("softmax", torch.float16, 1, 196, 8, 512),
    ("softmax", torch.float32, 2, 197, 1, 768),
    ("none", torch.float32, 2, 197, 1, 768),
    ("minmax", torch.float32, 1, 256, 16, 256),
]


@pytest.mark.parametrize("normalization, dtype, n, p, k, d", H100_FAILED)
def test_small_weights_and_long_sums(library, normalization, dtype, n, p, k, d):
    threshold = 0.0 if normalization == "softmax" else None
    patches, texts = region_like(n, p, k, d, dtype, threshold, normalization)
    slots = 8 if dtype == torch.float32 else 0
    op, oracle = both(library, threshold=threshold, normalization=normalization, slots=slots)
    compare("pooled, dx, dt", op, oracle, (patches, texts))


@pytest.mark.parametrize(
    "normalization, threshold", [("minmax", 0.5), ("softmax", 0.03), ("none", 0.1), ("none", -1.0)]
)
@pytest.mark.parametrize("slots, dtype", [(0, torch.float16), (2, torch.float16), (2, torch.float32)])
def test_modes_with_a_patch_mask(library, normalization, threshold, slots, dtype):
    patches, texts = region_like(4, 37, 4, 72, dtype, threshold if threshold > 0 else None, normalization)
    mask = torch.rand(4, 37, generator=torch.Generator().manual_seed(1)) > 0.3
    op, oracle = both(library, threshold=threshold, normalization=normalization, mask=mask, slots=slots)
    compare("pooled, dx, dt", op, oracle, (patches, texts))
    assert (value_and_grads(op, (patches, texts))[1][~mask] == 0).all()


@pytest.mark.parametrize("slots", [0, 2])
def test_nan_stays_in_its_image_and_blocks_do_not_matter(library, slots):
    patches, texts = region_like(5, 30, 3, 136, torch.bfloat16)
    one = value_and_grads(both(library, slots=slots, blocks=1)[0], (patches, texts))
    three = value_and_grads(both(library, slots=slots, blocks=3)[0], (patches, texts))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    broken = patches.clone()
    broken[2, 7, 11] = torch.nan
    got = value_and_grads(both(library, slots=slots, blocks=1)[0], (broken, texts))
    others = [0, 1, 3, 4]
    assert got[0][2].isnan().any() and all(torch.equal(a[others], b[others]) for a, b in zip(got, one, strict=True))


KB = 1024
H100, A100, CONSUMER = 227 * KB, 163 * KB, 99 * KB  # what a block may have


def plan(library, shape, element, backward, limit):
    """(bytes, slots, tall, resident) of a launch."""
    out = (ctypes.c_int * 4)()
    library.plan(*shape, element, backward, limit, out)
    return tuple(out)


def test_the_shared_memory_of_the_full_shapes(library):
    """On an H200 a B/16 image stays resident forward; an A100 streams; B/32 leaves room for two blocks and more."""
    b16, b32 = (196, 8, 512), (49, 8, 512)
    assert plan(library, b16, 2, False, H100)[3] and not plan(library, b16, 2, False, A100)[3]
    assert plan(library, b32, 2, False, H100)[0] <= 113 * KB and plan(library, b32, 2, True, H100)[0] <= 113 * KB


# Each was refused, some of them by backward after forward had run.
REFUSED_ONCE = [
    (H100, 4, (1024, 8, 512)),
    (H100, 4, (256, 16, 1024)),
    (H100, 4, (729, 8, 1152)),
    (H100, 2, (576, 16, 1024)),
    (H100, 2, (1369, 8, 1536)),
    (A100, 2, (1024, 8, 1024)),
    (CONSUMER, 4, (196, 8, 512)),
    (CONSUMER, 2, (256, 8, 1024)),
    (CONSUMER, 2, (576, 8, 512)),
]


@pytest.mark.parametrize("limit, element, shape", REFUSED_ONCE)
def test_a_smaller_tile_where_it_fits(library, limit, element, shape):
    for backward in (False, True):
        assert plan(library, shape, element, backward, limit)[0] <= limit
