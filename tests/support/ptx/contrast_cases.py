"""Inputs of the contrast for the executor, and how near the float64 oracle their results must be.

Bounds are relative to the largest value. Sums are float32 sums of products of the operands as they are, so row and col
are right to a few float32 roundings; gradients carry one rounding of G to the operands' type, and the error of a logit
is that of its exponential. float32 features are rounded to float16 first, as the oracle's then are, or multiplied as
three TF32 products.
"""

import torch
from numerics import clip_like, value_and_grads

import dreamlip_kernels as dk
from dreamlip_kernels import reference

# dtype, settings.float32; bounds of row and col, of dx and dy, and of dscale, relative to the sum of the terms' sizes:
# it is one number, left over where large terms cancel.
KINDS = {
    "bf16": (torch.bfloat16, "fp16", 3e-6, 2**-6, 2**-8),
    "fp16": (torch.float16, "fp16", 3e-6, 2**-9, 2**-11),
    "fp32": (torch.float32, "fp16", 3e-6, 2**-9, 2**-11),
    "tf32x3": (torch.float32, "torch", 3e-6, 3e-5, 3e-6),
}


def rounded(kind, v):
    """What the kernels multiply of ``v``, in float64."""
    return v.half().double() if kind == "fp32" and v.ndim else v.double()


def within(kind, got, gold, terms, d=0):
    """row, col, dx, dy, dscale are finite where gold is, and as near as KINDS says; ``terms``:
    the sizes of dscale's, summed; ``d``: the width of the features.

    A tensor core cuts what it adds: half an ulp on average of a sum that is on average half its last value, for each of
    the 3 D / 8 products that float32's are made of.
    """
    _, _, logits, gradients, scales = KINDS[kind]
    logits += 3 * d / 8 * 2**-25 if kind == "tf32x3" else 0
    exponents = logits * max(v[torch.isfinite(v)].abs().max().item() for v in gold[:2])
    bounds = dict(row=logits, col=logits, dx=gradients + exponents, dy=gradients + exponents, dscale=scales + exponents)
    for (name, bound), value, expected in zip(bounds.items(), got, gold, strict=True):
        value, finite = value.detach().double(), torch.isfinite(expected)
        assert torch.equal(value[~finite], expected[~finite].double()), f"{name}: infinities differ"
        largest = terms if name == "dscale" else expected[finite].abs().max().item()
        error = (value - expected)[finite].abs().max().item()
        assert error <= bound * largest, f"{name}: error {error:.2e} exceeds {bound * largest:.2e} ({largest:.2e})"


def check(kind, backend, x, y, scale, **masks):
    """Hold row, col and all gradients of a backend against the oracle's."""

    def op(x, y, s):
        return dk.bidirectional_logsumexp(x, y, s, backend=backend, **masks)

    def oracle(x, y, s):
        return reference.bidirectional_logsumexp(x, y, s, x_mask=masks.get("x_mask"), y_mask=masks.get("y_mask"))

    got = value_and_grads(op, (x, y, torch.tensor(scale)))
    x, y, s = (rounded(kind, v) for v in (x, y, torch.tensor(scale)))
    d_scaled = value_and_grads(oracle, (s * x, y, torch.ones_like(s)))[2]  # dscale is the sum of x * d_scaled
    within(kind, got, value_and_grads(oracle, (x, y, s)), (x * d_scaled).abs().sum().item(), x.shape[1])


def float32_errors(backend, n, k, d):
    """Relative errors of a loss and its gradients at a scale where positives and sums nearly cancel."""
    inputs = (*clip_like(n, k, d, torch.float32, noise=4.0), torch.tensor(50.0))

    def loss(backend):
        return lambda *i: dk.multi_positive_contrastive_loss(*i, backend=backend)

    gold = value_and_grads(loss("torch"), [v.double() for v in inputs])
    got = value_and_grads(loss(backend), inputs)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, gold, strict=True)]


def features(kind, m, c, k, d, seed=0):
    x, y = clip_like(max(m, c), k, d, KINDS[kind][0], seed)
    return x[:m], y[:c].transpose(0, 1)


def masks_of(m, c, k, which):
    gen = torch.Generator().manual_seed(1)
    y_mask, x_mask = torch.rand(c, k, generator=gen).T > 0.4, torch.rand(m, 2, generator=gen)[:, 0] > 0.3
    return {"none": {}, "x": dict(x_mask=x_mask), "y": dict(y_mask=y_mask), "x, y": dict(x_mask=x_mask, y_mask=y_mask)}[
        which
    ]
