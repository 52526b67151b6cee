"""Which cases run by default, and which in `make ptx` alone."""

import itertools

import pytest


def cases(fixed: set[tuple], *lists) -> list:
    """The product of the lists as pytest parameters; those that are not in ``fixed`` are marked ptx."""
    product = list(itertools.product(*lists))
    if unknown := fixed - set(product):
        raise ValueError(f"cases: {unknown} are not among the products of the lists")
    return [pytest.param(*case, marks=[] if case in fixed else pytest.mark.ptx) for case in product]
