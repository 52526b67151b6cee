"""Where the contrast's time goes on this machine's GPU: ``python benchmarks/contrastive_on_device.py [--profile]``.

Prints, as Markdown, forward and forward + backward of the multi-positive contrast by each backend, each time's share of
its floor (1 U forward, 4 U both ways, U = 2 N N K D operations at this run's own rate of a large bfloat16 matrix
product), and with ``--profile`` the device's time by kernel. Well under a minute; bench_contrastive.py compares with
peers.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import dreamlip_kernels as dk
from dreamlip_kernels.backends import dispatch

SHAPES = [(512, 8, 512), (4096, 8, 512), (4096, 8, 768), (16384, 8, 512), (32768, 8, 512)]
LARGEST_FOR_TORCH = 16384  # its time at 32768 tells nothing new


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Median by device events, after two calls to warm up."""
    for _ in range(2):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def rates() -> tuple[float, float]:
    """Operations a second of an 8192 cubed bfloat16 product, bytes a second of a copy (read and written both
    counted).
    """
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    product, copy = milliseconds(lambda: a @ b, 10), milliseconds(lambda: target.copy_(source), 10)
    return 2 * 8192**3 / product * 1e3, 2 * source.numel() / copy * 1e3


def features(n: int, k: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Unit images, captions at a cosine of 0.3 to their image, a scale; and a mask with a tenth of the slots empty."""
    image = torch.nn.functional.normalize(torch.randn(n, d, device="cuda"), dim=-1)
    noise = 3 * torch.randn(n, k, d, device="cuda") / d**0.5
    text = torch.nn.functional.normalize(image[:, None] + noise, dim=-1)
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    mask = torch.rand(n, k, device="cuda") > 0.1
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale, mask


def step(backend: str, image, text, scale, mask) -> Callable[[], object]:
    """One forward and backward pass of the loss."""
    loss = lambda: dk.multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend=backend)  # noqa: E731
    return lambda: torch.autograd.grad(loss(), (image, text, scale))


def row(backend: str, n: int, k: int, d: int, dtype: torch.dtype, rate: float) -> str:
    """One line of the table."""
    inputs = features(n, k, d, dtype)
    image, text, scale, mask = inputs
    repeats = 3 if backend == "torch" else 8
    product_ms = 2 * n * n * k * d / rate * 1e3
    try:
        with torch.no_grad():
            forward = milliseconds(
                lambda: dk.multi_positive_contrastive_loss(image, text, scale, text_mask=mask, backend=backend), repeats
            )
        both = milliseconds(step(backend, *inputs), repeats)
    except RuntimeError as error:
        return f"| {str(dtype)[6:]} | N{n} K{k} D{d} | {backend} | {str(error).splitlines()[0][:80]} | |"
    shares = f"{forward:.2f} ms ({product_ms / forward:.0%}) | {both:.2f} ms ({4 * product_ms / both:.0%})"
    return f"| {str(dtype)[6:]} | N{n} K{k} D{d} | {backend} | {shares} |"


def print_profile(backend: str, n: int, k: int, d: int) -> None:
    """Device time by kernel of one forward and backward pass."""
    run = step(backend, *features(n, k, d, torch.bfloat16))
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        run()
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if event.device_type.name == "CUDA"]
    total, count = sum(e.self_device_time_total for e in events), sum(e.count for e in events)
    print(
        f"\n{backend} N{n} K{k} D{d}: {total / 1e3:.2f} ms of device time in {count} launches\n\n| kernel | calls | "
        "ms |\n|---|---|---|"
    )
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:14]:
        print(f"| {event.key[:70]} | {event.count} | {event.self_device_time_total / 1e3:.3f} |")


def why_not(backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend can't run here, or None."""
    return dispatch.why_not("bidirectional_logsumexp", backend, torch.empty(1, dtype=dtype, device="cuda"))


def main() -> None:
    """Parse the arguments, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="device time by kernel at N=4096 and 32768")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda", "torch"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "contrastive_on_device: needs a CUDA device\n")
    product, copy = rates()
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"matrix products {product / 1e12:.0f} TFLOP/s, copies {copy / 1e12:.2f} TB/s\n")
    print("| features | shape | backend | forward | forward + backward |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for n, k, d in SHAPES:
            for backend in options.backends:
                if why_not(backend, dtype):
                    continue
                if backend != "torch" or n <= LARGEST_FOR_TORCH:
                    print(row(backend, n, k, d, dtype, product), flush=True)
    if options.profile:
        for backend, n in itertools.product(("triton", "cuda"), (4096, 32768)):
            if backend in options.backends and not why_not(backend, torch.bfloat16):
                print_profile(backend, n, 8, 512)


if __name__ == "__main__":
    main()
