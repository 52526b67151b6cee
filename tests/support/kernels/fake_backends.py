"""A device whose backends are right, slow, wrong, crashing and so on, for the tests of qualification;
run as a script it is the worker that meets them.
"""

import os
import signal
import sys
import time
from types import SimpleNamespace

import forked_worker
import torch

from dreamlip_kernels.backends import dispatch
from dreamlip_kernels.qualification import measure, supervisor, worker
from dreamlip_kernels.qualification.cases.case import Case, Speed

SECONDS = {"torch": 0.010, "right": 0.002, "level": 0.0098, "slow": 0.030}
BACKENDS = (
    "torch",
    "right",
    "level",
    "slow",
    "wrong",
    "unwritten",
    "overrun",
    "reader",
    "random",
    "crash",
    "hang",
    "memory",
    "raises",
)


@torch.library.custom_op("dreamlip_fake::twice", mutates_args=())
def twice(x: torch.Tensor, backend: str) -> torch.Tensor:
    """2 x, in the way of ``backend``."""
    out = x.new_empty(x.shape)
    torch.mul(x, 2, out=out)
    if backend == "wrong":
        out *= 1.01
    elif backend == "unwritten":
        out = x.new_empty(x.shape)
        torch.mul(x[1:], 2, out=out[1:])
    elif backend == "overrun" and out.untyped_storage().nbytes() > out.nbytes:  # where there is memory beyond the end
        out.as_strided((out.numel() + 1,), (1,)).view(-1)[-1] = 0
    elif backend == "reader":
        out[-1, -1] += x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]
    elif backend == "random":
        out += 1e-6 * torch.rand(out.shape)
    elif backend == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif backend == "hang":
        time.sleep(1000)
    elif backend == "memory":
        torch.empty(2**60)
    elif backend == "raises":
        raise RuntimeError("no kernel image is available for execution on the device")
    time.sleep(SECONDS.get(backend, 0))
    return out


twice.register_autograd(lambda ctx, d: (2 * d, None))


def cases(backend, dtype, device, widths):
    """One case at each width."""
    for d in widths:
        yield Case(
            f"D={d}",
            op=lambda x: (twice(x, backend),),
            oracle=lambda x: (2 * x,),
            draw=lambda seed, d=d: (torch.randn(5, d, generator=torch.Generator().manual_seed(seed)),),
        )


def eager(case, inputs, upstream, dtype):
    """The oracle at the inputs' dtype."""
    return case.values(case.oracle, inputs, upstream)


def speeds(backend, dtype, device, widths):
    """Two sizes; at the smaller one "level" and torch code take turns at being slow."""
    for n in (10, 1000):
        for d in widths:

            def make(n=n, d=d):
                x = torch.ones(2, d)
                name = (
                    {"level": "slow", "torch": "torch"}.get(backend, backend)
                    if n == 10
                    else backend.replace("level", "right")
                )
                return lambda: twice(x, name)

            yield Speed(f"N={n}", d, n, make, flops=1, moved=8)


SUBJECT = SimpleNamespace(
    OP="twice", DTYPES=("float32",), cases=cases, eager=eager, slack=lambda dtype: 1e-5, speeds=speeds
)


def install(monkeypatch=None, backends=BACKENDS, limit_s=12.0):
    """Make ``qualify`` meet these backends, in this process and in its workers."""
    checks = {name: lambda case: None for name in backends}
    replacements = [
        (measure, "SUBJECTS", (SUBJECT,)),
        (measure, "LIMIT_S", {"cpu": limit_s}),
        (measure, "_workers", lambda device: 3),
        (worker, "SUBJECTS", {"twice": SUBJECT}),
        (supervisor, "WORKER", [sys.executable, __file__]),
        (supervisor, "subprocess", forked_worker),
        (dispatch, "_BACKENDS", {"twice": checks}),
    ]
    for where, name, value in replacements:
        monkeypatch.setattr(where, name, value) if monkeypatch else setattr(where, name, value)


if __name__ == "__main__":
    install()
    if sys.argv[1:] == ["qualify"]:
        install(backends=("torch", "right"))
        record = measure.qualify("cpu", widths=(8,), reuse=True)
        print(record.date, record.seconds, [v.status for v in record.verdicts])
    else:
        worker.main()
