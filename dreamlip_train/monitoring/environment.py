"""Versions of what a run depends on."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("dreamlip", "torch", "deepspeed", "open_clip_torch", "webdataset", "numpy", "triton")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behavior a run depends on; those not installed are left out."""
    by_package = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_package
