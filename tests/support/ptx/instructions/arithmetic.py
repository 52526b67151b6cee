"""Integer, floating-point, logical and comparison instructions (PTX ISA section 9.7.1 to 9.7.8).

Sums and products are rounded as numpy rounds float32; ``fma`` is computed in float64 and rounded once more, which
differs from one rounding in the rarest
cases. Approximations (ex2, lg2, rcp, ...) are computed exactly and rounded:
the manual bounds their error, and the bounds of the tests leave room for it.
Of ``.ftz`` subnormal inputs and results are zero.
"""

from __future__ import annotations

import numpy as np

from ..machine.errors import BadOperand
from ..machine.table import executes

_TINY = np.float32(2.0**-126)


def flushed(values: np.ndarray) -> np.ndarray:
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(values) < _TINY, np.copysign(np.float32(0), values), values)


def count(operands: list, expected: int) -> None:
    if len(operands) != expected:
        raise BadOperand(f"{len(operands)} operands, expected {expected}")


def _floats(threads, operands, form, kind="f32"):
    values = [threads.read(operand, kind) for operand in operands]
    return [flushed(v) for v in values] if form["ftz"] else values


def _put(threads, operand, value, form):
    value = np.asarray(value, np.float32)
    threads.write(operand, flushed(value) if form["ftz"] else value)


@executes("add", r"(?P<rn>\.rn)?(?P<ftz>\.ftz)?\.f32")
@executes("sub", r"(?P<rn>\.rn)?(?P<ftz>\.ftz)?\.f32")
@executes("mul", r"(?P<rn>\.rn)?(?P<ftz>\.ftz)?\.f32")
@executes("min", r"(?P<ftz>\.ftz)?\.f32")
@executes("max", r"(?P<ftz>\.ftz)?\.f32")
@executes("div", r"(\.full|\.rn|\.approx)(?P<ftz>\.ftz)?\.f32")
def float_binary(threads, operands, form, name):
    """9.7.3: add, sub, mul, div, min, max of float32; min and max return the other operand where one is NaN."""
    count(operands, 3)
    a, b = _floats(threads, operands[1:], form)
    functions = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "min": np.fmin,
        "max": np.fmax,
    }
    _put(threads, operands[0], functions[name](a, b), form)


@executes("fma", r"\.(?P<round>rn|rm)(?P<ftz>\.ftz)?\.f32")
def fma(threads, operands, form, name):
    """9.7.3.6: a * b + c, rounded once; ``.rm`` toward minus infinity."""
    count(operands, 4)
    a, b, c = (v.astype(np.float64) for v in _floats(threads, operands[1:], form))
    exact = a * b + c
    value = exact.astype(np.float32)
    if form["round"] == "rm":
        value = np.where(value > exact, np.nextafter(value, np.float32(-np.inf)), value)
    _put(threads, operands[0], value, form)


@executes("add", r"(?P<rn>\.rn)?(?P<ftz>\.ftz)?\.f32x2")
@executes("sub", r"(?P<rn>\.rn)?(?P<ftz>\.ftz)?\.f32x2")
@executes("mul", r"(?P<rn>\.rn)?(?P<ftz>\.ftz)?\.f32x2")
@executes("fma", r"\.rn(?P<ftz>\.ftz)?\.f32x2")
def float_pairs(threads, operands, form, name):
    """9.7.3.3 to .6: the same for two float32 in each 64-bit register."""
    count(operands, 4 if name == "fma" else 3)
    values = [np.ascontiguousarray(threads.each(operand, "b64")).view(np.float32) for operand in operands[1:]]
    values = [flushed(v) if form["ftz"] else v for v in values]
    if name == "fma":
        value = (values[0].astype(np.float64) * values[1] + values[2]).astype(np.float32)
    else:
        value = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](*values)
    threads.write(operands[0], (flushed(value) if form["ftz"] else value).view(np.uint64))


