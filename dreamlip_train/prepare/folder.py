"""Users' files to shards: a caption table and a folder of images become tar shards and a manifest.json.

    rows, numbered -> shards of ``shard_size`` rows each -> KEY.jpg + KEY.json (+ KEY.mask.png) in NNNNN.tar ->
    manifest.json

Rows of a shard are fixed by their numbers, a shard appears under its name when it is whole, and its counts lie beside
it: a run that was killed resumes with the shards that are missing, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from dreamlip_train.captions.cells import IMAGE_BYTES
from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.captions.formats.hub import PREFIX as HUB
from dreamlip_train.captions.formats.hub import HubTable
from dreamlip_train.captions.formats.layouts import IMAGE_COLUMN
from dreamlip_train.captions.formats.parquet_pictures import ParquetPictures, picture_column
from dreamlip_train.captions.statistics import CountTokens, Statistics, character_split_columns, format_summary
from dreamlip_train.captions.table import Row, Table
from dreamlip_train.data.images import decode_image, media_type
from dreamlip_train.data.shards.manifest_writer import Manifest
from dreamlip_train.data.shards.shard_writer import ShardWriter, json_member
from dreamlip_train.data.shards.shards import MAX_MEMBER_BYTES
from dreamlip_train.jobs.job_folder import job_folder, make_once
from dreamlip_train.jobs.plain_text import plain
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.progress_line import Progress
from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.prepare.image_index import ImageIndex
from dreamlip_train.prepare.options import FolderOptions

STATE = ".prepare"


def prepare_folder(
    captions: str | Path,
    images: str | Path | None,
    output: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    masks: str | Path | None = None,
    shard_size: int = FolderOptions.shard_size,
    count_tokens: CountTokens | None = None,
) -> dict[str, Any]:
    """Write ``output``/NNNNN.tar and manifest.json from a caption table and its pictures; return the manifest.

    Args:
        captions: a table (``captions.table.Table``) with an image column and caption columns; further columns are
            carried into each sample's json. Or "hf:NAME:SPLIT", a data set that is streamed (``formats.hub``).
        images: folder, searched in depth (image_index.py says how a row finds its image); None where the table has the
            pictures inside.
        columns: {our column: the table's}, where its names are not known.
        masks: folder of label maps STEM.png: value j is the region that sentence j of each long caption describes.
        shard_size: rows per shard.
        count_tokens: for the manifest's token counts.

    Raises:
        UserError: a file or folder is missing, the table lacks columns, no row is usable, or ``output`` holds shards of
            other input.
    """
    output = Path(output)
    if shard_size < 1:
        raise UserError(f"--shard-size: got {shard_size}; give at least 1")
    if masks is not None and not Path(masks).is_dir():
        raise UserError(f"--masks: no folder {str(masks)!r}")
    table, source, rows = _opened(captions, images, columns)
    job = {
        "captions": _identity(captions),
        "images": str(Path(images).resolve()) if images else None,
        "columns": dict(columns or {}),
        "masks": str(Path(masks).resolve()) if masks else None,
        "shard_size": shard_size,
    }
    with job_folder(output, STATE, job, "shards of another table, folder or shard size") as state:
        writer = _RowWriter(output, state, source, Path(masks) if masks else None, count_tokens)
        manifest = _write_all(writer, table, shard_size, rows)
        if not manifest.shards:
            why = manifest.total.bad_summary() or "it has no rows"
            raise UserError(f"--captions: no row of {str(captions)!r} gave a sample: {why}")
        manifest.further["table"] = {"layout": table.layout, "rows": writer.rows, "lines": table.lines}
        content = manifest.write(output)
    print(plain(format_summary(str(output), content)))
    return content


def _opened(
    captions: str | Path, images: str | Path | None, columns: Mapping[str, str] | None
) -> tuple[Table | HubTable, ImageIndex | ParquetPictures | None, int | None]:
    """The rows, checked; where their pictures are (None: in the rows); how many there are, where that is known."""
    count = None
    if str(captions).startswith(HUB):
        table: Table | HubTable = HubTable(str(captions), columns)
        source, count = None if images is None else ImageIndex(_folder(images)), table.count
    else:
        table = Table(Path(captions), columns)
        next(iter(table), None)
        inside = picture_column(Path(captions), columns or {})
        source = ParquetPictures(Path(captions), inside) if inside else ImageIndex(_folder(images))
    if isinstance(source, ParquetPictures):
        count = source.count()
    if isinstance(source, ImageIndex):
        count = source.pair(str((row or {}).get(IMAGE_COLUMN) or "") for _, row, _ in table)
    return table, source, count


def _folder(images: str | Path | None) -> Path:
    if images is None:
        raise UserError("--images: the table has no pictures inside; give the folder of the files that it names")
    if not Path(images).is_dir():
        raise UserError(f"--images: no folder {str(images)!r}")
    return Path(images)


def _identity(captions: str | Path) -> list[Any]:
    if str(captions).startswith(HUB):
        return [str(captions)]
    stat = Path(captions).stat()
    return [str(Path(captions).resolve()), stat.st_size, stat.st_mtime_ns]


def _write_all(writer: _RowWriter, table: Table | HubTable, shard_size: int, rows: int | None) -> Manifest:
    """Every shard; of rows that bring their pictures in this process, which holds one shard then."""
    manifest = Manifest()
    run = map if isinstance(table, HubTable) else map_bounded
    count = None if rows is None else -(-rows // shard_size)
    with Progress(f"prepare {writer.output}", count, "shards") as progress:
        for name, note in run(writer.write, _by_shard(table, shard_size, isinstance(writer.source, ImageIndex))):
            manifest.add(name, note)
            writer.rows += note.get("rows", 0)
            total = manifest.total
            progress.advance(text=f"{total.samples:,} samples, {total.bad_count:,} left out")
    return manifest


def _by_shard(rows: Iterable[Row], shard_size: int, by_name: bool) -> Iterator[tuple[str, list[Row]]]:
    """(shard name, its rows), rows that name (``by_name``) an earlier row's image marked as bad."""
    seen: set[str] = set()

    def checked() -> Iterator[Row]:
        for number, row, wrong in rows:
            if row is not None:
                image = str(row.get(IMAGE_COLUMN, ""))
                if by_name and image and IMAGE_BYTES not in row and image in seen:
                    row, wrong = None, f"duplicate image {image!r}"
                seen.add(image)
            yield number, row, wrong

    # By place, not by number: of a row per caption, several lines are one row.
    for shard, group in groupby(enumerate(checked()), key=lambda item: item[0] // shard_size):
        yield f"{shard:05d}.tar", [row for _, row in group]


class _RowWriter:
    """Writes the rows of a shard; a shard that is finished is only counted."""

    def __init__(
        self,
        output: Path,
        state: Path,
        source: ImageIndex | ParquetPictures | None,
        masks: Path | None,
        count_tokens: CountTokens | None,
    ) -> None:
        self.output, self.state, self.source, self.masks, self.count_tokens = output, state, source, masks, count_tokens
        self.rows = 0

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
        return {"samples": counts.samples, "counts": counts.state, "rows": len(rows)}

    def _sample(self, number: int, row: dict[str, Any], wrong: str, counts: Statistics) -> dict[str, Any] | None:
        """A row's picture, json and mask as members of a shard; None where it has no captions or no whole picture."""
        name, image = f"row {number}", str(row.get(IMAGE_COLUMN, ""))
        inside = row.pop(IMAGE_BYTES, None)
        if wrong:
            counts.add_bad("table cell repaired or left out", name, wrong)
        for column in character_split_columns(row):
            counts.add_bad("caption stored as characters", name, column)
        if not caption_pool(row):
            return counts.add_bad("no captions", name, image)
        try:
            path, data = self._picture(number, image, inside)
            decode_image(data)
        except (LookupError, OSError) as error:
            return counts.add_bad("image not found", name, str(error))
        except ValueError as error:
            return counts.add_bad("damaged image", name, f"{image}: {error}")
        extension = (
            path.rsplit(".", 1)[1].lower() if path else media_type(data).partition("/")[2].replace("jpeg", "jpg")
        )
        sample = {"key": f"{number - 1:09d}", extension: data, "json": json_member(row)}
        mask = None if self.masks is None else self.masks / f"{PurePosixPath(path or image).stem}.png"
        if mask is not None and mask.is_file():
            sample["mask.png"] = mask.read_bytes()
        return sample

    def _picture(self, number: int, image: str, inside: bytes | None) -> tuple[str, bytes]:
        """(path below the image folder, "" where it is in the table; the file's content)."""
        if isinstance(self.source, ImageIndex) and inside is None:
            path = self.source.find(image)
            return path, _read_regular(self.source.folder / path)
        if isinstance(self.source, ParquetPictures):
            inside = self.source.read(number)
        if inside is None:
            raise LookupError("the row has no picture inside")
        return "", inside


def _read_regular(file: Path) -> bytes:
    """A file's content; a pipe would be waited for without end, and what no reader of shards reads is not written.

    Raises:
        LookupError: it is a pipe, a device or the like.  ValueError: it is larger than a member of a shard may be.
    """
    if not file.is_file():
        raise LookupError(f"{file.name} is no regular file")
    size = file.stat().st_size
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"{size:,} bytes are more than {MAX_MEMBER_BYTES:,}")
    return file.read_bytes()
