"""Named shapes, the compared providers' inputs and peak memory, for every benchmark."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (N, K, D). A GPU runs all; a CPU the first ones.
CONTRASTIVE_SHAPES = {"N512-K8-D512": (512, 8, 512), "N2048-K1-D512": (2048, 1, 512), "N2048-K8-D512": (2048, 8, 512)}
CONTRASTIVE_GPU_SHAPES = {f"N{n}-K{k}-D512": (n, k, 512) for n in (4096, 8192, 32768) for k in (1, 8)}
# (N, P, K, D): the patch grids of ViT-B/32 and B/16.
GROUPING_SHAPES = {"B32-N64-K8": (64, 49, 8, 512), "B16-N64-K8": (64, 196, 8, 512)}
GROUPING_GPU_SHAPES = {"B32-N4096-K8": (4096, 49, 8, 512), "B16-N4096-K8": (4096, 196, 8, 512)}


def named(cpu: dict, gpu: dict):
    """pytest parameters of the shapes for this machine, by name."""
    shapes = cpu | (gpu if DEVICE == "cuda" else {})
    return [pytest.param(shape, id=name) for name, shape in shapes.items()]


@pytest.fixture
def run(benchmark):
    """``run(step)``: median time of ``step()``, with the peak of device memory beyond what was allocated before (CUDA only)."""

    def measure(step):
        def synchronised():
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        synchronised()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            synchronised()
            benchmark.extra_info["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        benchmark.pedantic(synchronised, rounds=10 if DEVICE == "cuda" else 3, warmup_rounds=1)

    return measure