@executes("neg", r"(?P<ftz>\.ftz)?\.f32")
@executes("abs", r"(?P<ftz>\.ftz)?\.f32")
@executes("sqrt", r"(\.approx|\.rn)(?P<ftz>\.ftz)?\.f32")
@executes("rsqrt", r"\.approx(?P<ftz>\.ftz)?\.f32")
@executes("rcp", r"(\.approx|\.rn)(?P<ftz>\.ftz)?\.f32")
@executes("ex2", r"\.approx(?P<ftz>\.ftz)?\.f32")
@executes("lg2", r"\.approx(?P<ftz>\.ftz)?\.f32")
def float_unary(threads, operands, form, name):
    """9.7.3: functions of one float32."""
    count(operands, 2)
    (a,) = _floats(threads, operands[1:], form)
    a64 = a.astype(np.float64)
    value = {
        "neg": lambda: -a,
        "abs": lambda: np.abs(a),
        "sqrt": lambda: np.sqrt(a64),
        "rsqrt": lambda: 1 / np.sqrt(a64),
        "rcp": lambda: 1 / a64,
        "ex2": lambda: np.exp2(a64),
        "lg2": lambda: np.log2(a64),
    }[name]()
    _put(threads, operands[0], value, form)


@executes("add", r"\.[su](16|32|64)")
@executes("sub", r"\.[su](16|32|64)")
@executes("min", r"\.[su](16|32|64)")
@executes("max", r"\.[su](16|32|64)")
def integer_binary(threads, operands, form, name):
    """9.7.1: wrapping add and sub, min and max."""
    count(operands, 3)
    a, b = (threads.read(operand, form[0][1:]) for operand in operands[1:])
    functions = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
    threads.write(operands[0], functions[name](a, b))


@executes("mul", r"\.(?P<half>lo|hi|wide)\.(?P<type>[su](16|32|64))")
@executes("mad", r"\.(?P<half>lo|wide)\.(?P<type>[su](16|32|64))")
def multiply(threads, operands, form, name):
    """9.7.1.3 and .4: the low half, the high half or all of a product, and ``mad`` adds to it."""
    count(operands, 3 if name == "mul" else 4)
    kind, bits = form["type"], int(form["type"][1:])
    a, b = (threads.read(operand, kind) for operand in operands[1:3])
    wide = f"{kind[0]}{2 * bits}"
    if form["half"] == "lo":
        product, wide = a * b, kind
    elif bits == 64:
        raise BadOperand("128-bit products")
    else:
        target = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 4}")
        product = a.astype(target) * b.astype(target)
        if form["half"] == "hi":
            product = (product >> target.type(bits)).astype(a.dtype)
    threads.write(operands[0], product if name == "mul" else product + threads.read(operands[3], wide))


@executes("div", r"\.[su](16|32|64)")
@executes("rem", r"\.[su](16|32|64)")
def divide(threads, operands, form, name):
    """9.7.1.8 and .9: the quotient toward zero and its remainder;
    of a divisor of 0 they are unspecified, here all bits set.
    """
    count(operands, 3)
    a, b = (threads.each(operand, form[0][1:]) for operand in operands[1:])
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a) // np.abs(safe)
    quotient = np.where((a < 0) != (safe < 0), -quotient, quotient).astype(a.dtype)
    value = quotient if name == "div" else a - quotient * safe
    threads.write(operands[0], np.where(b == 0, np.array(-1).astype(a.dtype), value))


@executes("neg", r"\.s(16|32|64)")
@executes("abs", r"\.s(16|32|64)")
def integer_unary(threads, operands, form, name):
    """9.7.1.10 and .11."""
    count(operands, 2)
    a = threads.read(operands[1], form[0][1:])
    threads.write(operands[0], -a if name == "neg" else np.abs(a))


@executes("and", r"\.(pred|b16|b32|b64)")
@executes("or", r"\.(pred|b16|b32|b64)")
@executes("xor", r"\.(pred|b16|b32|b64)")
def logic(threads, operands, form, name):
    """9.7.8.1 to .3."""
    count(operands, 3)
    a, b = (threads.read(operand, form[1]) for operand in operands[1:])
    threads.write(operands[0], {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](a, b))


