"""Hostile and broken tars: every oddity costs its own sample, sizes are capped before reading, and counts survive
broken neighbors.
"""

import gzip
import io
import json
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from shard_files import jpeg, sample, tokenize, write_index, write_shards, write_tar

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.data.samples import BadSample, prepare_sample
from dreamlip_train.data.shards.manifest import count_samples
from dreamlip_train.data.shards.shard_names import Shard, list_shards, shard_ids
from dreamlip_train.data.shards.shards import Oversized, ShardError, image_of, read_shard
from dreamlip_train.jobs.user_error import RunError, UserError


def loader(pattern, folder=None, **data):
    config = DataConfig(shards=str(pattern), num_workers=0, num_sub_captions=3, shuffle_buffer=20, **data)
    quarantine = None if folder is None else folder / "quarantine.jsonl"
    return train_loader(config, image_size=16, tokenize=tokenize, batch_size=8, quarantine=quarantine)


def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    info = tarfile.TarInfo("x")
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("é.jpg", "é.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    (one,) = read_shard(tmp_path / "0.tar")
    assert one["key"] == "\\xe9" and one["json"] == b"{}"
    json.dumps(one["key"]).encode()


def test_a_member_called_key_is_no_key(tmp_path):
    members = [("a.key", b"other"), *sample("a"), ("a.KEY", b"other"), *sample("b")]
    assert [s["key"] for s in read_shard(write_tar(tmp_path / "0.tar", members))] == ["a", "b"]


def test_what_claims_a_terabyte_is_not_read(tmp_path):
    """A sparse header of 1 TB was read as 1 TB of zeros."""
    header = tarfile.TarInfo("b.jpg")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in (*sample("a"), *sample("c")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    first = data.getvalue().index(b"c.jpg\0") // 512 * 512
    (tmp_path / "0.tar").write_bytes(data.getvalue()[:first] + bytes(block) + data.getvalue()[first:])
    samples = list(read_shard(tmp_path / "0.tar"))
    assert [s["key"] for s in samples] == ["a", "b", "c"]
    assert isinstance(samples[1]["jpg"], Oversized) and samples[1]["jpg"].size == 2**40


def test_members_are_capped_and_counted(tmp_path):
    big = [
        ("b.jpg", jpeg(1) + b"\0" * (2 << 20)),
        ("b.json", b'{"raw_caption": "x"}'),
        ("c.jpg", jpeg(2)),
        ("c.json", b" " * (2 << 20)),
    ]
    members = [m for i in range(14) for m in sample(f"{i:03d}", i)] + big
    write_tar(tmp_path / "00000.tar", members)
    write_index(tmp_path, [16])
    made = loader(tmp_path, max_member_mb=1, max_bad_fraction=1.0)
    list(made.epoch(0))
    assert made.bad.counts == {"image too large": 1, "unreadable captions": 1}
    assert "2,09" in str(made.bad) and "data.max_member_mb" in str(made.bad)
    (one,) = [s for s in read_shard(tmp_path / "00000.tar", 1 << 20) if s["key"] == "b"]
    with pytest.raises(BadSample):
        prepare_sample(one, DataConfig(), 16, "")


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_a_compressed_shard_is_read_and_a_bomb_is_not(tmp_path, name):
    whole = write_shards(tmp_path / "s", [4]) / "00000.tar"
    (tmp_path / name).write_bytes(gzip.compress(whole.read_bytes()))
    assert len(list(read_shard(tmp_path / name))) == 4
    info = tarfile.TarInfo("a.jpg")
    info.size = 200 << 20
    with gzip.open(tmp_path / name, "wb", compresslevel=9) as file:
        file.write(info.tobuf())
        for _ in range(200):
            file.write(b"\0" * (1 << 20))
    with pytest.raises(ShardError, match="a bomb, no pictures"):
        list(read_shard(tmp_path / name))


def test_shards_are_told_apart_within_their_set():
    assert shard_ids(["/a/0.tar", "/a/1.tar"]) == shard_ids(["b/0.tar", "b/1.tar"]) == ["0.tar", "1.tar"]
    # Their folders' names are no part of them: both sets may be moved.
    assert shard_ids(["/a/x/0.tar", "/a/y/0.tar"]) == shard_ids(["p/0.tar", "q/0.tar"]) == ["0.tar", "2/0.tar"]
    assert shard_ids([Shard("http://h/0.tar?token=1", "http")]) == ["0.tar"] and shard_ids([]) == []


def test_broken_shards_are_named_together_and_set_aside(tmp_path, caplog):
    """Each start ended at one broken tar."""
    write_shards(tmp_path / "s", [8] * 10, index=False)
    for name in ("00003.tar", "00007.tar"):
        (tmp_path / "s" / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(RunError, match=r"data.max_bad_fraction: 2 of 10 shards .*00003.tar.*00007.tar"):
        loader(tmp_path / "s", tmp_path)
    for _ in range(2):
        made = loader(tmp_path / "s", tmp_path, max_bad_fraction=0.25)
        assert sum(made.counts) == 64 and len(made.shards) == 8
    assert "set aside: 2 of 10 shards" in caplog.text
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["shard"] for entry in entries] == ["00003.tar", "00007.tar"]


def test_what_was_counted_is_not_counted_again(tmp_path, caplog):
    shards = list_shards(str(write_shards(tmp_path / "s", [8, 9], index=False)))
    assert list(count_samples(shards, tmp_path / "c.json").samples.values()) == [8, 9] and "counting" in caplog.text
    caplog.clear()
    assert list(count_samples(shards, tmp_path / "c.json").samples.values()) == [8, 9] and not caplog.text
    write_tar(tmp_path / "s" / "00000.tar", sample("a"))
    assert list(count_samples(shards, tmp_path / "c.json").samples.values()) == [1, 9] and "1 shards" in caplog.text
    (tmp_path / "c.json").write_text("[1")
    assert list(count_samples(shards, tmp_path / "c.json").samples.values()) == [1, 9]


def test_urls_are_counted_by_their_manifest_and_once(tmp_path, caplog):
    """Each tar was downloaded whole, by every rank, at every start."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "s"))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    write_shards(tmp_path / "s", [8, 9])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shards = list_shards(f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar")
    try:
        assert list(count_samples(shards).samples.values()) == [8, 9] and asked == ["/manifest.json"]
        (tmp_path / "s" / "manifest.json").unlink()
        for _ in range(2):
            assert list(count_samples(shards, tmp_path / "c.json").samples.values()) == [8, 9]
        assert [path for path in asked if path.endswith(".tar")] == ["/00000.tar", "/00001.tar"]
    finally:
        server.shutdown()


@pytest.mark.parametrize("change", ["spelled differently", "moved", "a new folder"])
def test_resume_with_damaged_samples_is_exact_wherever_the_shards_lie(tmp_path, change):
    """Quarantine was keyed by path: 0 of 30 losses were equal."""
    for shard in range(3):
        broken = [[(f"{shard}{i:03d}.jpg", b"\xff\xd8 no"), (f"{shard}{i:03d}.json", b"{}")] for i in range(24)]
        members = [m for i in range(24) for m in (sample(f"{shard}{i:03d}", i) if i % 5 else broken[i])]
        write_tar(tmp_path / "s" / f"{shard:05d}.tar", members)
    write_index(tmp_path / "s", [24] * 3)
    whole = list(loader(tmp_path / "s", tmp_path / "run", max_bad_fraction=1.0).epoch(0))
    pattern, run = tmp_path / "s", tmp_path / "run"
    if change == "spelled differently":
        pattern = f"{tmp_path}/./s/../s/{{00000..00002}}.tar"
    elif change == "moved":
        pattern = (tmp_path / "s").rename(tmp_path / "elsewhere")
    else:
        run = tmp_path / "other"
        run.mkdir()
        (run / "quarantine.jsonl").write_bytes((tmp_path / "run" / "quarantine.jsonl").read_bytes())
    for start in (1, 4):
        made = loader(pattern, run, max_bad_fraction=1.0)
        rest = list(made.epoch(0, made.after(start)))
        assert [batch["keys"] for batch in rest] == [batch["keys"] for batch in whole[start:]]


def test_a_damaged_index_is_a_message(tmp_path):
    write_shards(tmp_path, [8])
    (tmp_path / "manifest.json").write_text('{"shards": [')
    with pytest.raises(UserError, match="is not a shard index"):
        loader(tmp_path)
    assert image_of({}) is None
