"""The ``doctor`` command: versions, devices, kernel backends, and whether shards can be read, as text to paste into a
report.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

import tyro

from dreamlip_train.cli.usage import say
from dreamlip_train.jobs.user_error import RunError


def doctor(arguments: list[str], program: str) -> None:
    """What this machine can run, and with a PATTERN whether those shards are sound"""

    def doctor(pattern: tyro.conf.Positional[str] = "", qualify: bool = False) -> None:
        """Versions, devices and kernel backends of this machine; with a PATTERN also a check of those shards.

        Args:
            qualify: first test and time the kernels on the GPU (or the CPU), for a minute or two; training uses what it
                finds (docs/backends.md).
        """
        if qualify:
            qualify_kernels()
        with contextlib.suppress(BrokenPipeError):
            say(examine(pattern))

    tyro.cli(doctor, args=arguments, prog=program)


def qualify_kernels() -> None:
    """Test and time the kernels on this machine's device, with what is being tried on standard error;
    ``examine`` then shows the verdict.

    Raises:
        RunError: the device cannot be used.
    """
    import dreamlip_kernels

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
    import dreamlip_kernels
    from dreamlip_train.captions.statistics import format_summary
    from dreamlip_train.monitoring.environment import versions
    from dreamlip_train.prepare.validate import validate_shards

    parts = [
        "versions\n" + "\n".join(f"  {name:<18} {version}" for name, version in versions().items()),
        "devices\n" + "\n".join(f"  {line}" for line in _devices()),
        "kernel backends\n" + "\n".join(f"  {line}" for line in dreamlip_kernels.explain().splitlines()),
    ]
    if pattern:
        parts.append(format_summary(pattern, validate_shards(pattern, index=False)))
    return "\n\n".join(parts)


def _devices() -> list[str]:
    import torch

    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [f"CPU: {len(os.sched_getaffinity(0))} cores for this process, {gigabytes:.0f} GB memory"]
    lines += [f"disk here: {shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}: {properties.name}, {properties.total_memory / 1e9:.0f} GB, compute capability "
            f"{properties.major}.{properties.minor}"
        )
    if not torch.cuda.is_available():
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        lines.append(f"no CUDA device (torch is {built_for}): runs use the CPU and gloo")
    return lines