@executes("not", r"\.(pred|b16|b32|b64)")
def invert(threads, operands, form, name):
    """9.7.8.4."""
    count(operands, 2)
    threads.write(operands[0], ~threads.read(operands[1], form[1]))


@executes("shl", r"\.(?P<type>b(16|32|64))")
@executes("shr", r"\.(?P<type>[bsu](16|32|64))")
def shift(threads, operands, form, name):
    """9.7.8.8 and .9: amounts beyond the width shift everything out; ``shr.s`` fills with the sign."""
    count(operands, 3)
    kind, bits = form["type"], int(form["type"][1:])
    a, amount = threads.read(operands[1], kind), threads.read(operands[2], "u32")
    largest = bits - 1
    shifted = (np.left_shift if name == "shl" else np.right_shift)(a, np.minimum(amount, largest).astype(a.dtype))
    beyond = shifted if name == "shr" and kind[0] == "s" else a.dtype.type(0)
    threads.write(operands[0], np.where(amount > largest, beyond, shifted).astype(a.dtype))


@executes("bfe", r"\.(?P<type>[su](32|64))")
def extract_field(threads, operands, form, name):
    """9.7.1.19: ``length`` bits from ``position``, extended with zeros or with the field's last bit."""
    count(operands, 4)
    bits = int(form["type"][1:])
    a = threads.read(operands[1], f"u{bits}").astype(np.uint64)
    position, length = (threads.read(operand, "u32").astype(np.uint64) & np.uint64(0xFF) for operand in operands[2:])
    if (position + length > bits).any() or (length == 0).any():
        raise BadOperand("bfe of a field that leaves the register")
    field = (a >> position) & ((np.uint64(1) << length) - np.uint64(1))
    if form["type"][0] == "s":
        sign = np.uint64(1) << (length - np.uint64(1))
        field = (field ^ sign) - sign
    threads.write(operands[0], field.astype(f"u{bits // 8}"))


@executes("bfi", r"\.b32")
def insert_field(threads, operands, form, name):
    """9.7.1.20: the low ``length`` bits of a into b at ``position``."""
    count(operands, 5)
    a, b = (threads.read(operand, "u32").astype(np.uint64) for operand in operands[1:3])
    position, length = (threads.read(operand, "u32").astype(np.uint64) & np.uint64(0xFF) for operand in operands[3:])
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    threads.write(operands[0], ((b & ~mask) | ((a << position) & mask)).astype(np.uint32))


_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ORDERED |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Section 9.3.1: of floating-point numbers "eq" to "ge" are false where one is NaN, "equ" to "geu" true."""
    if a.dtype.kind != "f":
        return _ORDERED[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if name.endswith("u"):
        return _ORDERED[name[:-1]](a, b) | unordered
    return _ORDERED[name](a, b) & ~unordered


@executes("setp", r"\.(?P<cmp>\w{2,3})(?:\.(?P<with>and|or|xor))?(?P<ftz>\.ftz)?\.(?P<type>[bsu](16|32|64)|f32)")
def set_predicate(threads, operands, form, name):
    """9.7.6.2: p = a compared with b, combined with a third predicate where the form says how."""
    count(operands, 4 if form["with"] else 3)
    a, b = (threads.read(operand, form["type"]) for operand in operands[1:3])
    if form["ftz"]:
        a, b = flushed(a), flushed(b)
    value = _compare(form["cmp"], a, b)
    if form["with"]:
        third = threads.read(operands[3], "pred")
        value = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[form["with"]](value, third)
    threads.write(operands[0], value)


@executes("selp", r"\.(?P<type>[bsuf](16|32|64))")
def select(threads, operands, form, name):
    """9.7.6.3: a where the predicate is true, else b."""
    count(operands, 4)
    kind = f"b{form['type'][1:]}"
    a, b = (threads.read(operand, kind) for operand in operands[1:3])
    threads.write(operands[0], np.where(threads.read(operands[3], "pred"), a, b))
