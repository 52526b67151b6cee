"""The options of a loss that say what its targets are, checked."""

from __future__ import annotations

from typing import Literal

from ..checks import check_choice

SameImage = Literal["ignore", "positive"]
IGNORE, POSITIVE = "ignore", "positive"


def check_targets(fn: str, label_smoothing: float, same_image: str, positives: str = "mean") -> None:
    """Raise ValueError unless these options exist and go together."""
    check_choice(fn, "same_image", same_image, (IGNORE, POSITIVE))
    number = isinstance(label_smoothing, (int, float)) and not isinstance(label_smoothing, bool)
    if not number or not 0 <= label_smoothing < 1:
        raise ValueError(f"{fn}: label_smoothing must be a number at least 0 and below 1, got {label_smoothing!r}")
    if positives == "logsum" and same_image == POSITIVE:
        raise ValueError(
            f"{fn}: same_image='positive' needs positives='mean': a sum inside the logarithm is not linear in the "
            "features; use same_image='ignore'"
        )
