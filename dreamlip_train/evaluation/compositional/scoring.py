"""Scores of cases whose texts, or pictures, differ in how their parts are put together. A tie is never right.

Shapes: I pictures of a case (one or two), and its two texts; s[i, t] is the cosine of picture i and text t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamlip_train.data.images import resize_center_crop
from dreamlip_train.evaluation import defaults
from dreamlip_train.evaluation.compositional.sets import SETS, Case, Picture, symmetric_relations
from dreamlip_train.evaluation.features import eval_mode, require_finite
from dreamlip_train.evaluation.pictures import read_picture
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP

_FEWEST = 25  # cases of a pair of attributes that count in ARO's mean


def evaluate_cases(
    model: DreamLIP,
    name: str,
    cases: Sequence[Case],
    device: torch.device | str,
    *,
    batch_size: int = defaults.BATCH_SIZE,
) -> dict[str, Any]:
    """The set's own scores, in percent.

    SugarCrepe and ARO ask for ``s[0, 0] > s[0, 1]``, the right text before the wrong one. "accuracy" is the mean of the
    kinds' accuracies: of SugarCrepe's seven; of ARO's relations that are not symmetric; of its pairs of attributes with
    at least 25 cases. "accuracy_of_all" is that over all cases. Winoground and MMVP-VLM have two pictures: "text" asks
    for ``s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]``, "image" for ``s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]``, "group"
    for both. MMVP-VLM's score is "image".

    Returns:
        {"accuracy", "accuracy_of_all"} or {"text", "image", "group"}, each with "chance": {score: percent}, "kinds":
        {kind: {score: percent, "cases"}} and "cases".
    Raises:
        UserError: a picture is damaged or its box is empty (it is named), or features are not finite.
    """
    similarities = _similarities(model, cases, device, batch_size)
    right = [_judgment(one) for one in similarities]
    kinds: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(case.kind for case in cases):
        own = [judgment for judgment, case in zip(right, cases, strict=True) if case.kind == kind]
        kinds[kind] = {score: _percent([judgment[score] for judgment in own]) for score in own[0]} | {"cases": len(own)}
    if SETS[name].scoring == "pairs":
        scores = {score: _percent([judgment[score] for judgment in right]) for score in ("text", "image", "group")}
        chance = {"text": 25.0, "image": 25.0, "group": 100 / 6}
    else:
        means = [row["accuracy"] for kind, row in kinds.items() if _counts(SETS[name].scoring, kind, row["cases"])]
        scores = {
            "accuracy": sum(means) / len(means) if means else None,
            "accuracy_of_all": _percent([judgment["accuracy"] for judgment in right]),
        }
        chance = {"accuracy": 50.0, "accuracy_of_all": 50.0}
    return {"set": name, **scores, "chance": chance, "kinds": kinds, "cases": len(cases)}


def _counts(scoring: str, kind: str, cases: int) -> bool:
    """Whether a kind is in the set's mean."""
    if scoring == "relations":
        return kind not in symmetric_relations()
    return cases >= _FEWEST if scoring == "attributes" else True


def _judgment(s: Tensor) -> dict[str, bool]:
    if len(s) == 1:
        return {"accuracy": bool(s[0, 0] > s[0, 1])}
    text = bool(s[0, 0] > s[0, 1]) and bool(s[1, 1] > s[1, 0])
    image = bool(s[0, 0] > s[1, 0]) and bool(s[1, 1] > s[0, 1])
    return {"text": text, "image": image, "group": text and image}


def _similarities(model: DreamLIP, cases: Sequence[Case], device: torch.device | str, batch_size: int) -> list[Tensor]:
    """Of each case the cosines [I, 2]."""
    similarities = []
    with eval_mode(model), torch.no_grad(), Progress("compositional", len(cases), "cases") as progress:
        for start in range(0, len(cases), batch_size):
            part = cases[start : start + batch_size]
            pictures = [_cut(one, model.image_size) for case in part for one in case.pictures]
            images_ID = model.encode_images(torch.stack(pictures).to(device))[0].float()
            tokens = model.tokenize([text for case in part for text in case.texts])
            texts_TD = model.encode_texts(tokens.to(device)).float()
            names = [one.name for case in part for one in case.pictures]
            require_finite("compositional: image features", images_ID, names)
            require_finite("compositional: text features", texts_TD)
            own_images = images_ID.split([len(case.pictures) for case in part])
            similarities += [(i @ t.T).cpu() for i, t in zip(own_images, texts_TD.split(2), strict=True)]
            progress.advance(len(part))
    return similarities


def _cut(one: Picture, size: int) -> Tensor:
    """[3, size, size] uint8: the middle of the picture, or of its box."""
    image = read_picture(one.source, "--root", one.name if isinstance(one.source, bytes) else "")
    if one.box is not None:
        left, top, width, height = one.box
        whole = tuple(image.shape[-2:])
        image = image[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
        if not image.numel():
            raise UserError(f"--root: {one.source}: the box {one.box} is outside of its {whole} pixels; fetch it again")
    return resize_center_crop(image, size)


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / len(right)


def format_cases(result: dict[str, Any]) -> str:
    """The scores with chance, and each kind (of many, the best and worst), as text to read."""
    scores = list(result["chance"])
    lines = [f"{result['cases']} cases"]
    for score in scores:
        value = "no kind counts" if result[score] is None else f"{result[score]:.1f} %"
        lines.append(f"{score.replace('_', ' '):<18}{value} (chance {result['chance'][score]:.1f})")
    first = next(iter(result["kinds"].values()))
    columns = [score for score in ("accuracy", "text", "image", "group") if score in first]
    ordered = sorted(result["kinds"].items(), key=lambda item: -item[1][columns[0]])
    if len(ordered) > 12:
        ordered = [*ordered[:5], *ordered[-5:]]
    for kind, row in ordered if len(result["kinds"]) > 1 else []:
        lines.append(f"  {kind:<28}" + "".join(f"{row[score]:>8.1f}" for score in columns) + f"{row['cases']:>8} cases")
    return "\n".join(lines)
