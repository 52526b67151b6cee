"""Zero-shot classification through clip_benchmark (the paper's Table 2): its data sets, class names,
prompts and metrics; our checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dreamlip_train.data.images import resize_center_crop
from dreamlip_train.evaluation.classification.class_folders import class_folder
from dreamlip_train.evaluation.features import eval_mode
from dreamlip_train.evaluation.paper import zero_shot_rows
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.model.dreamlip import DreamLIP

Transform = Callable[[Image.Image | Tensor], Tensor]
DATASETS = (
    "food101",
    "cifar10",
    "cifar100",
    "sun397",
    "cars",
    "fgvc_aircraft",
    "dtd",
    "pets",
    "caltech101",
    "flowers",
    "imagenet1k",
)
"""The paper's eleven, under clip_benchmark's names."""


class ClipAdapter(nn.Module):
    """A DreamLIP model under the two names clip_benchmark calls: encode_image of uint8 [n,3,S,S],
    encode_text of tokens.
    """

    def __init__(self, model: DreamLIP) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit image features [n, D]."""
        return self.model.encode_images(images)[0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit text features [n, D]."""
        return self.model.encode_texts(tokens)


def evaluate_zero_shot(
    model: DreamLIP,
    datasets: Sequence[str],
    root: str,
    device: torch.device | str,
    *,
    split: str = "test",
    batch_size: int = 64,
    workers: int = 2,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Accuracy on each data set; one that can't be read is named with its reason, and the others go on.

    Args:
        datasets: clip_benchmark's names; "wds/NAME" reads its webdataset folder.
        root: where the data are (a folder of images by class, or as clip_benchmark has them) or are downloaded
            to; "{dataset}" in it is the name, "{dataset_cleaned}" the name with "-" for "/".
        keep: called with the results so far after each data set.
    Returns:
        {data set: {"acc1", "acc5", "mean_per_class_recall" in percent, "images", "classes"}, or {"error"}}.
    Raises:
        UserError: clip_benchmark is not installed.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        raise UserError("eval zeroshot: needs clip_benchmark; pip install 'dreamlip[benchmark]'")
    by_set: dict[str, dict[str, Any]] = {}
    with eval_mode(model):
        for name in datasets:
            try:
                by_set[name] = _evaluate_one(model, name, root, device, split, batch_size, workers)
            except Exception as error:  # clip_benchmark and the data sets' own readers raise anything
                first_line = next(iter(str(error).strip().splitlines()), "")
                by_set[name] = {"error": f"{type(error).__name__}: {first_line}"}
            keep(by_set)
    return by_set


class _LabeledBatches:
    """A loader's batches, their labels checked against the classes and their images counted."""

    def __init__(self, loader: DataLoader[Any], classes: Sequence[str], folder: str) -> None:
        self.loader, self.classes, self.folder = loader, classes, folder
        self.dataset = loader.dataset  # clip_benchmark looks at it
        self.images = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            if labels.ndim == 1 and int(labels.max()) >= len(self.classes):
                raise UserError(
                    f"label {int(labels.max())} but {len(self.classes)} classes in {self.folder}; "
                    "the class list is another's"
                )
            self.images += len(images)
            yield images, labels


def _evaluate_one(
    model: DreamLIP, name: str, root: str, device: torch.device | str, split: str, batch_size: int, workers: int
) -> dict[str, Any]:
    from clip_benchmark.metrics import zeroshot_classification

    plain = name.removeprefix("wds/")
    folder = root.format(dataset=plain, dataset_cleaned=plain.replace("/", "-"))

    def picture(image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return resize_center_crop(image, model.image_size)

    if name.startswith("wds/"):
        loader, dataset = _open_webdataset(name, folder, split, picture, batch_size, workers)
    else:
        loader, dataset = _open_images(name, folder, split, picture, batch_size, workers)
    batches = _LabeledBatches(loader, dataset.classes, folder)
    metrics = zeroshot_classification.evaluate(  # it shows its own progress
        ClipAdapter(model), batches, model.tokenize, dataset.classes, dataset.templates, str(device), amp=False
    )
    return {metric: 100 * float(value) for metric, value in metrics.items()} | {
        "images": batches.images,
        "classes": len(dataset.classes),
    }


def _open_webdataset(
    name: str, folder: str, split: str, picture: Transform, batch_size: int, workers: int
) -> tuple[DataLoader[Any], Any]:
    """(loader, data set) of a folder of tar files in clip_benchmark's layout."""
    members = (f"{split}/nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt")
    missing = [path for member in members if not (path := Path(folder) / member).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--root: no {missing[0]}; give a classification folder in clip_benchmark's webdataset layout"
        )
    dataset = _build(name, folder, split, picture)
    shards = int((Path(folder) / members[0]).read_text())
    batches = dataset.batched(batch_size)
    batches.classes = dataset.classes
    loader = DataLoader(batches, batch_size=None, num_workers=min(workers, shards))
    return loader, dataset


def _open_images(
    name: str, folder: str, split: str, picture: Transform, batch_size: int, workers: int
) -> tuple[DataLoader[Any], Any]:
    """(loader, data set) of a folder of images by class, else of what clip_benchmark reads or downloads."""
    from clip_benchmark.datasets.builder import get_dataset_collate_fn

    dataset, collate = class_folder(folder, name, split, picture), None
    if dataset is None:
        dataset, collate = _build(name, folder, split, picture), get_dataset_collate_fn(name)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate), dataset


def _build(name: str, folder: str, split: str, picture: Transform) -> Any:
    from clip_benchmark.datasets.builder import build_dataset

    with contextlib.redirect_stdout(io.StringIO()):
        return build_dataset(name, root=folder, transform=picture, split=split, task="zeroshot_classification")


def format_zero_shot(by_set: dict[str, dict[str, Any]]) -> str:
    """The table, chance and the paper's numbers beside ours."""
    lines = [
        f"{'zero-shot, %':<22}{'acc@1':>8}{'(chance)':>10}{'acc@5':>8}{'per class':>11}{'images':>9}   paper: "
        "DreamLIP, ViT-B/16"
    ]
    for name, row in by_set.items():
        if "error" in row:
            lines.append(f"{name:<22}  not evaluated: {row['error']}")
            continue
        paper = ", ".join(
            f"{model.split(',')[0]} {value}"
            for model, value in zero_shot_rows(name.removeprefix("wds/").removeprefix("vtab/")).items()
            if "DreamLIP, ViT-B/16" in model
        )
        top, nothing = row.get("acc1", row.get("mean_average_precision", float("nan"))), float("nan")
        recall = row.get("mean_per_class_recall", nothing)
        cells = f"{top:>8.1f}{100 / row['classes']:>10.1f}{row.get('acc5', nothing):>8.1f}{recall:>11.1f}"
        lines.append(f"{name:<22}{cells}{row['images']:>9}   {paper}")
    scores = [row["acc1"] for row in by_set.values() if "acc1" in row]
    if len(scores) > 1:
        lines.append(f"{'mean of ' + str(len(scores)):<22}{sum(scores) / len(scores):>8.1f}")
    return "\n".join(lines)
