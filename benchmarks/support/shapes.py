"""The device of this machine and the named shapes that benchmarks time on it."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (N, K, D).
CONTRASTIVE_SHAPES = {"N512-K8-D512": (512, 8, 512), "N2048-K1-D512": (2048, 1, 512), "N2048-K8-D512": (2048, 8, 512)}
CONTRASTIVE_GPU_SHAPES = {f"N{n}-K{k}-D512": (n, k, 512) for n, k in ((4096, 8), (8192, 8), (32768, 1), (32768, 8))}
# (N, P, K, D): the patch grids of ViT-B/32 and B/16.
GROUPING_SHAPES = {"B32-N64-K8": (64, 49, 8, 512), "B16-N64-K8": (64, 196, 8, 512)}
GROUPING_GPU_SHAPES = {"B32-N4096-K8": (4096, 49, 8, 512), "B16-N4096-K8": (4096, 196, 8, 512)}


def named(cpu: dict, gpu: dict):
    """pytest parameters of the shapes for this machine, by name."""
    shapes = cpu | (gpu if DEVICE == "cuda" else {})
    return [pytest.param(shape, id=name) for name, shape in shapes.items()]
