"""What the backends of group_patches are tried with: ragged sizes, strided patches and masks, every normalization,
images without a patch.

N images, K sub-captions, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...backends import dispatch
from ...grouping import group_patches
from .case import Case, Outputs, Speed, torch_dtype

OP = "group_patches"
DTYPES = ("bfloat16", "float16", "float32")
RAGGED_WIDTH = 40


def cases(backend: Any, dtype: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[Case]:
    """Every normalization and mask at every width, and one at a width that no tile divides."""
    interpreted = device.type == "cpu" and backend == "triton"
    variants: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
        ((2, 49, 8) if interpreted else (4, 196, 8), {}),
        ((2, 50, 5) if interpreted else (3, 197, 5), {"masked": True}),
        ((2, 49, 3), {"normalization": "softmax", "threshold": 0.0, "masked": True}),
        ((2, 49, 13), {"normalization": "none"}),
    )
    for d in (*widths, RAGGED_WIDTH):
        for shape, options in variants:
            if _fits(backend, dtype, device, (*shape, d)):
                yield _case(backend, dtype, device, (*shape, d), **options)


def _fits(backend, dtype, device, shape) -> bool:
    n, p, k, d = shape
    return (
        dispatch.why_not(OP, backend, torch.empty(0, dtype=torch_dtype(dtype), device=device), N=n, P=p, K=k, D=d)
        is None
    )


def _case(backend, dtype, device, shape, normalization="minmax", threshold=None, masked=False) -> Case:
    n, p, k, d = shape
    mask = None
    if masked:  # every second column of a table; the last image has no patch
        mask = (torch.rand(n, 2 * p, generator=torch.Generator().manual_seed(1)) > 0.2).to(device)[:, ::2]
        mask[-1] = False
    options: dict[str, Any] = dict(normalization=normalization, threshold=threshold, patch_mask=mask)

    def draw(seed: int) -> tuple[Tensor, ...]:
        patches, texts = region_like(shape, torch_dtype(dtype), threshold, normalization, seed, mask)
        # As towers give them: patches behind a class token, captions as a part of wider rows.
        patches = torch.cat([patches[:, :1], patches], 1).to(device)[:, 1:]
        return patches, torch.cat([texts, texts], 2).to(device)[:, :, :d]

    words = [f"N={n} P={p} K={k} D={d}", normalization, *(["strided mask, an image without a patch"] if masked else [])]
    return Case(
        ", ".join(words),
        op=lambda x, t: (group_patches(x, t, backend=backend, **options),),
        oracle=lambda x, t: (reference.group_patches(x, t, **options),),
        draw=draw,
        capture=masked,
    )


def eager(case: Case, inputs: tuple[Tensor, ...], upstream: Outputs, dtype: str) -> Outputs:
    """Plain torch in float32, rounded to the features' dtype at the end: at 16 bits eager code itself takes other
    patches.
    """
    values = case.values(case.oracle, [v.float() for v in inputs], upstream)
    return tuple(v.to(inputs[0].dtype) for v in values)


def slack(dtype: str) -> float:
    """Beyond twice eager's error, this share of the largest value."""
    return 1e-5


def speeds(backend: Any, dtype: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[Speed]:
    """196 patches and 8 captions an image, a tenth of the patches masked."""
    p, k = 196, 8
    for n in (64, 1024, 4096) if device.type == "cuda" else (8, 64):
        for d in widths:
            if not _fits(backend, dtype, device, (n, p, k, d)):
                continue

            def make(n=n, d=d):
                patches = torch.randn(n, p, d, device=device).to(torch_dtype(dtype)).requires_grad_()
                texts = torch.randn(n, k, d, device=device).to(torch_dtype(dtype)).requires_grad_()
                mask = torch.rand(n, p, device=device) > 0.1
                upstream = torch.randn(n, k, d, device=device).to(torch_dtype(dtype))
                return lambda: torch.autograd.grad(
                    group_patches(patches, texts, patch_mask=mask, backend=backend), (patches, texts), upstream
                )

            # Patches are read forward and backward, and their gradient is written; two products forward, four backward.
            moved = (3 * n * p * d + 5 * n * k * d) * torch_dtype(dtype).itemsize
            yield Speed(f"N={n} P={p} K={k}", d, n * p * k, make, flops=6 * 2 * n * p * k * d, moved=moved)


def region_like(shape, dtype, threshold, normalization, first_seed, mask) -> tuple[Tensor, Tensor]:
    """Patches [n, p, d] near k region directions and captions [n, k, d] near the same;
    no similarity lies on the threshold.
    """
    n, p, k, d = shape
    for seed in range(1000 * first_seed, 1000 * first_seed + 200):
        gen = torch.Generator().manual_seed(seed)
        regions = torch.randn(n, k, d, generator=gen)
        owner = torch.randint(k, (n, p, 1), generator=gen).expand(-1, -1, d)
        patches = (3 * torch.gather(regions, 1, owner) + 2 * torch.randn(n, p, d, generator=gen)).to(dtype)
        texts = (2 * regions + torch.randn(n, k, d, generator=gen)).to(dtype)
        if _margin(patches.double(), texts.double(), threshold, normalization, mask) > 2e-6:
            return patches, texts
    raise AssertionError("no case with a margin around the threshold")


def _margin(patches, texts, threshold, normalization, mask) -> float:
    # One rounding error there would take a patch in or out: a jump that no bound describes.
    w = torch.einsum("nkd,npd->nkp", reference.unit(texts), reference.unit(patches))
    valid = torch.ones(w.shape[0], 1, w.shape[2], dtype=torch.bool) if mask is None else mask.cpu()[:, None]
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    if normalization == "minmax":
        low = w.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        high = w.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
        w = (w - low) / (high - low)
    if normalization == "softmax":
        w = w.masked_fill(~valid, -torch.inf).softmax(-1)
    distance = (w - (1 / count if threshold is None else threshold)).abs()
    return distance.masked_fill(~valid, torch.inf).nan_to_num(torch.inf).min().item()
