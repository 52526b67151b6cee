"""Products in Triton's interpreter as an NVIDIA tensor core computes them; the interpreter's own are those of numpy.

TF32 operands lose their lower 13 bits, sums are formed a few products at a time and rounded toward zero.
"""

import numpy as np
import pytest


@pytest.fixture
def tensor_cores(monkeypatch):
    """``tl.dot`` of Triton's interpreter with the roundings of ``mma.sync``."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y = _values(a), _values(b)
        if x.dtype == np.float32 and input_precision.name == "TF32x3":
            x_high, y_high = _tf32(x, nearest=True), _tf32(y, nearest=True)
            x_low, y_low = _tf32(x - x_high), _tf32(y - y_high)
            product = _mma(x_low, y_high, np.zeros_like(d.data))
            product = _mma(x_high, y_high, _mma(x_high, y_low, product)) + d.data
        else:
            operands = (_tf32(x), _tf32(y)) if x.dtype == np.float32 else (x, y)
            product = _mma(*operands, d.data)
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _values(handle):
    if handle.dtype.scalar.name == "bf16":
        raise NotImplementedError("the interpreter rounds to bfloat16 toward zero")
    return handle.data if handle.data.dtype == np.float32 else handle.data.astype(np.float64)


def _tf32(x, nearest=False):
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64) + (0x1000 if nearest else 0)
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def _mma(x, y, acc, depth=8):
    x, y = x.astype(np.float64), y.astype(np.float64)
    for i in range(0, x.shape[-1], depth):
        exact = acc.astype(np.float64) + x[..., i : i + depth] @ y[..., i : i + depth, :]
        rounded = exact.astype(np.float32)
        acc = np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)
    return acc
