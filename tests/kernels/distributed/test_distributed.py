"""Losses over 2, 3 and 4 gloo ranks equal the single-process float64 oracle: values, all gradients,
the scale's included.
"""

import math

import pytest
import torch
import torch.distributed as dist
from numerics import clip_like
from rank_cases import CASES, IDS, IN_STRETCHES, D, K, N, global_case, run_case
from ranks import join, spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from triton_runs import require_triton

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.distributed import collectives as distributed
from dreamlip_kernels.distributed import gathered_logsumexp


def equality_worker(rank, world, port):
    join(rank, world, port)
    n = N // world
    own = slice(rank * n, (rank + 1) * n)
    whole = global_case()
    for case in CASES + IN_STRETCHES:
        if n % case.get("candidates", 1):  # blocks of a rank's images are other blocks than one process makes
            continue
        gathered_logsumexp.ROWS_A_STRETCH = N // 3 if case in IN_STRETCHES else 4096
        case = {name: value for name, value in case.items() if name != "stretches"}
        expected_loss, expected_grads = run_case(reference, case, *whole)
        loss, grads = run_case(dk, case, *(t[own] for t in whole), IDS[own])
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world, expected_loss, atol=1e-12, rtol=1e-12, msg=f"{case}: loss")
        scale = grads[3].clone()
        dist.all_reduce(scale)
        # Averaging over ranks, as DDP and ZeRO do, gives the global gradient of parameters:
        # a feature's is then 1/W of what its rank has.
        for name, got, expected in zip(("image", "text", "patches"), grads, expected_grads, strict=False):
            torch.testing.assert_close(got / world, expected[own], atol=1e-12, rtol=1e-10, msg=f"{case}: d{name}")
        torch.testing.assert_close(scale / world, expected_grads[3], atol=1e-12, rtol=1e-10, msg=f"{case}: dscale")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_equal_to_one_process(world):
    spawn(equality_worker, world)


def frozen_worker(rank, world, port):
    """A side that needs no gradient: the other's and the scale's are the same, and no sum of its gradient travels."""
    join(rank, world, port)
    n = N // world
    image, text = (t[rank * n : (rank + 1) * n] for t in global_case()[:2])
    sums = []
    reduce_scatter = dist.reduce_scatter_tensor
    dist.reduce_scatter_tensor = lambda *args, **options: sums.append(args) or reduce_scatter(*args, **options)
    grads = {}
    for needs in ((True, True), (False, True), (True, False), (False, False)):
        inputs = [v.clone().requires_grad_(need) for v, need in zip((image, text), needs, strict=True)]
        scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        loss = dk.multi_positive_contrastive_loss(*inputs, scale)
        sums.clear()
        wanted = {i: v for i, v in enumerate((*inputs, scale)) if v.requires_grad}
        grads[needs] = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        assert len(sums) == needs[0]
        for i, grad in grads[needs].items():
            torch.testing.assert_close(grad, grads[True, True][i], atol=1e-12, rtol=1e-10)
    # FSDP2's parameters outside forward: torch said "mixed torch.Tensor and DTensor" somewhere inside.
    mesh = init_device_mesh("cpu", (world,))
    scale = distribute_tensor(torch.tensor(9.0, dtype=torch.float64), mesh, [Replicate()]).requires_grad_()
    with pytest.raises(ValueError, match=r"logit_scale is a DTensor; pass logit_scale.full_tensor\(\)"):
        dk.multi_positive_contrastive_loss(image, text, scale)
    loss = dk.multi_positive_contrastive_loss(image, text, scale.full_tensor())
    torch.testing.assert_close(torch.autograd.grad(loss, scale)[0].to_local(), grads[True, True][2])
    dist.destroy_process_group()


def test_a_frozen_side_over_ranks():
    spawn(frozen_worker, 2)


