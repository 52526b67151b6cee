"""JSON documents as records: DreamLIP's, ALBEF's and BLIP's lists, FLAIR's and COCO's "annotations", objects by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def records_of(content: Any) -> tuple[list[Any] | None, str]:
    """(the document's records, one a picture, None where it has none; its form, as ``layouts.Layout`` names it).

    Several annotations of one picture, as FLAIR's and COCO's sentences and BLIP's captions, become one record whose
    "caption" is the list of them.
    """
    form = ""
    if isinstance(content, Mapping) and isinstance(content.get("annotations"), list):
        form = "images and annotations" if isinstance(content.get("images"), list) else "annotations"
        content = _with_files(content["annotations"], content.get("images"))
    if isinstance(content, Mapping) and len(lists := [value for value in content.values() if _has_records(value)]) == 1:
        content = lists[0]  # Karpathy's "images", TextCaps' "data"
    elif isinstance(content, Mapping) and 2 * sum(isinstance(v, Mapping) for v in content.values()) > len(content):
        content = [{"key": key, **value} if isinstance(value, Mapping) else value for key, value in content.items()]
    return _grouped(content) if isinstance(content, list) else None, form


def _with_files(annotations: list[Any], images: Any) -> list[Any]:
    """COCO keeps the files' names apart from the captions."""
    if not isinstance(images, list):
        return annotations
    files = {
        image["id"]: image["file_name"]
        for image in images
        if isinstance(image, Mapping) and {"id", "file_name"} <= image.keys() and _is_name(image["id"])
    }
    return [
        {**one, "image": files[one["image_id"]]}
        if isinstance(one, Mapping) and _is_name(one.get("image_id")) and one["image_id"] in files
        else one
        for one in annotations
    ]


def _grouped(records: list[Any]) -> list[Any]:
    """Records of one "image" that have one "caption" each, together."""
    groups: list[Any] = []
    first: dict[Any, int] = {}
    for record in records:
        image = record.get("image") if isinstance(record, Mapping) else None
        if not _is_name(image) or not isinstance(record.get("caption"), str):
            groups.append(record)
        elif image in first:
            together = groups[first[image]]
            if isinstance(together["caption"], str):
                together["caption"] = [together["caption"]]
            together["caption"].append(record["caption"])
        else:
            first[image] = len(groups)
            groups.append({name: value for name, value in record.items() if name != "caption_id"})
    return groups


def _has_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int)
