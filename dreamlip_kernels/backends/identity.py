"""What a verdict is about: the device with its driver, the libraries that make its code, and the kernel sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from ..version import __version__
from . import extension

# The parts that a verdict measured elsewhere shares with this machine; the rest may differ.
CODE = ("device", "capability", "triton", "sources")


@functools.cache
def identity(device: torch.device) -> dict[str, str | int]:
    """Device name, capability and processors, driver, torch, CUDA, Triton, this package, what csrc/ was built for,
    and a hash of the kernel sources.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        what = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "driver": _driver(),
        }
    else:
        what = {
            "device": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "processors": torch.get_num_threads(),
            "driver": "",
        }
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "triton": _triton()}
    return what | versions | {"package": __version__, "extension": _extension(), "sources": source_hash()}


def file_name(device: torch.device) -> str:
    """The name of the file that holds the verdict on ``device``: readable, and different wherever the identity
    differs.
    """
    parts = identity(device)
    digest = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]
    return f"{re.sub('[^A-Za-z0-9]+', '-', str(parts['device'])).strip('-')[:60]}-{digest}.json"


@functools.cache
def source_hash() -> str:
    """Of every file that a kernel's result or speed can depend on: the ops with their numerics, and csrc/ where it is
    installed.
    """
    package = Path(__file__).parents[1]
    files = [*sorted((package / "ops").rglob("*.py")), package / "numerics.py"]
    csrc = extension.sources()
    files += sorted(csrc.rglob("*.[ch]*")) if csrc else []
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


def _extension() -> str:
    """The CUDA part of csrc/: with one, there is a backend more. The CPU part is built at need, and always the same."""
    info = extension.build_info()
    return f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info and info["cuda"] else ""


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    release = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return release[1] if release else ""


def _processor() -> str:
    try:
        names = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return (names[1].strip() if names else "") or platform.processor() or platform.machine() or "CPU"


def _triton() -> str:
    for package in ("triton", "triton-windows"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
