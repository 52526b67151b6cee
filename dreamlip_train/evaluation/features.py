"""Features of held-out samples, finite or refused by name, and the patch weights of their sub-captions.

Shapes: n images of a batch, P patches, D embedding width, K sub-captions of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamlip_kernels import patch_weights
from dreamlip_train.config.schema import Normalization
from dreamlip_train.evaluation import defaults
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP


def encode_batch(
    model: DreamLIP,
    batch: Sequence[dict[str, Any]],
    device: torch.device | str,
    text_batch_size: int = defaults.BATCH_SIZE,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Image features [n, D], patch features [n, P, D] or None, and each sample's sentence features [K, D], in float32.

    Raises:
        UserError: features that are not finite, naming the samples they belong to.
    """
    image_nD, patch_nPD = model.encode_images(torch.stack([sample["image"] for sample in batch]).to(device))
    tokens = model.tokenize([sentence for sample in batch for sentence in sample["sentences"]])
    text_MD = torch.cat([model.encode_texts(part.to(device)) for part in tokens.split(text_batch_size)]).float()
    counts = [len(sample["sentences"]) for sample in batch]
    keys = [sample["key"] for sample in batch]
    require_finite("evaluate: image features", image_nD, keys)
    require_finite(
        "evaluate: sentence features",
        text_MD,
        [key for key, count in zip(keys, counts, strict=True) for _ in range(count)],
    )
    if patch_nPD is not None:
        require_finite("evaluate: patch features", patch_nPD, keys)
        patch_nPD = patch_nPD.float()
    return image_nD.float(), patch_nPD, list(text_MD.split(counts))


def sub_caption_weights(
    patch_features: Tensor, text_features: Sequence[Tensor], threshold: float | None, normalization: Normalization
) -> list[Tensor]:
    """The grouping's patch weights (docs/math.md section 3) of each sample's own sub-captions:
    patches [n, P, D], texts n x [K, D] -> n x [K, P].
    """
    padded_nKD = nn.utils.rnn.pad_sequence(list(text_features), batch_first=True)
    weights_nKP = patch_weights(patch_features, padded_nKD, threshold=threshold, normalization=normalization)
    return [weights[: len(text)] for weights, text in zip(weights_nKP, text_features, strict=True)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def require_finite(name: str, features: Tensor, keys: Sequence[str] | None = None) -> None:
    bad = (~torch.isfinite(features)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        names = [] if keys is None else sorted({str(keys[row]) for row in bad})
        of = f"samples {names[:5]}" if names else f"rows {bad[:5]}"
        raise UserError(
            f"{name}: NaN or infinite values in {len(bad)} of {len(features)} rows, first in {of}; "
            "check the weights and those inputs"
        )
