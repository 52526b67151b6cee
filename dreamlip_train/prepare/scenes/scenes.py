"""The demo's world: pictures of several objects with masks, and captions in DreamLIP's columns.

A scene is a pure function of (seed, split, index). Sentence j of each long caption describes the object that is value j
of the mask.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dreamlip_train.captions.columns import CAPTION_COLUMNS
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.options import ScenesOptions
from dreamlip_train.prepare.scenes.captions import caption_scene
from dreamlip_train.prepare.scenes.scene import compose_scene, paint_scene

Split = Literal["train", "val"]
_SCENES_AT_ONCE = 32


def write_scene(folder: Path, seed: int, split: Split, index: int) -> dict[str, str]:
    """Write images/KEY.jpg and masks/KEY.png of one scene below folder; returns its row of captions.csv."""
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    scene = compose_scene(rng)
    picture, mask = paint_scene(scene, rng)
    key = f"{index:06d}"
    picture.save(folder / "images" / f"{key}.jpg", quality=int(rng.integers(80, 96)))
    mask.save(folder / "masks" / f"{key}.png")
    return {"Image Path": f"{key}.jpg", **caption_scene(scene, rng, serial=1000 + index)}


def prepare_scenes(
    output: str | Path,
    num_train: int = ScenesOptions.num_train,
    num_val: int = ScenesOptions.num_val,
    seed: int = ScenesOptions.seed,
) -> dict[str, Any]:
    """Render the demo world: output/{train,val}/{images/*.jpg, masks/*.png, captions.csv}.

    captions.csv has DreamLIP's columns and is what ``prepare folder`` takes. The files depend on the arguments alone.

    Returns:
        {"train": {"samples", "captions", "images", "masks"}, "val": {...}} with the paths as strings.
    Raises:
        UserError: a negative count, or ``output`` can't be written.
    """
    if num_train < 0 or num_val < 0:
        raise UserError(f"prepare scenes: num_train and num_val must be >= 0, got {num_train} and {num_val}")
    began = time.monotonic()
    summary = {}
    counts: dict[Split, int] = {"train": num_train, "val": num_val}
    for split, count in counts.items():
        folder = Path(output) / split
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows = _rows(partial(write_scene, folder, seed, split), count)
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["Image Path", *CAPTION_COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
        captions, text = folder / "captions.csv", table.getvalue().encode()
        # Left alone where it is the same: shards know their table by its time too, and would be refused as another
        # one's.
        if not captions.is_file() or captions.read_bytes() != text:
            captions.write_bytes(text)
        summary[split] = (
            {"samples": count}
            | {name: str(folder / name) for name in ("images", "masks")}
            | {"captions": str(folder / "captions.csv")}
        )
    done = f"prepare scenes: {num_train} training and {num_val} held-out scenes in {output}"
    print(plain(f"{done} ({time.monotonic() - began:.0f} s)"))
    return summary


def _rows(function: Callable[[int], dict[str, str]], count: int) -> list[dict[str, str]]:
    """``map(function, range(count))``, a few at a time."""
    processes = min(len(os.sched_getaffinity(0)), 16, count // 100)
    if processes < 2:
        return [function(i) for i in range(count)]
    parts = (range(begin, min(begin + _SCENES_AT_ONCE, count)) for begin in range(0, count, _SCENES_AT_ONCE))
    scenes = []
    with Progress("scenes", count, "scenes") as progress:
        for rows in map_bounded(lambda part: [function(i) for i in part], parts, processes):
            scenes += rows
            progress.advance(len(rows))
    return scenes
