"""What a backend asks of a device, counted without one: kernels in whose place nothing is launched, torch's own
launches, memory.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dreamlip_kernels.ops.logsumexp import logsumexp


class NothingLaunched:
    """In place of a kernel, noted in ``launches``: kernels allocate nothing, so shapes may be what no interpreter gets
    through.
    """

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(self.name)


def most_allocated(step):
    """(what ``step()`` returns, the most bytes it had allocated at a time)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = step()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    return out, max(itertools.accumulate(e.nbytes() for e in events))


# Operations that launch nothing: memory that nobody fills, and numbers that stay on the host.
_SILENT = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
    "scalar_tensor",
    "promote_types",
)


def shares_memory(out, argument):
    """Whether what may be a view is one: ``contiguous`` and ``to`` copy where they must."""
    return (
        not isinstance(out, torch.Tensor) or out.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
    )


class TorchLaunches(TorchDispatchMode):
    """Every operation of torch that would launch a kernel, also inside this package's ops; and those of them whose
    result has ``many`` elements or more.
    """

    def __init__(self, launches, passes, many):
        super().__init__()
        self.launches, self.passes, self.many = launches, passes, many

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        ours = func.namespace == "dreamlip_kernels"  # counted by what is inside
        if not ours and name not in _SILENT and not (func.is_view and shares_memory(out, args[0])):
            self.launches.append(func._schema.name)
            if isinstance(out, torch.Tensor) and out.numel() >= self.many:
                self.passes.append(name)
        return out


@contextmanager
def all_launches(launches, many=2**62):
    """Kernels, products and operations of torch that are launched inside; yields the list of torch's passes over
    ``many`` elements or more.
    """
    launches.clear()
    passes = []

    def inside(backend):
        def counting(*arguments):
            with TorchLaunches(launches, passes, many):
                return backend(*arguments)

        return counting

    with pytest.MonkeyPatch.context() as patched, TorchLaunches(launches, passes, many):
        for table in (logsumexp._FORWARD, logsumexp._BACKWARD):
            patched.setitem(table, "triton", inside(table["triton"]))
        yield passes
