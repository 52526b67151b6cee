"""Users' files to shards: a caption table and a folder of images become tar shards and a manifest.json.

    rows, numbered -> shards of ``shard_size`` rows each -> KEY.jpg + KEY.json (+ KEY.mask.png) in NNNNN.tar ->
    manifest.json

Rows of a shard are fixed by their numbers, a shard appears under its name when it is whole, and its counts lie beside
it: a run that was killed resumes with the shards that are missing, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.statistics import CountTokens, Statistics, character_split_columns, format_summary
from dreamlip_train.captions.table import IMAGE_COLUMN, read_rows
from dreamlip_train.data.images import ImageError, decode_image
from dreamlip_train.data.shards.manifest_writer import Manifest
from dreamlip_train.data.shards.shard_writer import ShardWriter, json_member
from dreamlip_train.jobs.finished import make_once
from dreamlip_train.jobs.job_folder import job_folder
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.image_index import ImageIndex
from dreamlip_train.prepare.options import FolderOptions

STATE = ".prepare"
Row = tuple[int, dict[str, Any] | None, str]


def prepare_folder(
    captions: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    masks: str | Path | None = None,
    shard_size: int = FolderOptions.shard_size,
    count_tokens: CountTokens | None = None,
) -> dict[str, Any]:
    """Write ``output``/NNNNN.tar and manifest.json from a caption table and a folder of images; return the manifest.

    Args:
        captions: CSV, TSV or parquet with the column "Image Path" (a URL, or a path below ``images``) and DreamLIP's
            caption columns; further columns are carried into each sample's json.
        images: folder, searched in depth (image_index.py says how a row finds its image).
        masks: folder of label maps STEM.png: value j is the region that sentence j of each long caption describes.
        shard_size: rows per shard.
        count_tokens: for the manifest's token counts.

    Raises:
        UserError: a file or folder is missing, the table lacks columns, no row is usable, or ``output`` holds shards of
            other input.
    """
    captions, images, output = Path(captions), Path(images), Path(output)
    if shard_size < 1:
        raise UserError(f"--shard-size: got {shard_size}; give at least 1")
    for name, folder in (("--images", images), ("--masks", Path(masks) if masks else images)):
        if not folder.is_dir():
            raise UserError(f"{name}: no folder {str(folder)!r}")
    index = ImageIndex(images)
    index.pair(str(row[IMAGE_COLUMN]) for _, row, _ in read_rows(captions) if row and row.get(IMAGE_COLUMN))
    stat = captions.stat()
    job = {
        "captions": [str(captions.resolve()), stat.st_size, stat.st_mtime_ns],
        "images": str(images.resolve()),
        "masks": str(Path(masks).resolve()) if masks else None,
        "shard_size": shard_size,
    }
    with job_folder(output, STATE, job, "shards of another table, folder or shard size") as state:
        writer = _RowWriter(output, state, index, Path(masks) if masks else None, count_tokens)
        manifest = _write_all(writer, read_rows(captions), shard_size)
        if not manifest.shards:
            why = manifest.total.bad_summary() or "it has no rows"
            raise UserError(f"--captions: no row of {str(captions)!r} gave a sample: {why}")
        content = manifest.write(output)
    print(format_summary(str(output), content))
    return content


def _write_all(writer: _RowWriter, rows: Iterator[Row], shard_size: int) -> Manifest:
    """Every shard."""
    manifest = Manifest()
    with Progress(f"prepare {writer.output}") as progress:
        for name, note in map_bounded(writer.write, _by_shard(rows, shard_size)):
            manifest.add(name, note)
            total = manifest.total
            progress.update(f"{len(manifest.shards)} shards, {total.samples} samples, {total.bad_count} left out")
    return manifest


def _by_shard(rows: Iterator[Row], shard_size: int) -> Iterator[tuple[str, list[Row]]]:
    """(shard name, its rows), rows that repeat an earlier image marked as bad."""
    seen: set[str] = set()

    def checked() -> Iterator[Row]:
        for number, row, wrong in rows:
            if row is not None:
                image = str(row.get(IMAGE_COLUMN, ""))
                if image and image in seen:
                    row, wrong = None, f"duplicate image {image!r}"
                seen.add(image)
            yield number, row, wrong

    for shard, group in groupby(checked(), key=lambda item: (item[0] - 1) // shard_size):
        yield f"{shard:05d}.tar", list(group)


class _RowWriter:
    """Writes the rows of a shard; a shard that is finished is only counted."""

    def __init__(
        self, output: Path, state: Path, index: ImageIndex, masks: Path | None, count_tokens: CountTokens | None
    ):
        self.output, self.state, self.index, self.masks, self.count_tokens = output, state, index, masks, count_tokens

    def write(self, task: tuple[str, list[Row]]) -> tuple[str, dict[str, Any]]:
        """Write one shard unless it is there; return its name and what it holds."""
        name, rows = task
        file = self.output / name
        return name, make_once(file, self.state / f"{name}.json", lambda: self._write(file, rows))

    def _write(self, file: Path, rows: list[Row]) -> dict[str, Any]:
        counts = Statistics()
        with ShardWriter(file) as writer:
            for number, row, wrong in rows:
                if row is None:
                    reason = "duplicate image" if wrong.startswith("duplicate") else "malformed row"
                    counts.add_bad(reason, f"row {number}", wrong)
                elif (sample := self._sample(number, row, wrong, counts)) is not None:
                    writer.add(sample)
                    counts.add_sample(row, self.count_tokens, "mask.png" in sample)
        return {"samples": counts.samples, "counts": counts.state}

    def _sample(self, number: int, row: dict[str, Any], wrong: str, counts: Statistics) -> dict[str, Any] | None:
        """A row's picture, json and mask as members of a shard; None where it has no captions or no whole picture."""
        name, image = f"row {number}", str(row.get(IMAGE_COLUMN, ""))
        if wrong:
            counts.add_bad("table cell repaired or left out", name, wrong)
        for column in character_split_columns(row):
            counts.add_bad("caption stored as characters", name, column)
        if not caption_pool(row):
            return counts.add_bad("no captions", name, image)
        try:
            path = self.index.find(image)
            data = (self.index.folder / path).read_bytes()
            decode_image(data)
        except (LookupError, OSError) as error:
            return counts.add_bad("image not found", name, str(error))
        except ImageError as error:
            return counts.add_bad("damaged image", name, f"{path}: {error}")
        stem, extension = path.rsplit(".", 1)
        sample = {"key": f"{number - 1:09d}", extension.lower(): data, "json": json_member(row)}
        mask = None if self.masks is None else self.masks / f"{PurePosixPath(stem).name}.png"
        if mask is not None and mask.is_file():
            sample["mask.png"] = mask.read_bytes()
        return sample
