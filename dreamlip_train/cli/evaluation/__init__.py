"""The ``eval`` commands, by what they are read from. ``options`` has what all of them share."""

from __future__ import annotations

from typing import Any

from dreamlip_train.cli.evaluation.captions import compositional, long_retrieval, retrieval_set
from dreamlip_train.cli.evaluation.everything import all_
from dreamlip_train.cli.evaluation.held_out import localize, retrieval
from dreamlip_train.cli.evaluation.labels import multilabel, segment, zeroshot

COMMANDS: dict[str, Any] = {
    "all": all_,
    "retrieval": retrieval,
    "localize": localize,
    "retrieval-set": retrieval_set,
    "long-retrieval": long_retrieval,
    "compositional": compositional,
    "zeroshot": zeroshot,
    "multilabel": multilabel,
    "segment": segment,
}
