"""What every backend of bidirectional_logsumexp promises on every device, as checks that take the backend and the
device.
"""

import torch
from numerics import clip_like

import dreamlip_kernels as dk
from dreamlip_kernels import reference
from dreamlip_kernels.ops.logsumexp.logsumexp import logsumexp, logsumexp_backward_op, logsumexp_op


def features(device, dtype=torch.float32, m=40, c=45, k=3, d=24, seed=0):
    """x [m, d] and y [k, c, d] that resemble each other."""
    x, y = clip_like(max(m, c), k, d, dtype, seed)
    return x[:m].to(device), y[:c].transpose(0, 1).to(device)


def results(x, y, scale=14.3, backend="torch", needs=(True, True), **masks):
    """row, col, and under one upstream of each the gradients of x and y that are needed."""
    inputs = [v.detach().requires_grad_(need) for v, need in zip((x, y), needs, strict=True)]
    outs = dk.bidirectional_logsumexp(*inputs, scale, backend=backend, **masks)
    gen = torch.Generator().manual_seed(3)
    upstream = [torch.rand(o.shape, generator=gen).to(o) for o in outs]
    of_inputs = [v for v in inputs if v.requires_grad]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, of_inputs, upstream)]


def gold(x, y, scale=14.3, **masks):
    """The same by the oracle, in float64."""
    inputs = [v.detach().double().requires_grad_() for v in (x, y)]
    outs = reference.bidirectional_logsumexp(*inputs, scale, x_mask=masks.get("x_mask"), y_mask=masks.get("y_mask"))
    gen = torch.Generator().manual_seed(3)
    upstream = [torch.rand(o.shape, generator=gen).to(o) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, inputs, upstream)]


def assert_close(got, expected, rounding=4e-3):
    """Equal up to ``rounding`` of the largest finite value, with the same infinities."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite), f"[{i}]: infinities or NaN differ"
        largest = float(b[finite].abs().max())
        assert (a.double() - b)[finite].abs().max() <= rounding * largest, f"[{i}]"


def masks_of_any_strides(backend, device):
    """A mask that is a column of a table, transposed or expanded was read as if it were dense (x_mask: gradient error
    98 %).
    """
    x, y = features(device)
    gen = torch.Generator().manual_seed(1)
    x_mask = (torch.rand(40, 3, generator=gen) > 0.3).to(device)[:, 1]
    for y_mask in (
        (torch.rand(45, 3, generator=gen) > 0.3).to(device).T,
        (torch.rand(3, 46, generator=gen) > 0.3).to(device)[:, 1:],
        (torch.rand(45, generator=gen) > 0.3).to(device).expand(3, 45),
        None,
    ):
        for masks in (dict(x_mask=x_mask, y_mask=y_mask), dict(y_mask=y_mask)):
            assert_close(results(x, y, backend=backend, **masks), gold(x, y, **masks))


def nothing_behind_a_mask_has_an_effect(backend, device):
    """0 * NaN is NaN: what a dropped row or column holds reached the others' gradients through the products."""
    gen = torch.Generator().manual_seed(1)
    masks = dict(x_mask=torch.rand(40, generator=gen) > 0.3, y_mask=torch.rand(3, 45, generator=gen) > 0.3)
    masks = {name: mask.to(device) for name, mask in masks.items()}
    for dtype, junk in ((torch.float32, torch.nan), (torch.float32, torch.inf), (torch.float16, torch.nan)):
        x, y = features(device, dtype)
        expected = gold(x, y, **masks)
        x, y = (v.masked_fill(~mask[..., None], junk) for v, mask in zip((x, y), masks.values(), strict=True))
        got = results(x, y, backend=backend, **masks)
        assert_close(got, expected)
        for grad, mask in zip(got[2:], masks.values(), strict=True):
            assert (grad[~mask] == 0).all(), "what is dropped has no gradient"


def nothing_in_bfloat16_behind_a_mask(backend, device):
    """1e36 in bfloat16: its square is infinite."""
    x, y = features(device, torch.bfloat16)
    y_mask = (torch.rand(3, 45, generator=torch.Generator().manual_seed(1)) > 0.3).to(device)
    expected = gold(x, y, y_mask=y_mask)
    for junk in (1e36, torch.nan):
        got = results(x, y.masked_fill(~y_mask[..., None], junk), backend=backend, y_mask=y_mask)
        assert_close(got, expected, rounding=2e-2)


