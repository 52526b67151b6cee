"""Number formats of PTX as numpy arrays (PTX ISA section 5.2, "Types"):
bfloat16 and TF32, which numpy lacks, and rounding toward zero.

Bits are unsigned integers; values are float32 or float64.
"""

from __future__ import annotations

import numpy as np


def bfloat16_value(bits: np.ndarray) -> np.ndarray:
    """float32 values of 16-bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float16_value(bits: np.ndarray) -> np.ndarray:
    """float32 values of 16-bit patterns; subnormals are kept."""
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def tf32_value(bits: np.ndarray) -> np.ndarray:
    """float32 values of 32-bit patterns as tensor cores read them: the low 13 bits do not count."""
    return (np.ascontiguousarray(bits, np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16, to nearest even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def float16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> float16, to nearest even."""
    return np.ascontiguousarray(values, np.float32).astype(np.float16).view(np.uint16)


def tf32_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> TF32 as ``cvt.rna`` rounds: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).astype(np.uint32)


def toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 -> float32, rounded toward zero."""
    nearest = values.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
