"""Users' files to shards: a caption table and a folder of images become tar shards and a manifest.json.

    rows, numbered -> shards of ``shard_size`` rows each -> KEY.jpg + KEY.json (+ KEY.mask.png) in NNNNN.tar ->
    manifest.json

Rows of a shard are fixed by their numbers, a shard appears under its name when it is whole, and its counts lie beside
it: a run that was killed goes on with the shards that are missing, and the result is the same.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.statistics import CountTokens, Statistics, character_split_columns, format_summary
from dreamlip_train.captions.table import IMAGE_COLUMN, read_rows
from dreamlip_train.data.images import ImageError, decode_image
from dreamlip_train.data.shards.manifest import MANIFEST
from dreamlip_train.data.shards.shard_writer import add_member
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.job_folder import claim_output
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.image_index import ImageIndex
from dreamlip_train.prepare.output_names import sole_writer

STATE = ".prepare"
Row = tuple[int, dict[str, Any] | None, str]


def prepare_folder(
    captions: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    masks: str | Path | None = None,
    shard_size: int = 1000,
    count_tokens: CountTokens | None = None,
) -> dict[str, Any]:
    """Write ``output``/NNNNN.tar and manifest.json from a caption table and a folder of images; return the manifest.

    Args:
        captions: CSV, TSV or parquet with the column "Image Path" (a URL, or a path below ``images``) and DreamLIP's
            caption columns; further columns are carried into each sample's json.
        images: folder, searched in depth (image_index.py says how a row finds its image).
        masks: folder of label maps STEM.png: value j is the region that sentence j of each long caption describes.
        shard_size: rows a shard.
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
    with sole_writer(output, STATE):
        state = _claim(output, captions, images, masks, shard_size)
        writer = _ShardWriter(output, state, index, Path(masks) if masks else None, count_tokens)
        total, shards = _write_all(writer, read_rows(captions), shard_size)
    if not shards:
        raise UserError(
            f"--captions: no row of {str(captions)!r} gave a sample: {total.bad_summary() or 'it has no rows'}"
        )
    manifest = {"format": 1, **total.summary(), "shards": dict(sorted(shards.items()))}
    write_json(output / MANIFEST, manifest)
    print(format_summary(str(output), manifest))
    return manifest


def _write_all(
    writer: _ShardWriter, rows: Iterator[Row], shard_size: int
) -> tuple[Statistics, dict[str, dict[str, int]]]:
    """Every shard; (what they hold, their manifest entries)."""
    total, shards = Statistics(), {}
    with Progress(f"prepare {writer.output}") as progress:
        for name, state in map_bounded(writer.write, _by_shard(rows, shard_size)):
            counts = Statistics(state)
            total.merge(counts)
            if counts.samples:
                shards[name] = {"samples": counts.samples, "bytes": (writer.output / name).stat().st_size}
            progress.update(f"{len(shards)} shards, {total.samples} samples, {total.bad_count} left out")
    return total, shards


def _claim(output: Path, captions: Path, images: Path, masks: str | Path | None, shard_size: int) -> Path:
    """Make the output's state folder, or check that it is of the same job."""
    stat = captions.stat()
    job = {
        "captions": [str(captions.resolve()), stat.st_size, stat.st_mtime_ns],
        "images": str(images.resolve()),
        "masks": str(Path(masks).resolve()) if masks else None,
        "shard_size": shard_size,
    }
    return claim_output(output, STATE, job, "shards of another table, folder or shard size", sole=True)


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


class _ShardWriter:
    """Writes shards; what is finished already is only counted."""

    def __init__(
        self, output: Path, state: Path, index: ImageIndex, masks: Path | None, count_tokens: CountTokens | None
    ):
        self.output, self.state, self.index, self.masks, self.count_tokens = output, state, index, masks, count_tokens

    def write(self, task: tuple[str, list[Row]]) -> tuple[str, dict[str, Any]]:
        """Write one shard unless it is there; return its name and counts."""
        name, rows = task
        final, state = self.output / name, self.state / f"{name}.json"
        if state.exists():
            known = json.loads(state.read_text(encoding="utf-8"))
            if final.exists() or not known["samples"]:
                return name, known
        counts = Statistics()
        partial = final.with_name(name + ".partial")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, row, wrong in rows:
                self._add(tar, number, row, wrong, counts)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        write_json(state, counts.state)
        if counts.samples:
            os.replace(partial, final)
        else:
            partial.unlink()
        return name, counts.state

    def _add(
        self, tar: tarfile.TarFile, number: int, row: dict[str, Any] | None, wrong: str, counts: Statistics
    ) -> None:
        name = f"row {number}"
        if row is None:
            return counts.add_bad("duplicate image" if wrong.startswith("duplicate") else "malformed row", name, wrong)
        if wrong:
            counts.add_bad("table cell repaired or left out", name, wrong)
        for column in character_split_columns(row):
            counts.add_bad("caption stored as characters", name, column)
        if not caption_pool(row):
            return counts.add_bad("no captions", name, str(row.get(IMAGE_COLUMN, "")))
        try:
            path = self.index.find(str(row.get(IMAGE_COLUMN, "")))
            data = (self.index.folder / path).read_bytes()
            decode_image(data)
        except (LookupError, OSError) as error:
            return counts.add_bad("image not found", name, str(error))
        except ImageError as error:
            return counts.add_bad("damaged image", name, f"{path}: {error}")
        key = f"{number - 1:09d}"
        stem, extension = path.rsplit(".", 1)
        add_member(tar, f"{key}.{extension.lower()}", data)
        add_member(tar, f"{key}.json", json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace"))
        mask = self._mask(PurePosixPath(stem).name)
        if mask is not None:
            add_member(tar, f"{key}.mask.png", mask)
        counts.add_sample(row, self.count_tokens, mask is not None)

    def _mask(self, stem: str) -> bytes | None:
        path = None if self.masks is None else self.masks / f"{stem}.png"
        return path.read_bytes() if path is not None and path.is_file() else None
