"""SugarCrepe, Winoground, ARO's two Visual Genome sets and MMVP-VLM, in the layouts they are published in.

Sources of the layouts: RAIVNLab/sugar-crepe, facebook/winoground (Hugging Face), mertyg/vision-language-models-are-bows
(ARO) and tsb0601/MMVP. ARO's COCO-Order and Flickr30k-Order are not read: their captions are shuffled anew by each run.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dreamlip_train.evaluation.set_files import (
    first_file,
    other_layout,
    require_files,
    set_json,
    set_json_lines,
    set_text,
    text_field,
)
from dreamlip_train.jobs.user_error import UserError


@dataclass(frozen=True)
class Picture:
    """A picture's file or bytes, and the box (left, top, width, height) of it that is looked at, or all of it."""

    source: Path | bytes
    name: str
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Case:
    """One picture with a right and a wrong text, in this order, or two pictures with the text of each."""

    kind: str
    pictures: tuple[Picture, ...]
    texts: tuple[str, str]


def read_cases(name: str, root: str | Path, images: str | Path = "") -> list[Case]:
    """The cases of the set called ``name`` below ``root``.

    Args:
        images: SugarCrepe's pictures, COCO's val2017; empty means val2017 below ``root``.
    Raises:
        UserError: a file that is missing or of another layout (it is named, with what was expected and where to get
            it), an empty set, or pictures that are missing.
    """
    root, spec = Path(root), SETS[name]
    if not root.is_dir():
        raise UserError(f"--root: no folder {str(root)!r}. {spec.source}")
    cases = spec.read(root, Path(images) if images else root / "val2017", spec.source)
    if not cases:
        raise UserError(f"--root: {str(root)!r} has no case of {name}. {spec.source}")
    files = dict.fromkeys(one.source for case in cases for one in case.pictures if isinstance(one.source, Path))
    require_files(list(files), name, spec.source)
    return cases


@cache
def symmetric_relations() -> frozenset[str]:
    """The relations that ARO leaves out of its mean, for they hold both ways (its notebook)."""
    names = resources.files("dreamlip_train.evaluation.compositional") / "symmetric_relations.txt"
    return frozenset(names.read_text(encoding="utf-8").splitlines())


KINDS = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")


def _sugarcrepe(root: Path, images: Path, source: str) -> list[Case]:
    cases = []
    for kind in KINDS:
        path = first_file(source, root / "data" / f"{kind}.json", root / f"{kind}.json")
        content = set_json(path, source)
        rows = list(content.values()) if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise other_layout(path, "a json object of numbered cases", source)
        for number, row in enumerate(rows, 1):
            file, right, wrong = (
                text_field(row, key, path, number, source) for key in ("filename", "caption", "negative_caption")
            )
            cases.append(Case(kind, (Picture(images / file, file),), (right, wrong)))
    return cases


def _winoground(root: Path, _: Path, source: str) -> list[Case]:
    """examples.jsonl with images/NAME.png, or the parquet files that hold the images too."""
    parquet = sorted(root.glob("data/*.parquet")) or sorted(root.glob("*.parquet"))
    if parquet and not any((folder / "examples.jsonl").is_file() for folder in (root, root / "data")):
        return [case for path in parquet for case in _winoground_parquet(path, source)]
    path = first_file(source, root / "examples.jsonl", root / "data" / "examples.jsonl")
    folder = next((place for place in (path.parent / "images", root / "images") if place.is_dir()), root / "images")
    cases = []
    for number, row in set_json_lines(path, source):
        first, second, *texts = (
            text_field(row, key, path, number, source) for key in ("image_0", "image_1", "caption_0", "caption_1")
        )
        pictures = tuple(Picture(folder / f"{name.removesuffix('.png')}.png", name) for name in (first, second))
        cases.append(Case(_tag(row), pictures, (texts[0], texts[1])))
    return cases


