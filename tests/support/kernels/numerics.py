"""The tolerance rule: an implementation may err at most twice as much as plain torch does at the same dtype."""

import torch


def assert_no_worse_than_torch(name, got, low, gold):
    """gold: the oracle in float64 on the rounded inputs; low: the oracle at the tested dtype;
    each a tensor or a tuple of them.
    """
    if isinstance(gold, (tuple, list)):
        assert len(got) == len(low) == len(gold), f"{name}: {len(got)} values for {len(gold)}"
        for i, (g, lo, go) in enumerate(zip(got, low, gold, strict=True)):
            assert_no_worse_than_torch(f"{name}[{i}]", g, lo, go)
        return
    assert got.shape == gold.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(gold.shape)}"
    got, low, gold = got.detach().double().cpu(), low.detach().double().cpu(), gold.detach().double().cpu()
    finite = torch.isfinite(gold)
    assert torch.equal(got[~finite], gold[~finite]), f"{name}: infinities differ"
    got, low, gold = got[finite], low[finite], gold[finite]
    largest = gold.abs().max().item() if gold.numel() else 0.0
    assert largest > 1e-6, f"{name}: the expected values are all (nearly) zero, so the comparison is empty"
    error = (got - gold).abs().max().item()
    allowed = 2 * (low - gold).abs().nan_to_num(torch.inf).max().item() + 1e-5 * largest
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (largest value {largest:.3e})"


def clip_like(n, k, d, dtype=torch.float32, seed=0, noise=1.0):
    """Unit images [n, d] and captions [n, k, d] that resemble their image: structure that random vectors lack."""
    gen = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(n, d, generator=gen), dim=-1)
    text = torch.nn.functional.normalize(image[:, None] + noise * torch.randn(n, k, d, generator=gen) / d**0.5, dim=-1)
    return image.to(dtype), text.to(dtype)


def value_and_grads(fn, inputs, seed=0):
    """The outputs of ``fn(*inputs)`` and, under one random upstream for each output, the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gen = torch.Generator().manual_seed(seed)
    # The same upstream at every dtype: rounded to bfloat16, which all of them hold.
    upstream = [torch.randn(o.shape, generator=gen).bfloat16().to(o) for o in outputs]
    return tuple(o.detach() for o in outputs) + torch.autograd.grad(outputs, inputs, upstream)


def three_ways(op, oracle, inputs):
    """(got, low, gold): the op, the oracle at the inputs' dtype, the oracle in float64; values and gradients."""
    gold = value_and_grads(oracle, [x.double() for x in inputs])
    return value_and_grads(op, inputs), value_and_grads(oracle, inputs), gold


def worst_of(draws):
    """One (got, low, gold) from several: a single number left over where large terms cancel says little,
    the worst of several does.
    """
    return tuple([torch.stack(values) for values in zip(*way, strict=True)] for way in zip(*draws, strict=True))
