"""The raw samples of a shard, as bytes. Nothing here decodes anything, and nothing is read that is larger than it may
be.

    list_shards -> read_shard -> {"key", "jpg": bytes, "json": bytes, ..}

Tar members are read as bytes and never unpickled: a ``.pyd`` member is bytes like any other.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ.setdefault("WDS_SECURE", "1")

from webdataset.tariterators import base_plus_ext

from dreamlip_train.captions.cells import CellError, written_value
from dreamlip_train.captions.columns import is_caption_column, text_columns
from dreamlip_train.data.shards.shard_names import open_shard
from dreamlip_train.jobs.atomic_json import parse_json

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 256 * 2**20
_MAX_MEMBERS = 64  # of a sample
_SPARSE = 2**40  # a sparse file is not read, whatever it claims
_LONGEST_HEADER = 2**20  # bytes of a long name or of pax records, which tarfile reads whole
_WITH_DATA = (b"L", b"K", b"x", b"g", b"X")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's names for what is no sample
# Pictures hardly compress: a stream that grows beyond this is no shard but a bomb.
_FREE_BYTES, _MOST_RATIO = 64 * 2**20, 50
_COMPRESSED = {b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw), b"BZ": bz2.BZ2File, b"\xfd7": lzma.LZMAFile}


class ShardError(Exception):
    """A shard that could not be read to its end; ``args[0]`` says why."""


class RepeatedKey(str):
    """The key of a sample whose own, ``original``, an earlier sample of the shard had: that with a number."""

    original: str


class Oversized(bytes):
    """Stands for a member that was not read: empty, and with the ``size`` that its header claims."""

    size: int

    @classmethod
    def of(cls, size: int) -> Oversized:
        """One of ``size`` bytes."""
        data = cls()
        data.size = size
        return data


def read_shard(shard: str, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[dict[str, Any]]:
    """Raw samples in file order: {"key": str, extension: bytes, ..}, extensions in lower case.

    A key belongs to one sample: a later one of the same key gets a ``RepeatedKey``.

    Args:
        max_member_bytes: a member that claims more, or is sparse, is not read, nor what comes after twice as much of
            one sample; ``Oversized`` stands in its place.
    Raises:
        ShardError: the tar is missing, truncated or no tar; the samples before the damage have been given.
    """
    times: dict[str, int] = {}  # a key came
    for sample in _grouped(shard, max_member_bytes):
        key = sample["key"]
        if key in times:
            sample["key"] = _another_key(key, times)
        times.setdefault(sample["key"], 1)
        yield sample


def _another_key(key: str, times: dict[str, int]) -> RepeatedKey:
    """``key`` with a number that no sample of the shard has had."""
    while True:
        times[key] += 1
        another = RepeatedKey(f"{key}~{times[key]}")
        if another not in times:
            another.original = key
            return another


def _grouped(shard: str, max_member_bytes: int) -> Iterator[dict[str, Any]]:
    """Successive members of one key, as a sample."""
    current: dict[str, Any] = {}
    room = 0
    try:
        with open_shard(shard) as stream:
            for name, size, read in _members(stream):
                key, extension = base_plus_ext(name)
                if not key or not extension:
                    continue
                if current and current["key"] != key:
                    yield current
                    current = {}
                if not current:
                    current, room = {"key": key}, 2 * max_member_bytes
                # "key" is taken; no caption, image or mask is called so.
                if extension.lower() != "key" and len(current) <= _MAX_MEMBERS:
                    data = read() if 0 <= size <= min(room, max_member_bytes) else Oversized.of(size)
                    current[extension.lower()] = data
                    room -= len(data)
    except (OSError, EOFError, ValueError, OverflowError, struct.error) as error:
        raise ShardError(f"{type(error).__name__}: {error}") from error
    except RecursionError as error:  # a name that has a long name that has ..
        raise ShardError("headers that are nested too deep") from error
    except (tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{type(error).__name__}: {error}") from error
    if current:
        yield current


def _members(stream: Any) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """(name, size, what reads the content) of the regular files of a tar, plain or compressed. A name that is not
    UTF-8 has its bytes as \\xNN; of a sparse file the size is at least ``_SPARSE``.
    """
    with tarfile.open(fileobj=_plain(stream), mode="r|", bufsize=1 << 18, tarinfo=_Header) as tar:
        for member in tar:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it would remember them all
            name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if member.isreg() and not _META.match(name):
                size = max(member.size, _SPARSE) if member.issparse() else member.size
                yield name, size, tar.extractfile(member).read  # type: ignore[union-attr]


class _Header(tarfile.TarInfo):
    """A header whose own data, a long name or pax records, are not read where they are longer than any."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _WITH_DATA and not 0 <= self.size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc] - where tarfile decides by the type


