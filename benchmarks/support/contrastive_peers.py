"""What else computes a multi-positive contrastive loss: ``peer(image [N,D], text [N,K,D], scale) -> scalar``.

All are the mean over K slots of a CLIP loss. Peers with 16-bit logits (eager and compiled code under autocast) are not
of equal accuracy: the benchmark states the error of each.
``pytest benchmarks/bench_contrastive.py --peer FILE.py:NAME`` adds a function of one's own.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SCALE = 14.3  # the benchmark's scale, for peers that take a number


def open_clip_per_slot(image, text, scale):
    """What people run today: open_clip's ClipLoss for each slot; 16-bit features make 16-bit logits, as under AMP."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    scale = scale.to(image.dtype)
    return sum(loss(image, text[:, k], scale) for k in range(text.shape[1])) / text.shape[1]


def flattened(image, text, scale):
    """All N x N*K logits at once, reduced in float32."""
    n, k, d = text.shape
    z = scale.to(image.dtype) * image @ text.reshape(n * k, d).T
    z = z.float().view(n, n, k)
    positive = z.diagonal(dim1=0, dim2=1).T  # [N, K]
    return (z.logsumexp(1) - positive + z.logsumexp(0) - positive).mean() / 2


def compiled(loss):
    """``loss`` through torch.compile."""
    torch._dynamo.reset()  # dtypes and shapes have graphs of their own, each as if it were the first
    return torch.compile(loss)


class _ChunkedLogsumexp(torch.autograd.Function):
    """Row and column log-sum-exp by matrix products into a float32 chunk and elementwise passes over it.

    The honest baseline without fused kernels.
    """

    CHUNK = 2**27  # logits

    @staticmethod
    def chunks(image, text):
        step = max(1, _ChunkedLogsumexp.CHUNK // image.shape[0])
        for start in range(0, text.shape[0], step):
            yield slice(start, start + step)

    @staticmethod
    def logits(image, text, scale):
        z = (
            torch.mm(image, text.T, out_dtype=torch.float32)
            if image.is_cuda and image.dtype != torch.float32
            else image @ text.T
        )
        return z.float().mul_(scale)

    @staticmethod
    def forward(ctx, image, text, scale):
        row = torch.full((image.shape[0],), -torch.inf, device=image.device)
        col = torch.empty(text.shape[0], device=image.device)
        for part in _ChunkedLogsumexp.chunks(image, text):
            z = _ChunkedLogsumexp.logits(image, text[part], scale)
            row = torch.logaddexp(row, z.logsumexp(1))
            col[part] = z.logsumexp(0)
        ctx.save_for_backward(image, text, scale, row, col)
        return row, col

    @staticmethod
    def backward(ctx, d_row, d_col):
        image, text, scale, row, col = ctx.saved_tensors
        d_image, d_text = torch.zeros_like(image, dtype=torch.float32), torch.empty_like(text)
        for part in _ChunkedLogsumexp.chunks(image, text):
            z = _ChunkedLogsumexp.logits(image, text[part], scale)
            g = (z - row[:, None]).exp_().mul_(d_row[:, None])
            g += z.sub_(col[part]).exp_().mul_(d_col[part])
            g = g.to(image.dtype)
            d_image += g @ text[part]
            d_text[part] = (g.T @ image) * scale
        return (d_image * scale).to(image.dtype), d_text, (d_image * image).sum()


def chunked_unfused(image, text, scale):
    """One chunk of float32 logits at a time; slots one after another."""
    total = 0
    for k in range(text.shape[1]):
        row, col = _ChunkedLogsumexp.apply(image, text[:, k].contiguous(), scale)
        positive = scale * (image.float() * text[:, k].float()).sum(1)
        total = total + (row + col - 2 * positive).mean() / 2
    return total / text.shape[1]


def inf_cl(image, text, scale):
    """Inf-CL's kernels (float32, TF32 products), both directions of each slot."""
    from inf_cl import cal_flash_loss

    total = 0
    for k in range(text.shape[1]):
        caption = text[:, k].contiguous()
        total = (
            total
            + (cal_flash_loss(image, caption, scale=scale) + cal_flash_loss(caption, image, scale=scale)).mean() / 2
        )
    return total / text.shape[1]


def memeff(image, text, scale):
    """memeff's CLIP loss for each slot, with the textbook gradient; it takes the temperature as a number."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    slots = [loss(image, text[:, k].contiguous()) for k in range(text.shape[1])]
    return sum(slots) / len(slots) + 0 * scale  # it has no gradient for the scale


def named_by(places: list[str], names_in_use: tuple[str, ...]) -> dict[str, Callable]:
    """The functions of ``--peer FILE.py:NAME ..``, by name."""
    names = [place.rpartition(":")[2] for place in places]
    for name in names:
        if name in names_in_use or names.count(name) > 1:
            raise pytest.UsageError(f"--peer: there is a provider {name!r} already; give your function another name")
    return dict(zip(names, map(load, places), strict=True))


def load(place: str) -> Callable:
    """The function that ``FILE.py:NAME`` names."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise pytest.UsageError(f"--peer: expected FILE.py:NAME with a file that exists, got {place!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise pytest.UsageError(f"--peer: {file} has no function {name!r}")
    return getattr(module, name)


def why_not(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if name == "Inf-CL" and (importlib.util.find_spec("inf_cl") is None or not torch.cuda.is_available()):
        return "Inf-CL needs a CUDA device and the benchmark extra (inf-cl)"
    if name == "memeff" and (importlib.util.find_spec("memeff") is None or not torch.cuda.is_available()):
        return "memeff needs a CUDA device and the benchmark extra (memeff)"
    if name == "open_clip per slot" and importlib.util.find_spec("open_clip") is None:
        return "open_clip is not installed"
    return None


def cross_entropy_per_slot(image, text, scale):
    """open_clip_per_slot without open_clip: what torch.compile is given."""
    labels = torch.arange(image.shape[0], device=image.device)
    scale, total = scale.to(image.dtype), 0
    for k in range(text.shape[1]):
        z = scale * image @ text[:, k].T
        total = total + (F.cross_entropy(z.float(), labels) + F.cross_entropy(z.T.float(), labels)) / 2
    return total / text.shape[1]
