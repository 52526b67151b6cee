"""Tars that were made to stall or fill a reader: each ends with what could be read of it."""

import os
import tarfile

import pytest
from shard_files import sample

from dreamlip_train.data.shards.shards import Oversized, ShardError, read_shard


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A tar header with any size, as GNU tar writes large ones."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = (
        b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + size.to_bytes(11, "big", signed=True)
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 512)


GOOD = b"".join(header(name, len(data)) + padded(data) for name, data in [*sample("good"), *sample("next")])
LONG_NAME = header("././@LongLink", 512, b"L") + b"x" * 512
PAX = header("pax", 14, b"x") + padded(b"14 path=x.jpg\n")
GLOBAL_PAX = header("pax", 14, b"g") + padded(b"14 path=x.jpg\n")

TARS = {
    "a member that would end in 300,000 years": GOOD + header("a.jpg", 2**80) + b"x" * 512,
    "a member of less than nothing": GOOD + header("a.jpg", -512) + GOOD,
    "long names of long names": GOOD + LONG_NAME * 2000 + header("a.jpg", 0),
    "records of records": GOOD + PAX * 2000 + header("a.jpg", 0),
    "records of everything": GOOD + GLOBAL_PAX * 2000 + header("a.jpg", 0),
}


@pytest.mark.parametrize("kind", TARS)
def test_headers_end(tmp_path, kind):
    """tarfile reads on behind the end of a stream for as long as a header's size says, and headers nest without end."""
    (tmp_path / "0.tar").write_bytes(TARS[kind])
    keys = []
    try:
        for one in read_shard(tmp_path / "0.tar"):
            keys.append(one["key"])
    except ShardError:
        pass
    assert keys[0] == "good"


@pytest.mark.parametrize("kind", [b"L", b"x", b"g"])
def test_a_header_is_not_read_whole_whatever_its_size(tmp_path, kind):
    """A sparse file of 20 GB, or a server that sends zeros without end, was read into memory as one name."""
    path = tmp_path / "0.tar"
    path.write_bytes(GOOD + header("name", 20 * 2**30, kind))
    os.truncate(path, 21 * 2**30)
    samples = read_shard(path)
    with pytest.raises(ShardError, match="a header of 21,474,836,480 bytes"):
        list(samples)


def test_what_a_sample_holds_together_is_capped(tmp_path):
    """64 members of 256 MB each are 16 GB of one sample."""
    path = tmp_path / "0.tar"
    path.write_bytes(b"".join(header(f"a.{i}", 512) + b"x" * 512 for i in range(6)) + GOOD)
    first, good, _ = read_shard(path, 600)
    assert [isinstance(first[str(i)], Oversized) for i in range(6)] == [False, False, True, True, True, True]
    assert good["key"] == "good" and isinstance(good["jpg"], Oversized) and good["json"]


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(ShardError, match="named pipe"):
        list(read_shard(tmp_path / "0.tar"))
