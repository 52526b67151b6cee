"""Whether a backend is right in a case: float64 as gold, at most twice eager's error, the same bits three times,
as right from a CUDA graph, no stray write.
"""

from __future__ import annotations

from types import ModuleType

import torch

from .cases.case import Case, Outputs
from .guards import Guards, surrounded

DRAWS = {"cuda": 3, "cpu": 2}


class Wrong(Exception):
    """The backend's result is not what it must be; the message says how."""


def check(case: Case, subject: ModuleType, dtype: str) -> float:
    """The largest error as a share of what is allowed, at most 1.

    Several draws together decide: a gradient that is one number, left over where large terms cancel,
    may come out right by chance.

    Raises:
        Wrong: an error too large, a value nobody wrote, other bits at a repeat, or a write beyond an end.
    """
    ways: list[tuple[Outputs, Outputs, Outputs]] = []
    for seed in range(DRAWS[case.draw(0)[0].device.type]):
        inputs = tuple(surrounded(v) for v in case.draw(seed))
        upstream = case.upstream(inputs)
        got = _three_times(case, inputs, upstream)
        gold = case.values(case.oracle, [v.double() for v in inputs], upstream)
        ways.append((got, subject.eager(case, inputs, upstream, dtype), gold))
    if case.capture and got[0].is_cuda:
        ways.append((_captured(case, inputs, upstream), *ways[-1][1:]))
    names = [f"output {i}" if i < len(upstream) else f"gradient {i - len(upstream)}" for i in range(len(got))]
    shares = []
    for i, name in enumerate(names):
        single = i < len(upstream) or got[i].ndim == 0
        floor = case.resolution if single else 0.0
        shares.append(_share(name, [[way[i] for way in draw] for draw in ways], subject.slack(dtype), floor))
    return max(shares)


def _three_times(case: Case, inputs: Outputs, upstream: Outputs) -> Outputs:
    with Guards() as guards:
        got = case.values(case.op, inputs, upstream)
    if stray := guards.overwritten():
        raise Wrong(stray)
    for i, value in enumerate(got):
        if bool(value.isnan().any()):
            raise Wrong(f"NaN in value {i}: an element that nobody wrote, or a read beyond an input")
    for _ in range(2):
        again = case.values(case.op, inputs, upstream)
        for i, (a, b) in enumerate(zip(got, again, strict=True)):
            if not _same_bits(a, b):
                raise Wrong(f"not the same bits at a repeat (value {i}, largest difference {_difference(a, b):.3g})")
    return got


def _captured(case: Case, inputs: Outputs, upstream: Outputs) -> Outputs:
    """The values by a CUDA graph that was captured on other inputs and replayed on these."""
    static = tuple(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in inputs)
    for buffer, v in zip(static, case.draw(99), strict=True):
        buffer.copy_(v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.values(case.op, static, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = case.values(case.op, static, upstream)
    for buffer, v in zip(static, inputs, strict=True):
        buffer.copy_(v)
    graph.replay()
    return tuple(v.clone() for v in outs)


def _share(name: str, draws: list[list[torch.Tensor]], slack: float, floor: float) -> float:
    """Of one output over all draws: the largest error by what is allowed, 2 * eager's + slack * the largest value +
    floor.
    """
    error = eager = largest = 0.0
    for got, low, gold in ([v.double() for v in draw] for draw in draws):
        if got.shape != gold.shape:
            raise Wrong(f"{name} has shape {tuple(got.shape)}, expected {tuple(gold.shape)}")
        finite = torch.isfinite(gold)
        if not torch.equal(torch.where(finite, 0, got), torch.where(finite, 0, gold)):
            raise Wrong(f"{name}: infinities differ from the oracle's")
        if not bool(torch.isfinite(got[finite]).all()):
            raise Wrong(f"{name}: infinity where the oracle is finite")
        if bool(finite.any()):
            error = max(error, (got - gold)[finite].abs().max().item())
            eager = max(eager, (low - gold)[finite].abs().nan_to_num(torch.inf).max().item())
            largest = max(largest, gold[finite].abs().max().item())
    allowed = 2 * eager + slack * largest + floor
    if error > allowed:
        raise Wrong(
            f"{name}: error {error:.3g}, allowed {allowed:.3g} (twice eager's {eager:.3g}; largest value {largest:.3g})"
        )
    return error / allowed if allowed else 0.0


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()