def triton_worker(rank, world, port):
    """The Triton kernels inside, in their interpreter: float32 images and captions computed in float16,
    the other ranks' positives not theirs.
    """
    join(rank, world, port)
    n, k, d = 16, 2, 24
    image, text = clip_like(n * world, k, d, noise=1.5)
    mask = torch.rand(n * world, k, generator=torch.Generator().manual_seed(2)) > 0.3
    own = slice(rank * n, (rank + 1) * n)
    ids = torch.arange(n * world) * 7 % 23
    for negatives, positives, masked, stretches, image_ids in (
        ("slot", "mean", True, 1, None),
        ("all", "logsum", False, 1, None),
        ("slot", "mean", False, 3, None),
        ("all", "mean", True, 3, ids),
    ):
        gathered_logsumexp.ROWS_A_STRETCH = n * world // stretches
        options = dict(negatives=negatives, positives=positives)
        inputs = [v.double().requires_grad_() for v in (image, text, torch.tensor(20.0))]
        expected = reference.multi_positive_contrastive_loss(
            *inputs, text_mask=mask if masked else None, image_ids=image_ids, **options
        )
        options["image_ids"] = None if image_ids is None else image_ids[own]
        gold = torch.autograd.grad(expected, inputs)
        inputs = [v.clone().requires_grad_() for v in (image[own], text[own], torch.tensor(20.0))]
        loss = dk.multi_positive_contrastive_loss(
            *inputs, text_mask=mask[own] if masked else None, backend="triton", **options
        )
        d_image, d_text, d_scale = torch.autograd.grad(loss, inputs)
        for total in (loss.detach(), d_scale):
            dist.all_reduce(total)
        torch.testing.assert_close(loss.detach().double() / world, expected.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(d_scale.double() / world, gold[2], atol=1e-4, rtol=1e-2)
        for got, want in ((d_image / world, gold[0][own]), (d_text / world, gold[1][own])):
            assert (got - want).norm() < 2**-9 * want.norm(), (options, masked, stretches)
    dist.destroy_process_group()


def test_the_triton_backend_over_ranks():
    require_triton()
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device Triton compiles for it, and gloo's tensors are the CPU's")
    spawn(triton_worker, 2)


def empty_worker(rank, world, port):
    join(rank, world, port)
    image, text = torch.randn(0, D, requires_grad=True), torch.randn(0, K, D, requires_grad=True)
    loss = dk.multi_positive_contrastive_loss(image, text, 3.0)
    assert loss == 0 and torch.autograd.grad(loss, image)[0].shape == (0, D)
    # Sums that are empty here, and everywhere: minus infinity, with no gradient and no NaN.
    part = torch.zeros(1, 2 * world, dtype=torch.float64)
    part[0, 0], part[0, 1] = (-torch.inf if rank else 3.0), -torch.inf
    total = distributed.reduce_scatter_logsumexp(part.requires_grad_())
    assert total.tolist() == ([[3.0, -torch.inf]] if rank == 0 else [[pytest.approx(math.log(2))] * 2])
    grad = torch.autograd.grad(total, part, torch.ones_like(total))[0]
    assert grad[0, :2].tolist() == [float(rank == 0), 0.0] and grad[0, 2:].tolist() == [pytest.approx(0.5)] * 2
    dist.destroy_process_group()


def test_what_is_empty_on_every_rank_has_no_gradient():
    spawn(empty_worker, 2)


def subgroup_worker(rank, world, port):
    """Two data-parallel groups of two: each is its own world."""
    join(rank, world, port)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, place = groups[rank // 2], rank % 2
    whole = global_case()
    expected_loss, expected_grads = run_case(reference, CASES[0], *whole)
    own = slice(place * N // 2, (place + 1) * N // 2)
    loss, grads = run_case(dk, {**CASES[0], "group": mine}, *(t[own] for t in whole))
    dist.all_reduce(loss, group=mine)
    torch.testing.assert_close(loss / 2, expected_loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grads[0] / 2, expected_grads[0][own], atol=1e-12, rtol=1e-10)
    dist.destroy_process_group()


def test_groups_are_respected():
    spawn(subgroup_worker, 4)


def counting_worker(rank, world, port):
    """Images travel once each way, captions never: the collectives of a step, the values each moves, and their type."""
    join(rank, world, port)
    calls = []

    def counted(name, size_of):
        real = getattr(dist, name)

        def wrapper(*args, **kwargs):
            moved = size_of(*args)
            calls.append((name, moved.numel(), str(moved.dtype)[6:]))
            return real(*args, **kwargs)

        setattr(dist, name, wrapper)

    counted("all_gather_into_tensor", lambda out, *_: out)
    counted("reduce_scatter_tensor", lambda out, whole, *_: whole)
    counted("all_reduce", lambda x, *_: x)
    counted("all_to_all_single", lambda out, *_: out)
    n = N // world
    own = [t[rank * n : (rank + 1) * n] for t in global_case()]
    for dtype, masked, stretches in (("float32", False, 1), ("bfloat16", False, 1), ("bfloat16", True, 3)):
        gathered_logsumexp.ROWS_A_STRETCH = N // stretches
        calls.clear()
        images, texts, _, mask = own
        images, texts = (t.to(getattr(torch, dtype)) for t in (images, texts))
        scale = torch.tensor(9.0, requires_grad=True)
        loss = dk.multi_positive_contrastive_loss(
            images.requires_grad_(), texts.requires_grad_(), scale, text_mask=mask if masked else None
        )
        torch.autograd.grad(loss, (images, texts, scale))
        expected = [
            ("all_gather_into_tensor", N * D, dtype),  # images
            ("all_to_all_single", K * N, "float32"),  # each rank's part of the rows' log-sum-exp, to the rows' owner
            *([("all_reduce", 1, "int64")] if masked else []),  # how many captions there are
            ("all_to_all_single", K * N, "float32"),  # the upstream of each part, back
            *[("reduce_scatter_tensor", N * D // stretches, "float32")] * stretches,  # the images' gradients
        ]
        assert calls == expected
    dist.destroy_process_group()


def test_only_images_travel():
    spawn(counting_worker, 2)
