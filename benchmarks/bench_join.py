"""How long, and in how much memory, ``prepare join`` matches captions with samples:
``python benchmarks/bench_join.py [ROWS]`` (the tars aside).

A CSV of ROWS captions of 1.5 KB is read, and matched by URL with ROWS samples in shards of 1000, in random order,
as published tables and downloaded shards are; 5 % of either side have no partner. Each step runs in a process of its
own, whose peak memory is printed.
"""

from __future__ import annotations

import csv
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dreamlip_train.captions.table import IMAGE_COLUMN
from dreamlip_train.prepare.join.join import match, stage_table

WORDS = (
    "a the red green small large dog cat tree on in at near behind with sunny street water people standing sitting "
    "white black old"
).split()


def write_inputs(folder: Path, rows: int) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=300))[:1480] for _ in range(500)]
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([IMAGE_COLUMN, "raw_caption", "longSV_captions"])
        for row in range(rows):
            writer.writerow(
                [f"http://img{row % 97}.example.com/photos/{row:09d}.jpg", f"raw {row}", f"{texts[row % 500]}. {row}"]
            )
    order = list(range(rows // 20, rows + rows // 20))
    rng.shuffle(order)
    (folder / "shards").mkdir()
    for part in range(0, rows, 100_000):
        part_rows = order[part : part + 100_000]
        table = {
            "shard": pyarrow.array([(part + i) // 1000 for i in range(len(part_rows))], pyarrow.int32()),
            "position": pyarrow.array([(part + i) % 1000 for i in range(len(part_rows))], pyarrow.int64()),
            "value": pyarrow.array([f"img{row % 97}.example.com/photos/{row:09d}.jpg" for row in part_rows]),
        }
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "shards" / f"{part:09d}.parquet")


def measured(step: Callable[[], object]) -> tuple[float, float]:
    """(seconds, peak GB) of ``step`` in a process of its own."""
    pipe, end = multiprocessing.Pipe()

    def run() -> None:
        began = time.perf_counter()
        step()
        end.send((time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return pipe.recv() if process.exitcode == 0 else sys.exit(f"a step ended with {process.exitcode}")


def main(rows: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench_join"))
    try:
        write_inputs(folder, rows)
        (folder / "tables").mkdir()
        read = measured(
            lambda: stage_table(
                (0, folder / "captions.csv"), state=folder / "tables", on="url", column=IMAGE_COLUMN, columns={}
            )
        )
        joined = measured(lambda: match(folder, "3GB"))
        size = (folder / "captions.csv").stat().st_size / 1e9
        print(
            f"{rows} rows, {size:.2f} GB of CSV: read {read[0]:.0f} s in {read[1]:.2f} GB, "
            f"join {joined[0]:.0f} s in {joined[1]:.2f} GB"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
