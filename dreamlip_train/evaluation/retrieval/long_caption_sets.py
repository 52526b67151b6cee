"""The long-caption retrieval sets in the layouts they are published in, and in those of FLAIR's evaluation.

What each is made of is in ``SETS``. Sources of the layouts: google.github.io/docci (DOCCI), google/imageinwords (IIW),
facebookresearch/DCI, beichenzbc/Long-CLIP (Urban1k and ShareGPT4V-1k), wuw2019/LoTLIP (the protocol of DCI, IIW and
ShareGPT4V-10k) and ExplainableML/flair, ``datasets/EVAL_DATASETS.md`` and ``src/flair/data.py`` (all of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dreamlip_train.captions.columns import split_sub_captions
from dreamlip_train.evaluation.retrieval.retrieval_sets import RetrievalItem
from dreamlip_train.evaluation.set_files import (
    first_file,
    first_records,
    other_layout,
    require_files,
    set_json,
    set_json_lines,
    set_text,
    text_field,
)
from dreamlip_train.jobs.user_error import UserError


@dataclass(frozen=True)
class LongCaptionSet:
    """Images with their texts: of a fine-grained set the sentences, each a text of its own, else one long caption."""

    items: list[RetrievalItem]
    fine_grained: bool
    rejoined: bool
    """Whether FLAIR reads the whole caption as ". ".join of its split (``rejoin``)."""


def read_long_captions(name: str, root: str | Path) -> LongCaptionSet:
    """The images and texts of the set called ``name`` below ``root``.

    Raises:
        UserError: no set of that name, a file that is missing or of another layout (it is named, with what was expected
            and where to get it), an empty set, or images that are missing.
    """
    if name not in SETS:
        raise UserError(f"--set: got {name!r}; the sets are {', '.join(SETS)}")
    root, spec = Path(root), SETS[name]
    if not root.is_dir():
        raise UserError(f"--root: no folder {str(root)!r}. {spec.source}")
    items = spec.read(root, spec)
    if not any(item.captions for item in items):
        raise UserError(f"--root: {str(root)!r} has no image of {name} with a text. {spec.source}")
    require_files([Path(item.name) for item in items], name, spec.source)
    return LongCaptionSet(items, spec.fine_grained, spec.rejoined)


def rejoin(caption: str) -> str:
    """A caption as FLAIR tokenizes it on DCI, IIW and ShareGPT4V: split where DreamLIP's release splits, joined by
    ". ".
    """
    return ". ".join(split_sub_captions(caption, "official"))


def flair_sentences(caption: str) -> list[str]:
    """The sentences of FLAIR's fine-grained sets: DreamLIP's official split without pieces of one character.

    Of IIW's 612 descriptions this gives the list that FLAIR published for 611.
    """
    return [piece for piece in split_sub_captions(caption, "official") if len(piece) > 1]


def _docci(root: Path, spec: _SetSpec) -> list[RetrievalItem]:
    flair_file = root / "annotations" / "test_annotations.json"
    if spec.fine_grained and flair_file.is_file():
        return _annotations(flair_file, root / "images", spec)
    path = first_file(
        spec.source, root / "docci_descriptions.jsonlines", root / "annotations/docci_descriptions.jsonlines"
    )
    items = []
    for number, row in set_json_lines(path, spec.source):
        if text_field(row, "split", path, number, spec.source) == "test":
            caption = text_field(row, "description", path, number, spec.source)
            texts = flair_sentences(caption) if spec.fine_grained else [caption]
            items.append(
                RetrievalItem(str(root / "images" / text_field(row, "image_file", path, number, spec.source)), texts)
            )
    return items


_IIW_PARTS = (
    ("DOCCI_Test", ("docci", "images")),
    ("IIW-400", ("docci_aar", "images_aar")),
    ("DCI_Test", ("dci", "photos")),
)


def _iiw(root: Path, spec: _SetSpec) -> list[RetrievalItem]:
    for flair_file in (root / "test_annotations.json", root / "finegrained_annotations.json"):
        if spec.fine_grained and flair_file.is_file():
            return _annotations(flair_file, root, spec)
    items = []
    for part, folders in _IIW_PARTS:
        path = first_file(spec.source, root / part / "data.jsonl", root / "datasets" / part / "data.jsonl")
        folder = next((root / name for name in folders if (root / name).is_dir()), root / folders[0])
        for number, row in set_json_lines(path, spec.source):
            image = text_field(row, "image" if "image" in row else "image/key", path, number, spec.source)
            caption = text_field(row, "IIW", path, number, spec.source)
            texts = flair_sentences(caption) if spec.fine_grained else [caption]
            items.append(RetrievalItem(str(folder / (image if image.endswith(".jpg") else image + ".jpg")), texts))
    return items


def _dci(root: Path, spec: _SetSpec) -> list[RetrievalItem]:
    """All 7,805 images, of whatever split, as LoTLIP and FLAIR evaluate."""
    base = root / "densely_captioned_images" if (root / "densely_captioned_images").is_dir() else root
    splits = set_json(first_file(spec.source, base / "splits.json"), spec.source)
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise other_layout(base / "splits.json", "lists of file names by split", spec.source)
    items = []
    for name in (name for names in splits.values() for name in names):
        path = first_file(spec.source, base / "annotations" / str(name))
        row = set_json(path, spec.source)
        caption = "\n".join(text_field(row, key, path, 0, spec.source) for key in ("short_caption", "extra_caption"))
        items.append(RetrievalItem(str(base / "photos" / text_field(row, "image", path, 0, spec.source)), [caption]))
    return items


def _urban1k(root: Path, spec: _SetSpec) -> list[RetrievalItem]:
    """Published as image/N.jpg and caption/N.txt, of which Long-CLIP reads the first line."""
    if (root / "annotations" / "annotations.json").is_file():
        return _annotations(root / "annotations" / "annotations.json", root / "images", spec)
    if not (root / "caption").is_dir():
        raise UserError(f"--root: no folder {str(root / 'caption')!r}. {spec.source}")
    items = []
    for path in sorted((root / "caption").glob("*.txt"), key=lambda path: (len(path.name), path.name)):
        lines = set_text(path, spec.source).splitlines()
        if not lines or not lines[0].strip():
            raise UserError(f"--root: {path} has no caption in its first line; fetch it again")
        items.append(RetrievalItem(str(root / "image" / f"{path.stem}.jpg"), [lines[0]]))
    return items


def _sharegpt4v(root: Path, spec: _SetSpec) -> list[RetrievalItem]:
    """The first 1,000 or 10,000 records of ShareGPT4V's json, or of the list of 10,000 that LoTLIP and FLAIR keep."""
    path = first_file(spec.source, root / "share4v_sam_10k.json", root / "share-captioner_coco_lcs_sam_1246k_1107.json")
    items = []
    for number, row in enumerate(first_records(path, spec.first, spec.source), 1):
        image = text_field(row, "image", path, number, spec.source)
        # SA-1B's archives unpack to sa_000000/images/ or, as FLAIR and ShareGPT4V's own tree have it, without images/.
        places = [root / image, root / image.replace("/images", "", 1)]
        turns = row.get("conversations")
        if not isinstance(turns, list) or len(turns) < 2:
            raise other_layout(path, f'"conversations" of two turns in record {number}', spec.source)
        caption = text_field(turns[1], "value", path, number, spec.source)
        items.append(RetrievalItem(str(next((place for place in places if place.is_file()), places[0])), [caption]))
    return items


