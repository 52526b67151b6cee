"""Zero-shot classification through clip_benchmark (the paper's Table 2): its data sets, class names,
prompts and metrics; our checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from dreamlip_train.data.images import pillow_reads_known_formats, resize_center_crop
from dreamlip_train.evaluation import defaults
from dreamlip_train.evaluation.classification.class_folders import class_folder
from dreamlip_train.evaluation.features import eval_mode
from dreamlip_train.evaluation.paper import zero_shot_rows
from dreamlip_train.evaluation.sharing import Share, StoppedError
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
    """A DreamLIP model under the two names clip_benchmark calls: encode_image of images whose features are known,
    encode_text of tokens.
    """

    def __init__(self, model: DreamLIP) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit text features [n, D]."""
        return self.model.encode_texts(tokens)


def evaluate_zero_shot(
    model: DreamLIP,
    datasets: Sequence[str],
    root: str,
    device: torch.device | str,
    *,
    split: str = defaults.SPLIT,
    batch_size: int = defaults.BATCH_SIZE,
    workers: int = defaults.WORKERS,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
    distributed: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Accuracy on each data set; one that can't be read is named with its reason, and the others go on.

    Args:
        datasets: clip_benchmark's names; "wds/NAME" reads its webdataset folder.
        root: where the data are (a folder of images by class, or as clip_benchmark has them) or are downloaded
            to; "{dataset}" in it is the name, "{dataset_cleaned}" the name with "-" for "/".
        keep: called with the results so far after each data set.
        distributed: share each set's batches among the ranks; all return the same. Collective.
    Returns:
        {data set: {"acc1", "acc5", "mean_per_class_recall" in percent, "images", "classes"}, or {"error"}}.
    Raises:
        UserError: clip_benchmark is not installed.
        StoppedError: ``should_stop`` said so, on any rank.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        raise UserError("eval zeroshot: needs clip_benchmark; pip install 'dreamlip[benchmark]'")
    share = Share(distributed)
    by_set: dict[str, dict[str, Any]] = {}
    with eval_mode(model), pillow_reads_known_formats():
        for name in datasets:
            plain = name.removeprefix("wds/")
            folder = root.format(dataset=plain, dataset_cleaned=plain.replace("/", "-"))
            new = not Path(folder).exists()
            try:
                data_set = _open_in_turn(share, name, folder, split, model.image_size, batch_size, workers)
                features, labels = _features(model, data_set, device, share, should_stop)
                by_set[name] = _scores(model, data_set, features, labels, device)
            except UserError as error:
                by_set[name] = {"error": str(error)}
                if new and share.rank == 0:
                    _remove_empty(Path(folder))
            keep(by_set)
    return by_set


def _remove_empty(folder: Path) -> None:
    """Remove what a download that failed leaves, empty files and folders: the next look takes it for a set."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            if (Path(place) / name).lstat().st_size == 0:
                (Path(place) / name).unlink()
        with contextlib.suppress(OSError):  # it is not empty
            Path(place).rmdir()


@dataclass
class _LabeledImages:
    """An open data set: this rank's batches (uint8 images, labels), and what clip_benchmark asks of it."""

    batches: Iterable[tuple[Tensor, Tensor]]
    classes: Sequence[str]
    templates: Any
    folder: str

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            if labels.ndim == 1 and int(labels.max()) >= len(self.classes):
                raise UserError(
                    f"label {int(labels.max())} but {len(self.classes)} classes in {self.folder}; "
                    "the class list is another's"
                )
            yield images, labels


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Whatever is raised, as a UserError of one line: clip_benchmark and the data sets' own readers raise anything."""
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        text = str(error).strip() or str(error.__cause__ or "")  # webdataset's says nothing itself
        if "in DataLoader worker process" in text:  # and the worker's traceback: the last one that says anything
            ends = [part.strip().splitlines()[-1] for part in text.split("The above exception was the direct cause")]
            raise UserError(next((line for line in reversed(ends) if ": " in line), ends[-1])) from error
        line = next(iter(text.splitlines()), "")
        raise UserError(line if isinstance(error, UserError) else f"{type(error).__name__}: {line}") from error


def _open_in_turn(
    share: Share, name: str, folder: str, split: str, image_size: int, batch_size: int, workers: int
) -> _LabeledImages:
    """The data set, opened by each node's first rank before the others, since it may be downloaded. Collective.

    Raises:
        UserError: any rank can't read it.
    """

    def picture(image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return resize_center_crop(image, image_size)

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    open_one = _open_webdataset if name.startswith("wds/") else _open_images
    data_set, error = None, None
    for now in (first, not first):
        if now:
            try:
                with _reasons():
                    batches, dataset = open_one(name, folder, split, picture, batch_size, workers, share)
                    data_set = _LabeledImages(batches, dataset.classes, dataset.templates, folder)
            except UserError as raised:
                error = raised
        errors = [text for text in share.gather(str(error or "")) if text]
        if errors:
            raise error or UserError(errors[0])
    assert data_set is not None
    return data_set


def _features(
    model: DreamLIP,
    data_set: _LabeledImages,
    device: torch.device | str,
    share: Share,
    should_stop: Callable[[], bool],
) -> tuple[Tensor, Tensor]:
    """Unit features [n, D] and labels [n] or [n, classes] of the whole set, in its order, on the CPU. Collective."""
    from tqdm import tqdm  # clip_benchmark's, which shows the classes so

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with _reasons():
            yield from tqdm(data_set, "images", disable=share.rank > 0)

    def work(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        with _reasons(), torch.no_grad():
            return model.encode_images(images.to(device))[0].float().cpu(), labels.cpu()

    everyone = share.gather(share.map(work, batches(), should_stop))
    in_order = [pair for pairs in itertools.zip_longest(*everyone) for pair in pairs if pair is not None]
    if not in_order:
        raise UserError(f"no images in {data_set.folder}")
    features, labels = zip(*in_order, strict=True)
    return torch.cat(features), torch.cat(labels)


def _scores(
    model: DreamLIP, data_set: _LabeledImages, features: Tensor, labels: Tensor, device: torch.device | str
) -> dict[str, Any]:
    """clip_benchmark's metrics, in percent, with its prompts."""
    from clip_benchmark.metrics import zeroshot_classification

    loader = DataLoader(TensorDataset(features, labels), batch_size=4096)
    # clip_benchmark looks there.
    loader.dataset.classes = data_set.classes  # pyright: ignore[reportAttributeAccessIssue]
    towers = ClipAdapter(model)
    with _reasons():
        metrics = zeroshot_classification.evaluate(  # it shows its own progress
            towers, loader, model.tokenize, data_set.classes, data_set.templates, str(device), amp=False
        )
    percent = {metric: 100 * float(value) for metric, value in metrics.items() if not math.isnan(value)}  # acc5 of 3
    return percent | {"images": len(labels), "classes": len(data_set.classes)}


def _open_webdataset(
    name: str, folder: str, split: str, picture: Transform, batch_size: int, workers: int, share: Share
) -> tuple[Iterable[Any], Any]:
    """(this rank's batches, data set) of a folder of tar files in clip_benchmark's layout."""
    members = (f"{split}/nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt")
    missing = [path for member in members if not (path := Path(folder) / member).is_file()]
    if missing:
        raise FileNotFoundError(
            f"--root: no {missing[0]}; give a classification folder in clip_benchmark's webdataset layout"
        )
    dataset = _build(name, folder, split, picture)
    shards = int((Path(folder) / members[0]).read_text())
    loader = DataLoader(dataset.batched(batch_size), batch_size=None, num_workers=min(workers, shards))
    return itertools.islice(loader, share.rank, None, share.ranks), dataset


def _open_images(
    name: str, folder: str, split: str, picture: Transform, batch_size: int, workers: int, share: Share
) -> tuple[Iterable[Any], Any]:
    """(this rank's batches, data set) of a folder of images by class, else of what clip_benchmark has or downloads."""
    from clip_benchmark.datasets.builder import get_dataset_collate_fn

    dataset, collate = class_folder(folder, name, split, picture), None
    if dataset is None:
        dataset, collate = _build(name, folder, split, picture), get_dataset_collate_fn(name)
    batches = list(BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False))
    own = batches[share.rank :: share.ranks]
    return DataLoader(dataset, batch_sampler=own, num_workers=workers, collate_fn=collate), dataset


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
