"""The trainer from a folder of images and a CSV to a number: the four commands, on pictures made here.

    python examples/train_on_own_images.py

With your own images the first three lines of ``main`` go, ``demo`` becomes ``cc3m_vitb16``, and the steps stay the
recipe's.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny_world


def make_images(folder: Path, count: int, first: int) -> Path:
    """Pictures and a table with DreamLIP's columns: a path, and captions by source."""
    (folder / "images").mkdir(parents=True)
    table = folder / "captions.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Image Path", "raw_caption", "longIB_captions"])
        for seed in range(first, first + count):
            image, caption = tiny_world.picture(seed)
            image.save(folder / "images" / f"{seed}.png")
            rows.writerow([f"{seed}.png", caption.split(".")[0], caption])
    return table


def dreamlip_train(*words: str | Path) -> None:
    """Show a command and run it."""
    print("\n$ dreamlip-train", *words, flush=True)
    subprocess.run([sys.executable, "-m", "dreamlip_train", *map(str, words)], check=True)


def main() -> None:
    """Prepare, train, evaluate, export."""
    folder = Path(os.environ.get("EXAMPLE_FOLDER") or tempfile.mkdtemp())
    for name, count, first in (("train", 240, 0), ("val", 40, 240)):
        table = make_images(folder / name, count, first)
        dreamlip_train(
            *("prepare", "folder", "--captions", table, "--images", folder / name / "images"),
            *("--shard-size", 20, "--output", folder / "shards" / name),
        )
    run = folder / "run"
    dreamlip_train(
        *("train", "demo", "--run-dir", run, "--data.shards", folder / "shards" / "train"),
        *("--data.val-shards", folder / "shards" / "val", "--data.num-workers", 1),
        *("--train.steps", 12, "--logging.every-steps", 4, "--train.global-batch-size", 32),
    )
    dreamlip_train("eval", "retrieval", run, "--val-shards", folder / "shards" / "val")
    dreamlip_train("export", run, "--to", "open_clip-dir", "--output", folder / "exported")


if __name__ == "__main__":
    main()
