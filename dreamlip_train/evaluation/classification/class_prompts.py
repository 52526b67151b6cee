"""Text features of classes, from their names and prompt templates: what zero-shot labelling and segmentation compare
images with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP

PHOTO = ("a photo of a {c}.",)


def read_classes(path: str | Path, *, repeated_allowed: bool = False) -> list[str]:
    """Class names, one a line; "a; b" are two names of one class.

    Raises:
        UserError: the file can't be read, is empty, or a class comes twice (it is named) unless ``repeated_allowed``.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes: cannot read {str(path)!r}: {error}") from error
    names = [name for name in names if name]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if not names or (twice and not repeated_allowed):
        problem = f"has {twice[0]!r} twice" if twice else "has no class"
        raise UserError(f"--classes: {str(path)!r} {problem}; give one class a line")
    return names


def read_templates(choice: str) -> tuple[str, ...]:
    """Prompt templates with {c} for the class: "photo" is one, "imagenet" are CLIP's 80, anything else a file with one
    a line.

    Raises:
        UserError: no such file, or a line without {c}.
    """
    if choice in ("", "photo"):
        return PHOTO
    if choice == "imagenet":
        return tuple(template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    try:
        templates = tuple(
            line.strip() for line in Path(choice).read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'--templates: got {choice!r}; give "photo", "imagenet" or a file with a template a line ({error})'
        ) from error
    without = [template for template in templates if "{c}" not in template]
    if without or not templates:
        raise UserError(
            f"--templates: {choice!r}: {without[0] if without else 'no line'!r} has no {{c}}, the place of the class"
        )
    return templates


def class_features(
    model: DreamLIP, classes: Sequence[str], templates: Sequence[str], device: torch.device | str, batch_size: int = 256
) -> Tensor:
    """Unit rows [C, D]: the normalized mean, over a class's names and the templates, of the texts' unit embeddings
    (Radford et al., 2021).
    """
    texts, owner = [], []
    for index, line in enumerate(classes):
        prompts = [template.replace("{c}", name) for name in _names(line) for template in templates]
        texts += prompts
        owner += [index] * len(prompts)
    with torch.no_grad():
        features_MD = torch.cat(
            [model.encode_texts(part.to(device)).float() for part in model.tokenize(texts).split(batch_size)]
        )
    sums_CD = torch.zeros(len(classes), features_MD.shape[1], device=features_MD.device)
    sums_CD.index_add_(0, torch.tensor(owner, device=features_MD.device), features_MD)
    return F.normalize(sums_CD, dim=-1)


def _names(line: str) -> list[str]:
    return [name for part in line.split(";") if (name := part.strip())]
