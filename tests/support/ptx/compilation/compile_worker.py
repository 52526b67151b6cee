"""A process that compiles Triton kernels to PTX as a launch on a given device would:
requests on stdin, replies on stdout, pickled.

The tests' own process has Triton's interpreter switched on, in which nothing can be compiled.
A request is ``(module, name, capability, arguments,
options)`` with arguments as ``stand_ins.describe`` gives them;
Triton's own launch code specializes them (divisible by 16, equal to 1, None), so the
PTX is what a device would be sent. A reply is a ``Compiled``, or the text of the error.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback

from .stand_ins import Compiled, restore


class _Driver:
    """As much of Triton's driver as compilation asks for; the device's number is the capability, so that each has
    caches of its own.
    """

    capability = 80

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _compile(driver, module, name, capability, arguments, options) -> Compiled:
    driver.capability = capability
    kernel = getattr(importlib.import_module(module), name)
    built = kernel.run(*map(restore, arguments), grid=(1,), warmup=True, **{k: restore(v) for k, v in options.items()})
    metadata = built.metadata
    return Compiled(
        ptx=built.asm["ptx"],
        shared_bytes=metadata.shared,
        signature=dict(built.src.signature),
        tensor_maps=[dict(meta) for meta in getattr(metadata, "tensordesc_meta", None) or []],
        scratch_bytes=getattr(metadata, "global_scratch_size", 0),
    )


def main():
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints must not come between the replies
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver as active

    CUDABackend.make_cubin = lambda *_: b""  # PTX is all that is wanted, and ptxas takes longest
    driver = _Driver()
    active.set_active(driver)
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = _compile(driver, *request)
        except Exception:
            reply = traceback.format_exc()
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
