"""Patches and captions for the grouping tests of every backend, and how they are compared with the oracle."""

import torch
from numerics import assert_no_worse_than_torch, three_ways, value_and_grads

from dreamlip_kernels import reference


def region_like(n, p, k, d, dtype=torch.float32, threshold=None, normalization="minmax", first_seed=0):
    """Patches [n, p, d] near k region directions and captions [n, k, d] near the same;
    no similarity lies on the threshold.
    """
    for seed in range(first_seed, first_seed + 100):
        gen = torch.Generator().manual_seed(seed)
        regions = torch.randn(n, k, d, generator=gen)
        owner = torch.randint(k, (n, p, 1), generator=gen).expand(-1, -1, d)
        patches = (3 * torch.gather(regions, 1, owner) + 2 * torch.randn(n, p, d, generator=gen)).to(dtype)
        texts = (2 * regions + torch.randn(n, k, d, generator=gen)).to(dtype)
        if _margin(patches.double(), texts.double(), threshold, normalization) > 1e-6:
            return patches, texts
    raise AssertionError("no case found with a margin around the threshold")


def _margin(patches, texts, threshold, normalization):
    # One rounding error there would flip a patch in or out: a jump that no tolerance can describe.
    w = torch.einsum("nkd,npd->nkp", reference.unit(texts), reference.unit(patches))
    if normalization == "minmax" and w.shape[-1] > 1:
        w = (w - w.amin(-1, keepdim=True)) / (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True))
    if normalization == "softmax":
        w = w.softmax(-1)
    return 1.0 if w.shape[-1] == 1 else (w - (1 / w.shape[-1] if threshold is None else threshold)).abs().min().item()


def compare(name, op, oracle, inputs):
    """For 16-bit inputs the bar is the float32 oracle, rounded at the end: at 16 bits the oracle itself flips
    patches.
    """
    if inputs[0].dtype in (torch.float32, torch.float64):
        return assert_no_worse_than_torch(name, *three_ways(op, oracle, inputs))
    dtype = inputs[0].dtype
    low = tuple(v.to(dtype) for v in value_and_grads(oracle, [x.float() for x in inputs]))
    assert_no_worse_than_torch(
        name, value_and_grads(op, inputs), low, value_and_grads(oracle, [x.double() for x in inputs])
    )


def degenerate(case, dtype=torch.float32):
    """(patches, texts, options) of a case in which nothing tells the patches apart, or that touches a bound."""
    patches, texts = region_like(3, 9, 2, 16, dtype)
    options = {}
    if case == "one patch":
        patches = patches[:, :1]
    if case == "constant patches":
        patches = patches[:, :1].repeat(1, 9, 1)
    if case == "nothing kept":
        options["threshold"] = 1.5
    if case == "zero text":
        texts = torch.zeros_like(texts)
    if case == "tie at the minimum":
        w = reference.unit(texts) @ reference.unit(patches).mT
        patches = patches.clone()
        patches[:, 0] = 2 * patches[0:3, w[:, 0].argmin(-1)[0]]
    if case == "no valid patch":
        options["patch_mask"] = torch.tensor([[True] * 9, [False] * 9, [True] * 9])
    if case == "zero patch":
        patches = patches.clone()
        patches[:, 4] = 0
    return patches, texts, options
