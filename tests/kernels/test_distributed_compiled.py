"""torch.compile over ranks: a step of DreamLIPLoss is one graph, with the values, gradients and overlap of eager."""

import itertools

import pytest
import torch
import torch.distributed as dist
from numerics import clip_like
from ranks import join, spawn

import dreamlip_kernels as dk

N, K, P, D = 8, 3, 5, 8
NAMES = ("loss", "image_features", "text_features", "patch_features", "logit_scale")


def batch(rank, n, dtype=torch.float32):
    """This rank's features, each needing its gradient, and masks."""
    image, text = clip_like(4 * n, K, D, torch.float64)
    own, draw = slice(rank * n, (rank + 1) * n), torch.Generator().manual_seed(rank)
    patches = torch.randn(n, P, D, generator=draw, dtype=torch.float64)
    features = [v.to(dtype).detach().requires_grad_() for v in (image[own], text[own], patches, torch.tensor(9.0))]
    text_mask = torch.rand(n, K, generator=draw) > 0.3
    return features, dict(image_mask=torch.arange(n) != 1, text_mask=text_mask)


def step_of(loss, patches, masks):
    def step(image, text, patch_features, scale, options):
        features = dict(patch_features=patch_features) if patches else {}
        return loss(image, text, scale, **features, **(options if masks else {}))

    return step


def value_and_gradients(step, features, masks):
    loss = step(*features, masks)
    return loss.detach(), *torch.autograd.grad(loss, features, allow_unused=True, materialize_grads=True)


def compiled_worker(rank, world, port, cases, dynamic):
    join(rank, world, port)
    for options, patches, masked in cases:
        torch._dynamo.reset()
        step = step_of(dk.DreamLIPLoss(**options), patches, masked)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic or None)
        for n in (N // world, N, N // world) if dynamic else (N // world,):
            features, masks = batch(rank, n)
            got, expected = (value_and_gradients(f, features, masks) for f in (compiled, step))
            for name, ours, theirs in zip(NAMES, got, expected, strict=True):
                case = f"{options}, patches {patches}, masks {masked}, {n} images: {name}"
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=case)
    dist.destroy_process_group()


OPTIONS = (dict(), dict(contrast="batch", negatives="all"), dict(pairs="sigmoid"))
CASES = list(itertools.product(OPTIONS, (True,), (False, True)))


@pytest.mark.filterwarnings("ignore:DreamLIPLoss")
def test_one_graph_with_the_values_of_eager():
    """A step broke into twelve pieces over ranks, and could not be traced whole without patches."""
    spawn(compiled_worker, 2, [*CASES, (dict(), False, False)], False)


def test_other_shapes_and_three_ranks():
    """One graph for any batch size, its ops' sizes symbols."""
    spawn(compiled_worker, 3, CASES[3:4], True)
