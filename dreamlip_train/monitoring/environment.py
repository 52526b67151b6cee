"""``dreamlip-train doctor``: versions, devices, kernel backends, and whether shards can be read, as text to paste into
a report.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
from pathlib import Path

import torch

import dreamlip_kernels
from dreamlip_train.captions.statistics import format_summary
from dreamlip_train.jobs.user_error import RunError
from dreamlip_train.prepare.validate import validate_shards

_PACKAGES = ("dreamlip", "torch", "deepspeed", "open_clip_torch", "webdataset", "numpy", "triton")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behavior a run depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def qualify_kernels() -> None:
    """Test and time the kernels on this machine's device, with what is being tried on standard error;
    ``examine`` then shows the verdict.

    Raises:
        RunError: the device cannot be used.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dreamlip_kernels").setLevel(logging.INFO)
    try:
        dreamlip_kernels.qualify()
    except RuntimeError as error:
        raise RunError(str(error)) from error


def examine(pattern: str = "") -> str:
    """What this machine offers a run, as text; with ``pattern`` also the findings of ``prepare validate`` on those
    shards.

    Raises:
        UserError: ``pattern`` matches no shard.
    """
    parts = [
        "versions\n" + "\n".join(f"  {name:<18} {version}" for name, version in versions().items()),
        "devices\n" + "\n".join(f"  {line}" for line in _devices()),
        "kernel backends\n" + "\n".join(f"  {line}" for line in dreamlip_kernels.explain().splitlines()),
    ]
    if pattern:
        parts.append(format_summary(pattern, validate_shards(pattern, index=False)))
    return "\n\n".join(parts)


def _devices() -> list[str]:
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [f"CPU: {len(os.sched_getaffinity(0))} cores for this process, {gigabytes:.0f} GB memory"]
    lines += [f"disk here: {shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}: {found.name}, {found.total_memory / 1e9:.0f} GB, compute capability "
            f"{found.major}.{found.minor}"
        )
    if not torch.cuda.is_available():
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        lines.append(f"no CUDA device (torch is {built_for}): runs use the CPU and gloo")
    return lines