def frozen_sides_get_nothing(backend, device):
    """The gradient of one side is the same without the other's."""
    x, y = features(device)
    both = results(x, y, backend=backend)
    assert torch.equal(results(x, y, backend=backend, needs=(True, False))[2], both[2])
    assert torch.equal(results(x, y, backend=backend, needs=(False, True))[2], both[3])
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        scale = torch.tensor(14.3, device=device, requires_grad=True)
        inputs = [v.detach().requires_grad_(need) for v, need in zip((x, y), needs, strict=True)]
        row, col = dk.bidirectional_logsumexp(*inputs, scale, backend=backend)
        (got,) = torch.autograd.grad(row.sum() + col.sum(), scale)
        scale64 = scale.detach().double().requires_grad_()
        row, col = reference.bidirectional_logsumexp(x.double(), y.double(), scale64)
        (expected,) = torch.autograd.grad(row.sum() + col.sum(), scale64)
        assert abs(got - expected) <= 2e-3 * abs(expected), needs


def width_zero(backend, device):
    """D = 0: every logit is 0."""
    x, y = torch.zeros(3, 0, device=device), torch.zeros(2, 5, 0, device=device)
    row, col, dx, dy = results(x, y, backend=backend)
    torch.testing.assert_close(row, torch.full_like(row, 5.0).log())
    torch.testing.assert_close(col, torch.full_like(col, 3.0).log())
    assert dx.shape == x.shape and dy.shape == y.shape


def largest_upstream_fits_float16(backend, device):
    """Row and column coefficients just below a power of two added up to more than float16 holds: gradients were
    infinite.
    """
    for dtype in (torch.float32, torch.float16):
        x = torch.eye(32, device=device, dtype=dtype)
        inputs = [v.requires_grad_() for v in (x.clone(), x[None].clone())]
        row, col = dk.bidirectional_logsumexp(*inputs, 100.0, backend=backend)
        upstream = torch.full_like(row, 1.9999)
        grads = torch.autograd.grad((row, col), inputs, (upstream, upstream))
        assert all(torch.isfinite(g).all() for g in grads), dtype