def _winoground_parquet(path: Path, source: str) -> list[Case]:
    import pyarrow
    import pyarrow.parquet as parquet

    columns = ["image_0", "image_1", "caption_0", "caption_1"]
    try:
        tags = ["collapsed_tag"] if "collapsed_tag" in parquet.read_schema(path).names else []
        rows = parquet.read_table(path, columns=columns + tags).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise other_layout(path, f"parquet with {', '.join(columns)} ({error})", source) from error
    cases = []
    for number, row in enumerate(rows, 1):
        pictures = []
        for key in columns[:2]:
            data = row[key].get("bytes") if isinstance(row[key], dict) else None
            if not isinstance(data, bytes):
                raise other_layout(path, f"image bytes in row {number}", source)
            pictures.append(Picture(data, f"{path.name}, row {number}"))
        first, second = (text_field(row, key, path, number, source) for key in columns[2:])
        cases.append(Case(_tag(row), tuple(pictures), (first, second)))
    return cases


def _tag(row: dict[str, Any]) -> str:
    """Winoground's kind of swap: Object, Relation or Both."""
    return str(row.get("collapsed_tag") or "")


def _aro(file: str, kind: Callable[[Any], str]) -> Callable[[Path, Path, str], list[Case]]:
    def read(root: Path, _: Path, source: str) -> list[Case]:
        path = first_file(source, root / file)
        rows = set_json(path, source)
        if not isinstance(rows, list):
            raise other_layout(path, "a list of cases", source)
        cases = []
        for number, row in enumerate(rows, 1):
            name, right, wrong = (
                text_field(row, key, path, number, source) for key in ("image_path", "true_caption", "false_caption")
            )
            try:
                left, top, width, height = (int(row[f"bbox_{side}"]) for side in "xywh")
                of_kind = kind(row)
            except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise other_layout(path, f"a box and a kind in record {number} ({error!r})", source) from error
            cases.append(
                Case(of_kind, (Picture(root / "images" / name, name, (left, top, width, height)),), (right, wrong))
            )
        return cases

    return read


def _mmvp(root: Path, _: Path, source: str) -> list[Case]:
    """Questions.csv: a row a picture, two after each other are a pair; ID.jpg in a folder by visual pattern."""
    path = first_file(source, root / "Questions.csv")
    names = ("MLLM_VLM Images", "MMVP_VLM_Images", "MMVP VLM Images")
    folder = next((root / name for name in names if (root / name).is_dir()), root / names[0])
    rows = [row for row in csv.reader(set_text(path, source).splitlines()) if row][1:]
    if len(rows) % 2 or any(len(row) < 3 for row in rows):
        raise other_layout(path, "pairs of rows of an id, a visual pattern and a statement", source)
    cases = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        pictures = tuple(Picture(folder / first[1] / f"{row[0]}.jpg", row[0]) for row in (first, second))
        cases.append(Case(first[1], pictures, ("a photo of " + first[2], "a photo of " + second[2])))
    return cases


@dataclass(frozen=True)
class _SetSpec:
    """One set: how it is read, where it comes from, and how its cases are scored (scoring.py)."""

    read: Callable[[Path, Path, str], list[Case]]
    source: str
    scoring: str


_ARO = (
    "ARO is visual_genome_relation.json, visual_genome_attribution.json and images/ (vgr_vga_images.zip), linked in "
    "github.com/mertyg/vision-language-models-are-bows"
)
SETS = {
    "sugarcrepe": _SetSpec(
        _sugarcrepe,
        "SugarCrepe is data/*.json of github.com/RAIVNLab/sugar-crepe, with COCO's val2017 pictures (--images)",
        "choice",
    ),
    "winoground": _SetSpec(
        _winoground,
        "Winoground is facebook/winoground on Hugging Face: data/*.parquet, or examples.jsonl with images/",
        "pairs",
    ),
    "aro-relation": _SetSpec(
        _aro("visual_genome_relation.json", lambda row: str(row["relation_name"])),
        _ARO,
        "relations",
    ),
    "aro-attribution": _SetSpec(
        _aro("visual_genome_attribution.json", lambda row: f"{row['attributes'][0]}_{row['attributes'][1]}"),
        _ARO,
        "attributes",
    ),
    "mmvp": _SetSpec(
        _mmvp,
        "MMVP-VLM is MMVP/MMVP_VLM on Hugging Face: Questions.csv and MLLM_VLM Images/PATTERN/ID.jpg",
        "pairs",
    ),
}
