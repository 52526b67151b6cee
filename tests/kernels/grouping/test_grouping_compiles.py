"""How often Triton compiles the grouping's kernels: what a launch is specialized on, without a GPU."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton", reason="triton is an optional dependency of the kernels")

# In a process of its own: the suite's has the interpreter switched on.
SCRIPT = """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    from dreamlip_kernels.ops.group_patches import group_patches_triton as module

    backend = make_backend(GPUTarget("cuda", 90, 32))
    seen = {}

    class Recorder:
        def __init__(self, kernel):
            self.name = kernel.__name__
            self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                _, specialization, options = self.bind(*args, **kwargs)
                seen.setdefault(self.name, set()).add(str((specialization, options)))
            return launch

    module.pool_forward, module.pool_backward = Recorder(module.pool_forward), Recorder(module.pool_backward)
    shapes = ((1, 1, 1, 512), (4, 196, 8, 512), (2, 197, 1, 768), (5, 16, 8, 64), (3, 256, 16, 1024), (64, 49, 3, 512))
    for n, p, k, d in shapes:
        x, t = torch.randn(n, p, d).bfloat16(), torch.randn(n, k, d).bfloat16()
        for threshold in (None, 0.3):
            _, s, inv = module.forward(x, t, threshold, "minmax", None)
            module.backward(x, t, s, inv, threshold, "minmax", None, t)
    print(*(len(seen[name]) for name in ("pool_forward", "pool_backward")))
"""


def test_one_kernel_serves_every_number_of_patches_and_captions():
    """Six shapes with and without a threshold made ten kernels of each: K and P of 1 and of multiples of 16 had their
    own.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1", "1"]
