"""What the backends of sigmoid_pairs are tried with: ragged sizes, masks of images and captions, scales with and
without a bias.

N images, K sub-captions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...sigmoid import multi_positive_sigmoid_loss
from .case import Case, Speed, torch_dtype
from .contrast_cases import DTYPES, RAGGED_WIDTH, clip_like, eager, resolution, slack

__all__ = ["DTYPES", "OP", "cases", "eager", "slack", "speeds"]
OP = "sigmoid_pairs"


def cases(backend: Any, dtype: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[Case]:
    """Every scale and mask at every width, and one at a width that no tile divides."""
    n = 333 if device.type == "cuda" else 41
    for d in (*widths, RAGGED_WIDTH):
        yield _case(backend, dtype, device, (n, 3, d), scale=14.3, bias=-10.0)
        yield _case(backend, dtype, device, (n - 2, 2, d), scale=100.0, bias=-10.0, masked=True)
        yield _case(backend, dtype, device, (n, 1, d), scale=100.0, bias=0.0)
        yield _case(backend, dtype, device, (n - 2, 5, d), scale=14.3, bias=-10.0, masked=True)
    for same_image in ("ignore", "positive"):
        yield _case(backend, dtype, device, (n, 2, widths[0]), scale=14.3, bias=-10.0, same_image=same_image)


def _case(backend, dtype, device, shape, scale, bias, masked=False, same_image=None) -> Case:
    n, k, d = shape
    image_mask = text_mask = None
    if masked:  # columns of tables
        gen = torch.Generator().manual_seed(1)
        image_mask = (torch.rand(n, 3, generator=gen) > 0.2).to(device)[:, 1]
        text_mask = (torch.rand(k, n, generator=gen) > 0.2).to(device).T
    options: dict[str, Any] = {"image_mask": image_mask, "text_mask": text_mask}
    if same_image is not None:
        options |= {"image_ids": (torch.arange(n) * 7 % (n // 2)).to(device), "same_image": same_image}
    features = torch_dtype(dtype)

    def draw(seed: int) -> tuple[Tensor, ...]:
        image, text = clip_like(n, k, d, seed)
        numbers = (torch.tensor(number, device=device) for number in (scale, bias))
        return image.to(device, features), text.to(device, features), *numbers

    return Case(
        f"N={n} K={k} D={d}, scale {scale} bias {bias}{', strided masks of images and captions' if masked else ''}"
        f"{f', some images the same: {same_image}' if same_image else ''}",
        op=lambda i, t, s, b: (multi_positive_sigmoid_loss(i, t, s, b, backend=backend, **options),),
        oracle=lambda i, t, s, b: (
            reference.multi_positive_sigmoid_loss(i, t, s.to(i.dtype), b.to(i.dtype), **options),
        ),
        draw=draw,
        capture=masked,
        resolution=resolution(dtype, scale, d),
    )


def speeds(backend: Any, dtype: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[Speed]:
    """Eight captions per image, a tenth of them missing."""
    k, features = 8, torch_dtype(dtype)
    for n in (512, 4096, 16384) if device.type == "cuda" else (256,):
        for d in widths:

            def make(n=n, d=d):
                image = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=-1)
                text = torch.nn.functional.normalize(
                    image[:, None] + 3 * torch.randn(n, k, d, device=device) / d**0.5, dim=-1
                )
                scale, bias = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0))
                mask = torch.rand(n, k, device=device) > 0.1
                inputs = (image.to(features).requires_grad_(), text.to(features).requires_grad_(), scale, bias)
                return lambda: torch.autograd.grad(
                    multi_positive_sigmoid_loss(*inputs, text_mask=mask, backend=backend), inputs
                )

            product_flops = 2 * n * n * k * d
            moved = 3 * n * (k + 1) * d * features.itemsize
            yield Speed(f"N={n} K={k}", d, n * n * k, make, flops=3 * product_flops, moved=moved)
