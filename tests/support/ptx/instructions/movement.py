"""Moves, conversions, loads and stores (PTX ISA section 9.7.9, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import numpy as np

from ..machine.errors import BadOperand, OutOfBounds
from ..machine.memory import LOCAL_WINDOW, PARAMETER_WINDOW, REGION, SHARED_WINDOW
from ..machine.numbers import bfloat16_bits, bfloat16_value, float16_bits, tf32_bits
from ..machine.program import Vector
from ..machine.table import executes
from .arithmetic import count, flushed


@executes("mov", r"\.(?P<type>pred|[bsuf](16|32|64))")
def move(threads, operands, form, name):
    """9.7.9.3 and .4: a copy; of a vector, its packing into one register or the reverse."""
    count(operands, 2)
    target, source = operands
    kind = form["type"] if form["type"] == "pred" else f"b{form['type'][1:]}"
    if type(source) is Vector:
        bits = int(kind[1:]) // len(source.items)
        wide, value = f"u{kind[1:]}", 0
        for place, item in enumerate(source.items):
            part = threads.read(item, f"u{bits}").astype(threads.read(item, wide).dtype)
            value = value | part << part.dtype.type(place * bits)
        threads.write(target, value)
    elif type(target) is Vector:
        bits = int(kind[1:]) // len(target.items)
        value = threads.read(source, f"u{kind[1:]}")
        for place, item in enumerate(target.items):
            threads.write(item, (value >> value.dtype.type(place * bits)).astype(f"u{bits // 8}"))
    else:
        threads.write(target, threads.read(source, kind))


@executes("cvta", r"(?P<to>\.to)?\.(?P<space>global|shared|local|param)\.(?P<type>u64|u32)")
def convert_address(threads, operands, form, name):
    """9.7.9.20: between an address in a state space and the generic one.
    Global memory and parameters are where they are in the generic space.
    """
    count(operands, 2)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(form["space"], 0)
    address = threads.each(operands[1], "u64")
    threads.write(operands[0], address - np.uint64(window) if form["to"] else address + np.uint64(window))


_FLOAT_BITS = {"f16": float16_bits, "bf16": bfloat16_bits}


@executes("cvt", r"(\.(rn|rz|rni|rzi|rna|rmi|rpi))?(?P<ftz>\.ftz)?(\.sat)?\.\w+\.\w+")
def convert(threads, operands, form, name):
    """9.7.9.21: between integers (cut, or extended as the source is signed), from integers and floats to floats,
    floats to integers.
    """
    parts = [part for part in form[0].split(".") if part]
    to, source = parts[-2:]
    how = set(parts[:-2])
    if to in ("bf16x2", "f16x2"):
        count(operands, 3)
        high, low = (_FLOAT_BITS[to[:-2]](threads.each(operand, "f32")).astype(np.uint32) for operand in operands[1:])
        return threads.write(operands[0], high << np.uint32(16) | low)
    count(operands, 2)
    if source[0] in "su" and to[0] in "su":
        value = threads.each(operands[1], source)
        return threads.write(operands[0], value.astype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}"))
    if source == "bf16":
        value = bfloat16_value(threads.each(operands[1], "b16"))
    else:
        value = threads.each(operands[1], source)
    if to == "tf32" and how == {"rna"}:
        return threads.write(operands[0], tf32_bits(value))
    if to in _FLOAT_BITS and source == "f32" and how == {"rn"}:
        return threads.write(operands[0], _FLOAT_BITS[to](value))
    if to == "f32" and how <= {"rn", "ftz", "sat"}:
        value = value.astype(np.float32)
        value = flushed(value) if "ftz" in how else value
        return threads.write(
            operands[0], np.where(value > 0, np.minimum(value, 1), 0).astype(np.float32) if "sat" in how else value
        )
    whole_numbers = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((whole_numbers[word] for word in how if word in whole_numbers), None)
    if rounding and to == source == "f32":
        return threads.write(operands[0], rounding(flushed(value) if "ftz" in how else value))
    if rounding and to[0] in "su" and source == "f32":
        kind = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
        whole = np.nan_to_num(rounding(value.astype(np.float64)), nan=0)
        return threads.write(operands[0], np.clip(whole, kind.min, kind.max).astype(kind.dtype))
    raise BadOperand(f"cvt{form[0]} is no conversion that the executor knows")


_MODIFIERS = r"(\.(nc|volatile|relaxed|acquire|release|weak|cta|gpu|sys|L1::\w+|L2::\w+|ca|cg|cs|cv|wb|wt|evict_\w+))*"
_SPACE = r"(?:\.(?P<space>global|shared(?:::cta)?|local|param))?"
_ACCESS = rf"{_MODIFIERS}{_SPACE}{_MODIFIERS}(?:\.v(?P<count>2|4|8))?\.(?P<type>[bsuf](8|16|32|64))"


@executes("ld", _ACCESS)
def load(threads, operands, form, name):
    """9.7.9.8: one register or a vector of them from each thread's address, which is a multiple of the whole access."""
    count(operands, 2)
    targets = operands[0].items if type(operands[0]) is Vector else (operands[0],)
    if len(targets) != int(form["count"] or 1):
        raise BadOperand(f"{len(targets)} registers for ld{form[0]}")
    size, kind = int(form["type"][1:]) // 8, form["type"]
    for space, some, addresses in _spaces(threads, operands[1], form["space"]):
        values = _load(some, space, addresses, size, len(targets))
        for place, target in enumerate(targets):
            column = np.ascontiguousarray(values[:, place])
            some.write(target, column.view(f"i{size}") if kind[0] == "s" else column)