def _annotations(path: Path, images: Path, spec: _SetSpec) -> list[RetrievalItem]:
    """FLAIR's lists: {"annotations": [{"image_id", "image", "caption"}]}, texts of one image_id belong to one image."""
    content = set_json(path, spec.source)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise other_layout(path, '"annotations", a list', spec.source)
    files: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for number, row in enumerate(content["annotations"], 1):
        caption, image = (text_field(row, key, path, number, spec.source) for key in ("caption", "image"))
        identity = str(row.get("image_id", image))
        files.setdefault(identity, image)
        texts.setdefault(identity, []).append(caption)
    return [RetrievalItem(str(images / file), texts[one]) for one, file in files.items()]


@dataclass(frozen=True)
class _SetSpec:
    """One set: how it is read, and where it comes from."""

    read: Callable[[Path, _SetSpec], list[RetrievalItem]]
    source: str
    fine_grained: bool = False
    rejoined: bool = False
    first: int = 0


_DOCCI = (
    "DOCCI is docci_descriptions.jsonlines and docci_images.tar.gz (images/) of google.github.io/docci; "
    "the 5,000 images of its test split are used"
)
_IIW = (
    "IIW is {DOCCI_Test,IIW-400,DCI_Test}/data.jsonl of github.com/google/imageinwords (datasets/), with the images of "
    "DOCCI in docci/, of DOCCI-AAR in docci_aar/ and of DCI in dci/"
)
_DCI = (
    "DCI is dci.tar.gz of github.com/facebookresearch/DCI, unpacked to densely_captioned_images/"
    "{splits.json,annotations/,photos/}, with the images of SA-1B's sa_000138.tar in photos/"
)
_URBAN = (
    "Urban1k is BeichenZhang/Urban1k on Hugging Face, unpacked to image/N.jpg and caption/N.txt, or FLAIR's "
    "annotations/annotations.json with images/"
)
_SHARE = (
    "ShareGPT4V is share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V on Hugging Face (or FLAIR's "
    "share4v_sam_10k.json) with SA-1B's images below the folder, where the json's paths point"
)
SETS: dict[str, _SetSpec] = {
    "docci": _SetSpec(_docci, _DOCCI),
    "docci-fine": _SetSpec(_docci, _DOCCI + ", or FLAIR's annotations/test_annotations.json", fine_grained=True),
    "iiw": _SetSpec(_iiw, _IIW, rejoined=True),
    "iiw-fine": _SetSpec(_iiw, _IIW + ", or FLAIR's test_annotations.json", fine_grained=True),
    "dci": _SetSpec(_dci, _DCI, rejoined=True),
    "urban1k": _SetSpec(_urban1k, _URBAN),
    "sharegpt4v-1k": _SetSpec(_sharegpt4v, _SHARE, rejoined=True, first=1000),
    "sharegpt4v-10k": _SetSpec(_sharegpt4v, _SHARE, rejoined=True, first=10000),
}
