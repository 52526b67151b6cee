"""A loss of one's own, checked and timed beside this library's.

python examples/compare_kernels.py
pytest benchmarks/bench_contrastive.py --benchmark-only -k "N512-K8 or my_loss" --peer
examples/compare_kernels.py:my_loss
"""

import time

import torch

import dreamlip_kernels as dk
from dreamlip_kernels import reference


def my_loss(image, text, scale):
    """The multi-positive contrast with all logits at once: put your kernel here."""
    logits = scale * torch.einsum("md,nkd->kmn", image, text)  # [K, N, N]
    positive = logits.diagonal(dim1=1, dim2=2)
    return (logits.logsumexp(2) + logits.logsumexp(1) - 2 * positive).mean() / 2


def value_and_gradients(loss, *inputs):
    """The loss and its gradients, in one list."""
    value = loss(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


def main() -> None:
    """Errors against float64, then times of forward and backward."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, k, d = 512, 8, 256
    image = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=-1).requires_grad_()
    text = torch.nn.functional.normalize(torch.randn(n, k, d, device=device), dim=-1).requires_grad_()
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    inputs = (image, text, scale)
    double = [v.detach().double().requires_grad_() for v in inputs]
    gold = value_and_gradients(reference.multi_positive_contrastive_loss, *double)
    print(dk.explain())
    for name, loss in {"my_loss": my_loss, "dreamlip_kernels": dk.multi_positive_contrastive_loss}.items():
        pairs = zip(value_and_gradients(loss, *inputs), gold, strict=True)
        errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]
        begin = time.perf_counter()
        for _ in range(5):
            value_and_gradients(loss, *inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        milliseconds = (time.perf_counter() - begin) / 5 * 1e3
        digits = "  ".join(f"{error:.0e}" for error in errors)
        print(f"{name:18} errors of loss, d_image, d_text, d_scale: {digits}   {milliseconds:7.1f} ms")


if __name__ == "__main__":
    main()