@executes("st", _ACCESS)
def store(threads, operands, form, name):
    """9.7.9.11: as ld, the other way."""
    count(operands, 2)
    sources = operands[1].items if type(operands[1]) is Vector else (operands[1],)
    if len(sources) != int(form["count"] or 1):
        raise BadOperand(f"{len(sources)} registers for st{form[0]}")
    bits = form["type"][1:]
    for space, some, addresses in _spaces(threads, operands[0], form["space"]):
        values = np.stack([some.each(source, f"b{bits}") for source in sources], -1)
        wave = some.wave
        if space == "shared":
            wave.shared.store(wave.block[some.lanes], addresses, values)
        elif space == "local":
            wave.local.store(some.lanes, addresses, values)
        elif space == "global":
            wave.memory.store(addresses, values)
        else:
            raise OutOfBounds("store to a parameter")


def _spaces(threads, operand, space):
    """(space, threads, addresses in it): of a generic address each thread's own space."""
    addresses = threads.address(operand)
    if space is not None:
        space = space.partition(":")[0]
        yield space, threads, addresses - PARAMETER_WINDOW if space == "param" else addresses
        return
    windows = np.minimum(addresses >> REGION, 16)
    for window in np.unique(windows):
        mask = windows == window
        which = {1: "shared", 2: "local", 3: "param"}.get(int(window), "global")
        some = threads if mask.all() else threads.subset(mask)
        yield which, some, addresses[mask] - (0 if which == "global" else int(window) << REGION)


def _load(threads, space, addresses, size, items):
    wave = threads.wave
    if space == "shared":
        return wave.shared.load(wave.block[threads.lanes], addresses, size, items)
    if space == "local":
        return wave.local.load(threads.lanes, addresses, size, items)
    if space == "global":
        return wave.memory.load(addresses, size, items)
    first, last = int(addresses.min()), int(addresses.max())
    if first < 0 or last + size * items > len(wave.parameters):
        raise OutOfBounds(
            f"load of {size * items} bytes at byte {last} of the parameters, which have {len(wave.parameters)} bytes"
        )
    places = addresses[:, None] + np.arange(size * items)
    return np.ascontiguousarray(wave.parameters[places]).view(f"u{size}")
