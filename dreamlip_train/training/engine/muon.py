"""Muon for the matrices of the towers' blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.95
_ITERATIONS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0, not exact at 1


class Muon(torch.optim.AdamW):
    """AdamW, but a weight of a group with ``matrices`` is so many matrices W [A, B], one below the other (a block's
    queries, keys and values are three), and each moves by an orthogonalized update::

        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.2 * max(A, B) ** 0.5 * orthogonal(0.05 * gradient + 0.95 * momentum)
        W -= lr * (update + weight_decay * W)

    Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon/). The factor is Liu et al.'s (arXiv 2502.16982): an
    element of the update is as large as AdamW's, so that one rate serves both.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The gradients that Muon has used are gone after it: AdamW passes over what has none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if "matrices" in group else ():
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
                    parameter.grad = None
        super().step()
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            # Nobody counts Muon's steps, but AdamW reads the number wherever it restores a state.
            state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(parameter)}
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
        direction = gradient.lerp(momentum, _MOMENTUM)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for weight, part in zip(parameter.chunk(group["matrices"]), direction.chunk(group["matrices"]), strict=True):
            weight.add_(orthogonal(part), alpha=-0.2 * group["lr"] * max(part.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T: its singular values come to between 0.7 and 1.2, but for the smallest.

    Five Newton-Schulz iterations, on a GPU in bfloat16 as in Jordan's own code.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