def _plain(stream: Any) -> Any:
    """A stream of the tar's own bytes."""
    raw = _Counted(stream)
    opener = _COMPRESSED.get(raw.peek(2))
    return _Bounded(opener(raw), raw) if opener else raw


class _Ending:
    """A stream that is not read on and on behind its end, as tarfile does to pass over a member of 2**80 bytes."""

    ends = 0

    def noted(self, data: bytes) -> bytes:
        """What was read: nothing three times is an error."""
        self.ends += not data
        if self.ends > 2:
            raise EOFError("the file ends before a member that its header announces does")
        return data


class _Counted(_Ending):
    """A stream that can be looked into and says how much was read."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ahead, self.count = stream, b"", 0

    def peek(self, size: int) -> bytes:
        self.ahead += self.stream.read(size - len(self.ahead))
        return self.ahead[:size]

    def read(self, size: int = -1) -> bytes:
        data, self.ahead = self.ahead[: size if size >= 0 else None], self.ahead[size:] if size >= 0 else b""
        data += self.stream.read(size - len(data) if size >= 0 else -1)
        self.count += len(data)
        return self.noted(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    closed = False


class _Bounded(_Ending):
    """What ``opener`` decompresses, until it is far more than what came in."""

    def __init__(self, stream: Any, source: _Counted) -> None:
        self.stream, self.source, self.count = stream, source, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.count += len(data)
        if self.count > _FREE_BYTES + _MOST_RATIO * self.source.count:
            raise ValueError(
                f"{self.count:,} bytes came out of {self.source.count:,} compressed ones: a bomb, no pictures"
            )
        return self.noted(data)


def original_key(sample: Mapping[str, Any]) -> str:
    """The key as the shard has it, for two samples perhaps."""
    key = sample["key"]
    return key.original if isinstance(key, RepeatedKey) else key


def image_of(sample: dict[str, Any]) -> bytes | None:
    """The sample's image file, or None."""
    return next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), None)


def record_of(sample: dict[str, Any], notes: list[str] | None = None) -> dict[str, Any]:
    """The sample's caption columns: its json, and where that has none its txt or else the json's "caption", as
    img2dataset writes it (``text_columns``).

    Args:
        notes: gets a line for each caption that was a list, or bytes, written as text, and is read as that.
    Raises:
        ValueError: the json is not an object, or a member was too large to be read.
    """
    record: dict[str, Any] = {}
    for name in ("json", "txt"):
        if isinstance(sample.get(name), Oversized):
            raise ValueError(f"its {name} has {sample[name].size:,} bytes")
    if "json" in sample:
        record = parse_json(sample["json"])
        if not isinstance(record, dict):
            raise ValueError(f"its json holds a {type(record).__name__}, not an object")
    if "txt" in sample and not isinstance(record.get("raw_caption"), (str, list)):
        for column, text in text_columns(sample["txt"].decode("utf-8", errors="replace")).items():
            if not record.get(column):
                record[column] = text
    if "txt" not in sample and isinstance(record.get("caption"), str) and not any(map(is_caption_column, record)):
        record |= text_columns(record["caption"])
    for column, value in record.items():
        if isinstance(value, str) and is_caption_column(column):
            record[column] = _caption_of(value, column, [] if notes is None else notes)
    return record


def _caption_of(text: str, column: str, notes: list[str]) -> Any:
    """What a caption of a shard says; None where it is something else written as text."""
    try:
        return written_value(text, notes, column)
    except CellError as error:
        notes.append(f"{column} left out: {error}")
        return None
