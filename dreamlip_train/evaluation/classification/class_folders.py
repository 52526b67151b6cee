"""A classification set as a folder of images by class: FOLDER[/test]/CLASS/*.jpg, whatever set it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from dreamlip_train.evaluation.pictures import read_picture
from dreamlip_train.jobs.user_error import UserError


def class_folder(folder: str, dataset: str, split: str, transform: Callable[[Any], Any]) -> Any:
    """The images below ``folder`` by class, or None where it is not such a folder.

    Class names and templates are clip_benchmark's for ``dataset``. The folders' names are those class names ("sea_lion"
    is "sea lion"), or sort in the order of the list, as ImageNet's WordNet ids and numbered folders do; of a set that
    clip_benchmark does not know they are the class names themselves.

    Raises:
        UserError: some folders are called like the set's classes, and others are not.
    """
    root = next(
        (path for path in (Path(folder) / split, Path(folder) / "val", Path(folder)) if _has_classes(path)), None
    )
    if root is None:
        return None
    images = ImageFolder(str(root), transform=transform, loader=_picture, allow_empty=True)
    names, templates = _of_benchmark("classnames", dataset), _of_benchmark("zeroshot_classification_templates", dataset)
    folders = [_plain(name) for name in images.classes]
    places = {_plain(name): place for place, name in enumerate(names or images.classes)}
    if set(folders) <= set(places):
        order = [places[name] for name in folders]
    elif len(folders) == len(names):
        order = list(range(len(names)))
    elif not set(folders) & set(places):
        return None  # other folders with images in them, such as several sets under one root
    else:
        raise UserError(
            f"--root: {str(root)!r} has {len(folders)} class folders, {dataset} has {len(names)} classes, and "
            f"{next(name for name in images.classes if _plain(name) not in places)!r} is none of their names"
        )
    images.target_transform = order.__getitem__
    images.classes = names or [name.replace("_", " ") for name in images.classes]
    images.templates = templates or ["a photo of a {c}."]
    return images


def _has_classes(path: Path) -> bool:
    """Whether ``path`` holds folders that hold images."""
    endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
    return path.is_dir() and any(
        file.suffix.lower() in endings for inner in path.iterdir() if inner.is_dir() for file in inner.iterdir()
    )


def _of_benchmark(kind: str, dataset: str) -> list[str]:
    content = json.loads((resources.files("clip_benchmark.datasets") / f"en_{kind}.json").read_text(encoding="utf-8"))
    return content.get(dataset.removeprefix("vtab/"), [])


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _picture(path: str) -> Any:
    return read_picture(Path(path), "--root")
