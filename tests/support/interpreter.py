"""Triton's interpreter with what it works out again and again remembered: the same values in half the time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import getmembers
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter


def remember() -> None:
    """Once a process, and of the versions of Triton that are as 3.6 is."""
    if hasattr(interpreter, "_LangPatchScope") and interpreter._patch_lang.__module__ != __name__:
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
        interpreter._get_np_dtype = _of_elements(interpreter._get_np_dtype)
        interpreter._patch_builtin = _patch_builtin
        core._type_for_tuple_values = _of_integers(core._type_for_tuple_values)
        core.block_type.__init__ = _of_block_types(core.block_type.__init__)
        core.tensor.__init__ = _of_tensors(core.tensor.__init__)


def _once_a_launch(patch: Callable) -> Callable:
    """A launch patches the language until it ends, and so does every call of a function inside it: of each module
    that they see the language through, the first is enough.
    """
    patched: set[frozenset[str]] = set()

    @cache
    def seen(fn: Callable) -> frozenset[str]:
        return frozenset(value.__name__ for value in fn.__globals__.values() if value is language or value is core)

    def patch_lang(fn: Callable) -> Any:
        if seen(fn) in patched:
            return None  # only a launch, which is the first, reads it
        scope = patch(fn)
        if not patched:
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        patched.add(seen(fn))
        return scope

    return patch_lang


def _of_elements(np_dtype: Callable) -> Callable:
    """The table of all types was written at every question."""
    of_scalar = cache(np_dtype)
    return lambda dtype: np_dtype(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)


def _of_integers(type_of: Callable) -> Callable:
    """The type of a shape: of numbers, or of constants that are numbers."""
    of_numbers = cache(lambda kind, numbers: type_of([kind(number) for number in numbers]))

    def type_for_tuple_values(values: list, fields: list[str] | None = None) -> core.tuple_type:
        if fields is None and all(type(value) is int for value in values):
            return of_numbers(int, tuple(values))
        if fields is None and all(type(value) is core.constexpr and type(value.value) is int for value in values):
            return of_numbers(core.constexpr, tuple(value.value for value in values))
        return type_of(values, fields)

    return type_for_tuple_values


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Which names of a package are Triton's built-in functions was asked of all its members at every launch."""
    names = _BUILTINS.get(package) or [name for name, member in getmembers(package) if core.is_builtin(member)]
    _BUILTINS[package] = names
    for name in names:
        if core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


_BUILTINS: dict[Any, list[str]] = {}


def _of_block_types(initialize: Callable) -> Callable:
    """A type of blocks is that of all blocks of its elements and shape."""
    known: dict[tuple, dict[str, Any]] = {}

    def __init__(self, element_ty: core.dtype, shape: Any) -> None:
        numbers = tuple(n.value if type(n) is core.constexpr else n for n in shape)
        key = type(element_ty), element_ty.name, getattr(element_ty, "address_space", None), numbers
        if key not in known:
            initialize(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return __init__


def _of_tensors(initialize: Callable) -> Callable:
    """All tensors of a block type have its shape."""
    known: dict[tuple, dict[str, Any]] = {}

    def __init__(self, handle: Any, type: core.dtype) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in known:
            initialize(self, handle, type)
            known[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(known[key], handle=handle, type=type, dtype=type.scalar)

    return __init__