def strides_are_those_that_compiled_code_was_told(backend, device):
    """torch.compile plans with the fakes' strides; a permuted x gave its own strides to dx."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, y = features(device, m=9, c=9, d=32)
    layouts = {
        "dense": lambda v: v.contiguous(),
        "permuted": lambda v: v.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda v: torch.cat([v, v], -1)[..., 8:40],
        "expanded": lambda v: v[:1].expand_as(v),
        "strided": lambda v: v.repeat_interleave(2, -1)[..., ::2],
    }
    ops = torch.ops.dreamlip_kernels

    def step(x, y, row_like):
        scale = torch.ones((), device=row_like.device) * 14.3
        row, col, pos, _ = ops.bidirectional_logsumexp(x, y, scale, None, None, False, False, "fp16", backend)
        d_row, d_col = torch.ones_like(row).T.contiguous().T, torch.ones_like(col[:1]).expand_as(col)
        args = (x, y, scale, None, None, row, col, None, None, d_row, d_col, None, 0, 0, 9)
        grads = [
            ops.bidirectional_logsumexp_backward(*args, *needs, "fp16", backend, full_precision)
            for needs in ((True, True), (True, False), (False, True))
            for full_precision in (False, True)
        ]
        return [row, col, pos, *(v for three in grads for v in three)]

    for x_name, x_layout in layouts.items():
        for y_name, y_layout in layouts.items():
            if "dense" not in (x_name, y_name):
                continue
            real_inputs = x_layout(x), y_layout(y)
            real = step(*real_inputs, x)
            mode = FakeTensorMode()
            fake_inputs = [mode.from_tensor(v) for v in real_inputs]
            with mode:
                fake = step(*fake_inputs, fake_inputs[0])
            for i, (a, b) in enumerate(zip(real, fake, strict=True)):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), (x_name, y_name, i)


def positives_of_masked_pairs_are_harmless(backend, device):
    """pos of a pair that a mask drops takes no gradient, whatever is there and whatever its upstream."""
    x, y = features(device, m=40, c=40)
    y_mask = (torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) > 0.3).to(device)
    y = y.masked_fill(~y_mask[..., None], torch.nan).requires_grad_()
    x.requires_grad_()
    row, col, pos = logsumexp(x, y, torch.tensor(14.3, device=device), None, y_mask, paired=True, backend=backend)
    upstream = torch.ones_like(pos).masked_fill(~y_mask, torch.nan)
    grads = torch.autograd.grad((row, col, pos), (x, y), (torch.ones_like(row), torch.ones_like(col), upstream))
    assert all(torch.isfinite(g).all() for g in grads)


def _softmax_gradients(x, y, scale, present, own_rows, own_cols, lse, upstream):
    """dx and dy in float64 of both log-sum-exps of the ``present`` pairs and of the logits of the own pairs."""
    z = scale * torch.einsum("md,kcd->kmc", x.double(), y.double())
    (row, col), (d_row, d_col, d_pos) = lse, (v.double() for v in upstream)
    g = (z - row[:, :, None]).exp() * d_row[:, :, None] + (z - col[:, None]).exp() * d_col[:, None]
    g = torch.where(present, g, 0)
    g[:, own_rows, own_cols] += torch.where(present[:, own_rows, own_cols], d_pos[:, own_cols], 0)
    return [scale * torch.einsum(f"kmc,{other}", g, v.double()) for other, v in (("kcd->md", y), ("md->kcd", x))]


def pairs_of_one_image_are_left_out(backend, device, scale=14.3, n=44, d=24):
    """Of both sums and of every gradient, but for the pairs (j, j); an image may have no other pair at all."""
    x, y = features(device, torch.float16, n, n, 2, d)
    gen = torch.Generator().manual_seed(1)
    images = (torch.randint(12, (n,), generator=gen, dtype=torch.int32) * (torch.arange(n) > 5)).to(device)
    masks = [(torch.rand(*shape, generator=gen) > 0.2).to(device) for shape in ((n,), (2, n))]
    j = torch.arange(n, device=device)
    for x_mask, y_mask in ((None, None), masks):
        present = (images[:, None] != images[None, :]).expand(2, n, n).clone()
        present[:, j, j] = True
        present = present if x_mask is None else present & x_mask[None, :, None] & y_mask[:, None]
        z = (scale * torch.einsum("md,kcd->kmc", x.double(), y.double())).masked_fill(~present, -torch.inf)
        row, col = z.logsumexp(2), z.logsumexp(1)
        inputs = [v.detach().requires_grad_() for v in (x, y)]
        arguments = torch.tensor(scale, device=device), x_mask, y_mask, True, False, "fp16", backend, images, images
        got = logsumexp_op(*inputs, *arguments)[:3]
        upstream = [torch.rand(v.shape, generator=gen).to(v) for v in got]
        grads = torch.autograd.grad(got, inputs, upstream)
        alone = [v.masked_fill(torch.isneginf(v), torch.inf) for v in (row, col)]
        expected = [row, col, *_softmax_gradients(x, y, scale, present, j, j, alone, upstream)]
        assert_close([*got[:2], *grads], expected)


def pairs_of_one_image_in_a_stretch_of_rows(backend, device, scale=14.3, d=24):
    """As over ranks: the own pairs lie on a diagonal of which a part is other ranks' rows, and stay; what else is of
    one image does not, on that diagonal either.
    """
    n, world, rank, start, stop = 12, 3, 1, 4, 10
    m, diagonal = world * (stop - start), rank * (stop - start) - start
    x, y = features(device, torch.float16, m, n, 2, d)
    j, every = torch.arange(start, stop, device=device), torch.arange(n, device=device)
    x_images, y_images = (torch.arange(count, dtype=torch.int32, device=device) % 5 for count in (m, n))
    x_images[every + diagonal] = y_images  # the whole diagonal, and not only what is own
    present = (x_images[:, None] != y_images).expand(2, m, n).clone()
    present[:, j + diagonal, j] = True
    logits = scale * torch.einsum("md,kcd->kmc", x.double(), y.double())
    z = logits.masked_fill(~present, -torch.inf)
    row, col = z.logsumexp(2) + 0.3, z.logsumexp(1) + 0.2  # of more pairs than these
    pos = torch.full((2, n), torch.nan, device=device)
    pos[:, start:stop] = logits[:, j + diagonal, j].float()
    gen = torch.Generator().manual_seed(2)
    upstream = [torch.rand(2, count, generator=gen).to(device) for count in (m, n, n)]
    arguments = x, y, torch.tensor(scale, device=device), None, None, row.float(), col.float(), pos, None, *upstream
    got = logsumexp_backward_op(
        *arguments, diagonal, start, stop, True, True, "fp16", backend, True, x_images, y_images
    )
    assert_close(got[:2], _softmax_gradients(x, y, scale, present, j + diagonal, j, (row, col), upstream))


CHECKS = [
    pairs_of_one_image_are_left_out,
    pairs_of_one_image_in_a_stretch_of_rows,
    masks_of_any_strides,
    nothing_behind_a_mask_has_an_effect,
    nothing_in_bfloat16_behind_a_mask,
    frozen_sides_get_nothing,
    width_zero,
    largest_upstream_fits_float16,
    strides_are_those_that_compiled_code_was_told,
    positives_of_masked_pairs_are_harmless,
]
