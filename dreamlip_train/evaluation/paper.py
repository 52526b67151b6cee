"""The paper's tables (DreamLIP, ECCV 2024) and those of later work, to set our numbers beside; the files and their
sources are in paper_tables/.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import Literal

Table = Literal[
    "table1_retrieval_vitb32",
    "table2_zeroshot",
    "table3_san_segmentation_vitb32",
    "table4_llava_vitb32",
    "table5_multilabel_vitb32",
    "table6_components_vitb16",
    "table7_captioners_vitb16",
    "table8_k_vitb16",
    "successors_retrieval",
    "successors_long",
]

# The columns of Table 2 under clip_benchmark's names.
ZERO_SHOT_COLUMNS = {"fgvc_aircraft": "aircraft", "imagenet1k": "imagenet"}


@cache
def paper_table(name: Table) -> tuple[dict[str, str], ...]:
    """The rows of a table, each {column: what is printed}; percent, or "-" for none."""
    file = resources.files("dreamlip_train.evaluation") / "paper_tables" / f"{name}.tsv"
    with file.open(encoding="utf-8") as lines:
        return tuple(csv.DictReader(lines, delimiter="\t"))


def zero_shot_rows(dataset: str) -> dict[str, float]:
    """Table 2's accuracies on a set under clip_benchmark's name: {"CC3M, DreamLIP, ViT-B/16": percent, ..}."""
    column = ZERO_SHOT_COLUMNS.get(dataset, dataset)
    rows = paper_table("table2_zeroshot")
    if column not in rows[0]:
        return {}
    return {
        f"{row['data']}, {row['method']}, {row['model']}": float(row[column])
        for row in rows
        if row[column].replace(".", "").isdecimal()  # "-" where the paper has none
    }
