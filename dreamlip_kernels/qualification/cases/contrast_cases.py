"""What the backends of bidirectional_logsumexp are tried with: ragged sizes, masks of any strides, scales,
and sums that leave float32's range.

N images, K sub-captions, M rows, C columns, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...contrastive import multi_positive_contrastive_loss
from ...ops.logsumexp.logsumexp import bidirectional_logsumexp
from .case import Case, Outputs, Speed, torch_dtype

OP = "bidirectional_logsumexp"
DTYPES = ("bfloat16", "float16", "float32", "float32 as float16")
RAGGED_WIDTH = 40


def cases(backend: Any, dtype: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[Case]:
    """Every case at every width, and one at a width that no tile divides."""
    n = 333 if device.type == "cuda" else 41
    for d in (*widths, RAGGED_WIDTH):
        yield _op_case(backend, dtype, device, f"M={n} C={n - 2} K=3 D={d}, scale 14.3", (n, n - 2, 3, d), 14.3)
        shape = (n - 2, n + 5, 2, d)
        masked = "strided masks of rows and columns, strided features"
        yield _op_case(
            backend, dtype, device, f"M={n - 2} C={n + 5} K=2 D={d}, {masked}, scale 100", shape, 100.0, masked=True
        )
        yield _op_case(
            backend,
            dtype,
            device,
            f"M={n} C={n} K=2 D={d}, opposed features, masks, scale 100",
            (n, n, 2, d),
            100.0,
            masked=True,
            opposed=True,
        )
        yield _loss_case(backend, dtype, device, f"loss N={n} K=3 D={d}, text_mask, scale 14.3", (n, 3, d), 14.3)
    named = f"loss N={n} K=2 D={widths[0]}, text_mask, images of which some are the same, scale 14.3"
    yield _loss_case(backend, dtype, device, named, (n, 2, widths[0]), 14.3, image_ids=torch.arange(n) * 7 % (n // 2))
    if device.type == "cuda":
        yield _loss_case(
            backend, dtype, device, f"loss N=1111 K=5 D={widths[0]}, text_mask, scale 100", (1111, 5, widths[0]), 100.0
        )


def _op_case(backend, dtype, device, name, shape, scale, masked=False, opposed=False) -> Case:
    m, c, k, d = shape
    features = torch_dtype(dtype)
    x_mask = y_mask = None
    if masked:  # a column of a table, and the transpose of the mask that a loss is given
        x_mask = (torch.rand(m, 3, generator=_seeded(1)) > 0.2).to(device)[:, 1]
        y_mask = (torch.rand(c, k, generator=_seeded(2)) > 0.2).to(device).T

    def draw(seed: int) -> tuple[Tensor, ...]:
        image, text = clip_like(max(m, c), k, d, seed)
        if opposed:  # every pair at a cosine of about -0.85: at a scale of 100 all sums are below what float32 holds
            away = 3 * torch.ones(d) / d**0.5
            image, text = (torch.nn.functional.normalize(v, dim=-1) for v in (image + away, text - away))
        x, y = (v.to(device, features) for v in (image[:m], text[:c]))
        # As the losses pass them: captions as a transposed [C, K, D]; and images as a part of wider rows.
        x = torch.cat([x, x], 1)[:, :d] if masked else x
        return x, y.transpose(0, 1), torch.tensor(scale, device=device)

    return Case(
        name,
        op=lambda x, y, s: bidirectional_logsumexp(x, y, s, x_mask=x_mask, y_mask=y_mask, backend=backend),
        oracle=lambda x, y, s: reference.bidirectional_logsumexp(x, y, s.to(x.dtype), y_mask=y_mask, x_mask=x_mask),
        draw=draw,
        capture=masked and not opposed,
        resolution=resolution(dtype, scale, d),
    )


def _loss_case(backend, dtype, device, name, shape, scale, image_ids=None) -> Case:
    n, k, d = shape
    features = torch_dtype(dtype)
    mask = (torch.rand(n, k, generator=_seeded(3)) > 0.2).to(device)
    options = {"text_mask": mask, "reduction": "none"}  # in a mean, the errors of its terms cancel by chance
    options |= {} if image_ids is None else {"image_ids": image_ids.to(device)}

    def draw(seed: int) -> tuple[Tensor, ...]:
        image, text = clip_like(n, k, d, seed)
        return image.to(device, features), text.to(device, features), torch.tensor(scale, device=device)

    return Case(
        name,
        op=lambda i, t, s: (multi_positive_contrastive_loss(i, t, s, backend=backend, **options),),
        oracle=lambda i, t, s: (reference.multi_positive_contrastive_loss(i, t, s.to(i.dtype), **options),),
        draw=draw,
        capture=True,
        resolution=resolution(dtype, scale, d),
    )


def eager(case: Case, inputs: tuple[Tensor, ...], upstream: Outputs, dtype: str) -> Outputs:
    """What plain torch gives at the features' own dtype. Where float32 features may be multiplied as float16,
    torch may multiply them as TF32.
    """
    if dtype != "float32 as float16":
        return case.values(case.oracle, inputs, upstream)
    if not inputs[0].is_cuda:  # where torch has no such products: on features rounded to as many bits
        return case.values(case.oracle, [v.half().double() if v.ndim > 1 else v.double() for v in inputs], upstream)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return case.values(case.oracle, inputs, upstream)
    finally:
        torch.set_float32_matmul_precision(before)


def resolution(dtype: str, scale: float, d: int) -> float:
    """How far rounding moves a logit of unit features: float32's ulp of the largest one, or the features' rounding to
    11 bits, which adds up as sqrt(D).
    """
    return {"float32": 2**-23 * scale, "float32 as float16": 2**-11 * scale / d**0.5}.get(dtype, 0.0)


def slack(dtype: str) -> float:
    """Beyond twice eager's error, this share of the largest value: the coefficients of a gradient are rounded to 11
    bits, as TF32 rounds.
    """
    return 2**-9 if dtype == "float32 as float16" else 1e-5


def speeds(backend: Any, dtype: str, device: torch.device, widths: tuple[int, ...]) -> Iterator[Speed]:
    """The loss with a tenth of the captions missing: small, and the issue's two sizes."""
    k, features = 8, torch_dtype(dtype)
    for n in (512, 4096, 16384) if device.type == "cuda" else (256,):
        for d in widths:

            def make(n=n, d=d):
                image = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=-1)
                text = torch.nn.functional.normalize(
                    image[:, None] + 3 * torch.randn(n, k, d, device=device) / d**0.5, dim=-1
                )
                scale = torch.tensor(50.0, device=device, requires_grad=True)
                mask = torch.rand(n, k, device=device) > 0.1
                inputs = (image.to(features).requires_grad_(), text.to(features).requires_grad_(), scale)
                return lambda: torch.autograd.grad(
                    multi_positive_contrastive_loss(*inputs, text_mask=mask, backend=backend), inputs
                )

            product_flops = 2 * n * n * k * d
            moved = 3 * n * (k + 1) * d * features.itemsize
            yield Speed(f"N={n} K={k}", d, n * n * k, make, flops=4 * product_flops, moved=moved)


def clip_like(n: int, k: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit images [n, d] and captions [n, k, d] at a cosine of about 0.24 to their image."""
    gen = _seeded(seed)
    image = torch.nn.functional.normalize(torch.randn(n, d, generator=gen), dim=-1)
    noise = 4.0 * torch.randn(n, k, d, generator=gen) / d**0.5
    return image, torch.nn.functional.normalize(image[:, None] + noise, dim=-1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
