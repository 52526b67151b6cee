"""torch.compile over ranks: a step of DreamLIPLoss is one graph, with the values, gradients and overlap of eager."""

import pytest
import torch
import torch.distributed as dist
from numerics import clip_like
from ranks import join, spawn

import dreamlip_kernels as dk
from dreamlip_kernels.distributed import gathered_logsumexp

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


OPTIONS = (dict(contrast="batch", negatives="all"), dict(pairs="sigmoid"), dict())
CASES = [*((options, True, masks) for options in OPTIONS for masks in (True, False)), (dict(), False, False)]


@pytest.mark.filterwarnings("ignore:DreamLIPLoss")
def test_one_graph_with_the_values_of_eager():
    """A step broke into twelve pieces over ranks, could not be traced whole without patches, and gave the images of the
    sigmoid loss no gradient.
    """
    spawn(compiled_worker, 2, [CASES[0], CASES[3], CASES[-1]], False)


@pytest.mark.slow
def test_every_option_and_other_shapes_over_three_ranks():
    """One graph for any batch size, its ops' sizes symbols."""
    spawn(compiled_worker, 3, CASES[:-1], True)


def overlap_worker(rank, world, port):
    """The images travel while this rank's own products are computed, in compiled code as in eager; nothing breaks the
    graph; a rank with another batch is an error on every rank, not a hang.
    """
    join(rank, world, port)
    events = []
    gather, product = dist.all_gather_into_tensor, gathered_logsumexp.logsumexp_op

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def noted_gather(*args, async_op=False, **options):
        events.append("start" if async_op else "gather")
        work = gather(*args, async_op=async_op, **options)
        return Work(work) if async_op else work

    dist.all_gather_into_tensor = noted_gather
    gathered_logsumexp.logsumexp_op = lambda *args, **options: events.append("product") or product(*args, **options)
    step = step_of(dk.DreamLIPLoss(), True, True)
    features, masks = batch(rank, 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled):
        events.clear()
        value_and_gradients(run, features, masks)
        assert events == ["gather", "start", "product", "wait", "product"]  # first the image mask's
    broken = torch._dynamo.explain(step)(*features, masks)
    assert (broken.graph_count, broken.graph_break_count) == (1, 0), broken.break_reasons
    features, masks = batch(rank, 5 + rank)  # new to both: a rank that knows its shape does not ask
    with pytest.raises(ValueError, match=r"N \(images a rank\) must be the same on every rank, got \[5, 6\]"):
        compiled(*features, masks)
    dist.barrier()  # a rank that leaves while the other still talks makes gloo abort it
    dist.destroy_process_group()


def test_overlap_and_agreement_under_compile():
    spawn(overlap_worker, 2)


def inductor_worker(rank, world, port):
    join(rank, world, port)
    step = step_of(dk.DreamLIPLoss(contrast="batch"), True, True)
    for n in (4, 3):
        features, masks = batch(rank, n)
        got, expected = (value_and_gradients(f, features, masks) for f in (torch.compile(step, fullgraph=True), step))
        for name, ours, theirs in zip(NAMES, got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)
        spoiled = features[0].detach().clone().fill_(torch.nan).requires_grad_()
        assert torch.compile(step, fullgraph=True)(spoiled, *features[1:], masks).isnan()
    dist.destroy_process_group()


@pytest.mark.slow
def test_with_the_default_compiler():
    """Inductor's code and order of collectives; a second shape is compiled with symbols; a NaN stays one."""
    spawn(inductor_worker, 2)
