"""Argument checks of the public functions: each error names the function, the argument, what came and what to do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .numerics import accumulate_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_features(fn: str, **features: tuple[Tensor, int]) -> None:
    """Each named (tensor, ndim) has that many dimensions and a floating dtype, and all share a device and the last
    dimension.
    """
    first_name, (first, _) = next(iter(features.items()))
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        for name, (tensor, _) in features.items():
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f"{fn}: {name} carries a tangent, and forward-mode differentiation (torch.func.jvp) is not "
                    "supported; "
                    "use reverse mode: backward() or torch.autograd.grad"
                )
    if not torch.compiler.is_compiling():
        for name, (tensor, _) in features.items():
            if is_functorch_wrapped_tensor(tensor):
                raise NotImplementedError(
                    f"{fn}: {name} is inside a transform of torch.func (grad, vmap, ..), which is not supported; "
                    "use backward() or torch.autograd.grad"
                )
    for name, (tensor, ndim) in features.items():
        refuse_dtensor(fn, name, tensor)
        if tensor.ndim != ndim:
            raise ValueError(f"{fn}: {name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{fn}: {name} must be a floating tensor ({', '.join(str(t)[6:] for t in FLOATS)}), got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{fn}: {first_name} and {name} must share a device, got {first.device} and {tensor.device}; move one"
            )
        if tensor.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{fn}: {first_name} and {name} must share their last dimension D, got {tuple(first.shape)} and "
                f"{tuple(tensor.shape)}"
            )


def refuse_dtensor(fn: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if it is a DTensor, as FSDP2's parameters are outside their module's forward."""
    if hasattr(tensor, "full_tensor"):  # found without importing torch.distributed.tensor
        raise ValueError(
            f"{fn}: {name} is a DTensor; pass {name}.full_tensor(), which keeps its gradient, or take it from what the "
            "wrapped module's forward returns"
        )


def promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that torch promotes them to: float32 images and bfloat16 captions, as autocast gives them,
    meet in float32.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def check_shared(fn: str, dims: str, a_name: str, a: tuple[int, ...], b_name: str, b: tuple[int, ...]) -> None:
    """Two shape parts agree; ``dims`` names them."""
    if tuple(a) != tuple(b):
        raise ValueError(f"{fn}: {a_name} and {b_name} must share {dims}, got {tuple(a)} and {tuple(b)}")


def check_mask(fn: str, name: str, mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """An optional mask is bool, on the features' device and of the given shape."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"{fn}: {name} must be a bool tensor (True = present), got {mask.dtype}; use {name}.bool()")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{fn}: {name} must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{fn}: {name} must be on {like.device} like the features, got {mask.device}")


def check_image_ids(fn: str, image_ids: Tensor | None, n: int, like: Tensor) -> None:
    """Optional ids of images are int64, one for each image, on the features' device."""
    if image_ids is None:
        return
    if image_ids.dtype != torch.int64:
        raise ValueError(f"{fn}: image_ids must be an int64 tensor, got {image_ids.dtype}; use image_ids.long()")
    if tuple(image_ids.shape) != (n,):
        raise ValueError(f"{fn}: image_ids must have shape {(n,)}, one an image, got {tuple(image_ids.shape)}")
    if image_ids.device != like.device:
        raise ValueError(f"{fn}: image_ids must be on {like.device} like the features, got {image_ids.device}")


def check_pairs(
    fn: str,
    image_features: Tensor,
    text_features: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_ids: Tensor | None,
) -> None:
    """What a loss of image-caption pairs takes fits together: [N, D], [N, K, D], [N], [N, K] and [N]."""
    check_features(fn, image_features=(image_features, 2), text_features=(text_features, 3))
    check_shared(fn, "N", "image_features", image_features.shape[:1], "text_features", text_features.shape[:1])
    n, k, _ = text_features.shape
    check_mask(fn, "image_mask", image_mask, (n,), image_features)
    check_mask(fn, "text_mask", text_mask, (n, k), text_features)
    check_image_ids(fn, image_ids, n, image_features)


def check_choice(fn: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """A string option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{fn}: {name} must be one of {choices}, got {value!r}")


def as_scale(fn: str, name: str, scale: Tensor | float, like: Tensor) -> Tensor:
    """The logit multiplier as a 0-dim tensor of the accumulation dtype on the features' device; keeps its gradient."""
    if not isinstance(scale, Tensor):
        return torch.full((), float(scale), dtype=accumulate_dtype(like), device=like.device)
    refuse_dtensor(fn, name, scale)
    if scale.numel() != 1:
        raise ValueError(f"{fn}: {name} must hold one value, got shape {tuple(scale.shape)}")
    if scale.device != like.device:
        raise ValueError(f"{fn}: {name} must be on {like.device} like the features, got {scale.device}")
    return scale.reshape(()).to(accumulate_dtype(like))
