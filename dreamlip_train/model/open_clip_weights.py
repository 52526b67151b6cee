"""The towers' weights as open_clip files: read into a model of the same shape, and out of a trained one."""

from __future__ import annotations

from pathlib import Path

import open_clip
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import MAX_LOGIT_SCALE, DreamLIP


def load_open_clip_weights(clip: open_clip.CLIP, path: str) -> None:
    """Copy an open_clip weights file into ``clip``, position embeddings resized to its picture size and context length.

    Raises:
        UserError: the file cannot be read, holds more than tensors, or comes from another model (the first keys and
            shapes that differ are named).
    """
    if not Path(path).is_file():
        raise UserError(f"model.pretrained: no file {path!r}; give an open_clip weights file")
    try:
        state = open_clip.factory.load_state_dict(path, weights_only=True)
        problems = _mismatches(clip.state_dict(), state)
    except Exception as error:  # torch's reader raises whatever the bytes lead it to
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model.pretrained: {path!r} is not an open_clip weights file of tensors only: {reason}"
        ) from error
    if problems:
        reasons = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(
            f"model.pretrained: {path!r} comes from another model: {reasons}. Give the model.name or model.config it "
            "was trained with"
        )
    for key in ("logit_scale", "logit_bias"):
        if key in state:
            state[key] = state[key].reshape(clip.state_dict()[key].shape)
    resize_pos_embed(state, clip)
    resize_text_pos_embed(state, clip)
    clip.load_state_dict(state)


def open_clip_state_dict(model: DreamLIP) -> dict[str, Tensor]:
    """``model``'s towers under exactly open_clip.CLIP's keys: fp32 on the CPU, logit_scale 0-dim and within its bound,
    nothing train-only.
    """
    state = {key: value.detach().float().cpu() for key, value in model.clip.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(()).clamp(0.0, MAX_LOGIT_SCALE)
    return state


def _mismatches(expected: dict[str, Tensor], loaded: dict[str, Tensor]) -> list[str]:
    """What keeps ``loaded`` from loading, position counts aside: those are resized."""
    problems = [f"{key} is missing" for key in expected if key not in loaded]
    problems += [f"{key} is not in this model" for key in loaded if key not in expected]
    for key in expected.keys() & loaded.keys():
        want, got = tuple(expected[key].shape), tuple(loaded[key].shape)
        if key.endswith("positional_embedding"):
            want, got = want[1:], got[1:]
        if want != got and expected[key].numel() != 1:
            problems.append(f"{key} is {got}, this model's is {want}")
    return sorted(problems, key=lambda problem: "positional" in problem)
