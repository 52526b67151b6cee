"""Tests of the Triton backend: skipped where it cannot run, with the reason, and how near the oracle it must be."""

import pytest
import torch
from numerics import value_and_grads

from dreamlip_kernels.backends import dispatch


def require_triton() -> None:
    """Skip the test, or the module that is being collected, without Triton or with a torch older than its kernels."""
    pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")
    if not dispatch.ADDS_SIXTEEN_BIT_PRODUCTS:
        pytest.skip(f"the Triton kernels need torch 2.10, this is {torch.__version__}", allow_module_level=True)
    if not torch.cuda.is_available():  # tests/conftest.py: the kernels are interpreted
        from interpreter import remember

        remember()


def rounded(v):
    return v.half().double() if v.dtype == torch.float32 and v.ndim > 1 else v.double()


def close(name, op, oracle, draws):
    """Largest error over the draws, at most twice that of the float64 oracle on float16-rounded inputs, plus G's own
    rounding.

    Several draws, because the scale's gradient is one number, left over where large terms cancel.
    """
    got = [value_and_grads(op, inputs) for inputs in draws]
    gold = [value_and_grads(oracle, [v.double() for v in inputs]) for inputs in draws]
    low = [value_and_grads(oracle, [rounded(v) for v in inputs]) for inputs in draws]
    for i, (g, lo, go) in enumerate(
        zip(*(map(torch.stack, zip(*way, strict=True)) for way in (got, low, gold)), strict=True)
    ):
        finite = torch.isfinite(go)
        assert torch.equal(torch.isfinite(g), finite), f"{name}[{i}]: infinities differ"
        largest = go[finite].abs().max().item()
        error = (g.double() - go)[finite].abs().max().item()
        # 2^-9: G and the inputs are rounded to 11 bits, a gradient is a sum of such terms of either sign.
        bound = 2 * (lo - go)[finite].abs().max().item() + 2**-9 * largest
        assert error <= bound, f"{name}[{i}]: error {error:.2e} exceeds {bound:.2e} (largest {largest:.2e})"
