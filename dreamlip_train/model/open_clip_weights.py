"""The towers' weights as open_clip files: read into a model of the same shape, and out of a trained one."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from open_clip.model import resize_pos_embed
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import MAX_LOGIT_SCALE, DreamLIP
from dreamlip_train.model.tensor_files import refuse_bomb, require_plain

_KEPT_POSITIONS = 20


def load_open_clip_weights(clip: open_clip.CLIP, path: str) -> None:
    """``fit_weights`` of an open_clip weights file.

    Raises:
        UserError: the file cannot be read, holds more than tensors, or comes from another model (the first keys and
            shapes that differ are named).
    """
    if not Path(path).is_file():
        raise UserError(f"model.pretrained: no file {path!r}; give an open_clip weights file")
    try:
        refuse_bomb(Path(path))
        state = open_clip.factory.load_state_dict(path, weights_only=True)
        state = {key: torch.as_tensor(value) for key, value in state.items()}
        require_plain(state)
    except Exception as error:  # torch's reader raises whatever the bytes lead it to
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model.pretrained: {path!r} is not an open_clip weights file of tensors only: {reason}"
        ) from error
    fit_weights(clip, state, path)


def fit_weights(clip: open_clip.CLIP, state: dict[str, Tensor], source: str) -> None:
    """Copy open_clip's ``state`` into ``clip``: image position embeddings resized to its picture size, text position
    embeddings cut or stretched (``stretch_positions``) to its context length.

    Raises:
        UserError: ``state`` comes from another model; ``source`` and what differs are named.
    """
    if (
        hasattr(clip, "text") and "positional_embedding" in state
    ):  # weights of a plain CLIP, whose text tower is no module
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    if "logit_bias" not in clip.state_dict():  # DreamLIP has its own
        state = {key: value for key, value in state.items() if key != "logit_bias"}
    problems = _mismatches(clip.state_dict(), state)
    if problems:
        reasons = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(
            f"model.pretrained: {source!r} comes from another model: {reasons}. Give the model.name or model.config it "
            "was trained with"
        )
    state = dict(state)
    for key in ("logit_scale", "logit_bias"):
        if key in state:
            state[key] = state[key].reshape(clip.state_dict()[key].shape)
    resize_pos_embed(state, clip)
    for key in ("positional_embedding", "text.positional_embedding"):
        if key in state:
            state[key] = stretch_positions(state[key], len(clip.state_dict()[key]))
    clip.load_state_dict(state)


def stretch_positions(positions: Tensor, length: int) -> Tensor:
    """Position embeddings [C, width] for ``length`` positions, as Long-CLIP does (Zhang et al., 2024): the first 20
    (of short contexts half) stay, which nearly all captions that these were trained on end within; the rest are
    linearly interpolated, and extrapolated beyond the last. Fewer positions are the first ones.

    From 77 to 248 each of the rest becomes 4.
    """
    count = len(positions)
    if length <= count:
        return positions[:length]
    head = min(_KEPT_POSITIONS, count // 2)
    place = head + torch.arange(length - head, dtype=torch.float64) * ((count - head) / (length - head))
    low = place.floor().long().clamp(max=max(count - 2, 0))
    part = (place - low)[:, None].to(positions.dtype)
    stretched = positions[low] + part * (positions[(low + 1).clamp(max=count - 1)] - positions[low])
    return torch.cat([positions[:head], stretched])


def open_clip_state_dict(model: DreamLIP) -> dict[str, Tensor]:
    """``model``'s towers under exactly open_clip.CLIP's keys: fp32 on the CPU, logit_scale 0-dim and within its bound,
    nothing train-only.
    """
    state = {key: value.detach().float().cpu() for key, value in model.clip.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(()).clamp(0.0, MAX_LOGIT_SCALE)
    return state


def _mismatches(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """What keeps ``weights`` from loading, position counts aside: those are resized."""
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not in this model" for key in weights if key not in expected]
    for key in expected.keys() & weights.keys():
        ours, theirs = tuple(expected[key].shape), tuple(weights[key].shape)
        if key.endswith("positional_embedding"):
            ours, theirs = ours[1:], theirs[1:]
        if ours != theirs and expected[key].numel() != 1:
            problems.append(f"{key} is {theirs}, this model's is {ours}")
    return sorted(problems, key=lambda problem: "positional" in problem)
