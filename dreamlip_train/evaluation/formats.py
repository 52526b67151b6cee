"""How the numbers of each ``eval`` command are shown as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dreamlip_train.evaluation.classification.multi_label import format_multi_label
from dreamlip_train.evaluation.classification.zero_shot import format_zero_shot
from dreamlip_train.evaluation.compositional.scoring import format_cases
from dreamlip_train.evaluation.held_out import format_held_out
from dreamlip_train.evaluation.retrieval.long_captions import format_long_captions
from dreamlip_train.evaluation.retrieval.retrieval_sets import format_retrieval
from dreamlip_train.evaluation.segmentation.segmentation import format_segmentation

FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "retrieval": format_held_out,
    "retrieval-set": format_retrieval,
    "long-retrieval": format_long_captions,
    "compositional": format_cases,
    "zeroshot": format_zero_shot,
    "multilabel": format_multi_label,
    "segment": format_segmentation,
}
"""By the command's name, as ``--output`` notes it."""
