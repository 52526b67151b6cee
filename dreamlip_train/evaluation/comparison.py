"""A run's results beside the paper's tables and later work's: the rows that were measured alike, first our own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlip_train.evaluation.paper import ZERO_SHOT_COLUMNS, Table, paper_table
from dreamlip_train.jobs.atomic_json import read_json

Results = Mapping[str, Mapping[str, Any]]
"""What ``eval all`` wrote: {benchmark: its numbers}."""
_NONE = "-"


@dataclass(frozen=True)
class Comparison:
    """One table: its title, what to know of it, the names of its columns, our rows and the others'."""

    title: str
    note: str
    columns: list[str]
    ours: list[list[str]]
    others: list[list[str]]

    @property
    def measured(self) -> bool:
        """Whether any number of ours is in it."""
        return any(cell != _NONE for row in self.ours for cell in row[1:])


def read_results(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What ``eval all`` wrote into ``files``, NAME.json each; files of something else are passed over."""
    results = {}
    for path in files:
        with suppress(OSError, ValueError):
            content = read_json(path)
            if isinstance(content, dict) and isinstance(content.get("evaluation"), dict):
                results[path.stem] = content
    return results


def comparisons(results: Results) -> list[Comparison]:
    """The paper's eight tables and two of later work, in that order."""
    return [
        _table1(results),
        _table2(results),
        _table(
            "Table 3: segmentation, mIoU of SAN trained with the frozen tower, ViT-B/32",
            "Ours are of no training (eval segment, the mean over labeled classes): a lower number, of another task.",
            "table3_san_segmentation_vitb32",
            ("data", "method"),
            [["this run, training-free", *_segmented(results, ("ade847", "pc459", "ade150", "pc59", "voc20"))]],
            mean=True,
        ),
        _table(
            "Table 4: LLaVA-1.5 with the frozen tower, ViT-B/32",
            "Measured by LLaVA's own evaluation with the exported hf-dir (docs/interoperability.md).",
            "table4_llava_vitb32",
            ("data", "method"),
            [["this run", *[_NONE] * 5]],
        ),
        _table5(results),
        *_ablations(results),
        _later(results),
        _long(results),
    ]


def format_comparison(one: Comparison) -> str:
    """A table of plain text: our rows first, a line, the others. A column's name stands word under word, as narrow as
    its numbers.
    """
    names = [column.split("_") for column in one.columns]
    depth = max(len(words) for words in names)
    stacked = [[""] * (depth - len(words)) + words for words in names]
    label = [""] * (depth - 1) + [one.title.split(":")[0]]
    header = [list(line) for line in zip(label, *stacked, strict=True)]
    rows = [*header, *one.ours, *one.others]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = "-" * len(lines[0])
    head = [one.title, *([one.note] if one.note else []), rule]
    first = depth + len(one.ours)
    return "\n".join([*head, *lines[:first], rule, *lines[first:]])


def _table(
    title: str,
    note: str,
    name: Table,
    labels: Sequence[str],
    ours: list[list[str]],
    *,
    mean: bool = False,
    without: Sequence[str] = (),
) -> Comparison:
    """Table ``name``, whose columns ``labels`` say what a row is; ``mean``: ours get the mean of their numbers last."""
    rows = paper_table(name)
    columns = [column for column in rows[0] if column not in (*labels, *without)]
    if mean:
        ours = [[*row, _mean(row[1:])] for row in ours]
    others = [[", ".join(row[label] for label in labels), *(row[column] for column in columns)] for row in rows]
    return Comparison(title, note, columns, ours, others)


def _table1(results: Results) -> Comparison:
    ways = [(way, k) for way in ("i2t", "t2i") for k in (1, 5, 10)]
    ours = []
    for coco, label in (("coco-karpathy", "COCO Karpathy 5K"), ("coco-val2017", "COCO val2017")):
        cells = {
            (name, way, k): _number(results, name, way, f"r_at_{k}") for name in ("flickr30k", coco) for way, k in ways
        }
        ours.append(
            [
                f"this run, {label}",
                *(cells[name, way, k] for way in ("i2t", "t2i") for name in ("flickr30k", coco) for k in (1, 5, 10)),
            ]
        )
    return _table(
        "Table 1: retrieval, ViT-B/32",
        "The paper does not say which of COCO's two 5K splits its row is for.",
        "table1_retrieval_vitb32",
        ("data", "method"),
        ours,
    )


def _table2(results: Results) -> Comparison:
    rows = paper_table("table2_zeroshot")
    names = {column: name for name, column in ZERO_SHOT_COLUMNS.items()}
    columns = [column for column in rows[0] if column not in ("model", "data", "method", "average")]
    cells = {
        column: _number(results, f"zeroshot-{name}", name, "acc1")
        for column in columns
        for name in [names.get(column, column)]
    }
    average = _mean([cells[column] for column in columns if column != "imagenet"])
    row = ["this run", *(cells[column] for column in columns if column != "imagenet"), average, cells["imagenet"]]
    return _table("Table 2: zero-shot classification, top-1", "", "table2_zeroshot", ("model", "data", "method"), [row])


def _table5(results: Results) -> Comparison:
    names = ("imagenet_multi", "openimages_common_214", "openimages_rare_200", "hico")
    row = ["this run", *(_number(results, f"multilabel-{name}", "map") for name in names)]
    return _table(
        "Table 5: multi-label recognition, mAP, ViT-B/32", "", "table5_multilabel_vitb32", ("data", "method"), [row]
    )


def _ablations(results: Results) -> list[Comparison]:
    """Tables 6 to 8, whose columns a run's own numbers fit too, but the trained segmentation."""
    coco = "coco-karpathy" if "coco-karpathy" in results else "coco-val2017"
    row = [
        *(_number(results, name, way, "r_at_1") for way in ("i2t", "t2i") for name in ("flickr30k", coco)),
        _number(results, "zeroshot-imagenet1k", "imagenet1k", "acc1"),
        _NONE,
    ]
    tables: list[tuple[str, Table, tuple[str, ...]]] = [
        ("Table 6: components", "table6_components_vitb16", ("long_direct", "long_sampled", "short", "grouping")),
        ("Table 7: captioners", "table7_captioners_vitb16", ("captions",)),
        ("Table 8: K", "table8_k_vitb16", ("k",)),
    ]
    rows = []
    for title, name, labels in tables:
        one = _table(f"{title}, ViT-B/16 on CC3M", "VOC-20 is of a trained SAN.", name, labels, [["this run", *row]])
        if name == "table6_components_vitb16":  # its labels are "y" where a component is on
            others = [
                [" + ".join(label.replace("_", " ") for label in labels if line[label]) or "CLIP", *cells[1:]]
                for line, cells in zip(paper_table(name), one.others, strict=True)
            ]
            one = Comparison(one.title, one.note, one.columns, one.ours, others)
        rows.append(one)
    return rows


def _later(results: Results) -> Comparison:
    ours = []
    for coco, label in (("coco-karpathy", "COCO Karpathy 5K"), ("coco-val2017", "COCO val2017")):
        recall = [_number(results, name, way, "r_at_1") for way in ("i2t", "t2i") for name in ("flickr30k", coco)]
        ours.append([f"this run, {label}", *recall, _number(results, "zeroshot-imagenet1k", "imagenet1k", "acc1")])
    return _table(
        "Later work: retrieval and ImageNet",
        "From the authors' repositories. FLAIR and COSMOS evaluate COCO's val2017; FLAIR's code takes Flickr30k's "
        "validation split by default.",
        "successors_retrieval",
        ("method", "model", "data"),
        ours,
        without=("source",),
    )


def _long(results: Results) -> Comparison:
    labels = {"whole": "this run, one text", "sentence_mean": "this run, mean of sentences"}
    ours = [
        [
            label,
            *(
                _number(results, name, "readings", reading, way, "r_at_1")
                for name in ("dci", "iiw", "sharegpt4v-10k", "urban1k")
                for way in ("i2t", "t2i")
            ),
        ]
        for reading, label in labels.items()
    ]
    return _table(
        "Long captions: R@1",
        "From LoTLIP's repository; CLIP reads one text of 77 tokens, Long-CLIP of 248.",
        "successors_long",
        ("method", "model"),
        ours,
        without=("source",),
    )


def _segmented(results: Results, layouts: Sequence[str]) -> list[str]:
    return [_number(results, f"segment-{layout}", "miou_labeled") for layout in layouts]


def _number(results: Results, name: str, *keys: str) -> str:
    """The number at ``keys`` of a benchmark's results, or "-"."""
    value: Any = results.get(name)
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return f"{value:.1f}" if isinstance(value, int | float) and not isinstance(value, bool) else _NONE


def _mean(cells: Sequence[str]) -> str:
    """The mean of a row, where all of it was measured."""
    return f"{sum(map(float, cells)) / len(cells):.1f}" if cells and _NONE not in cells else _NONE
