"""Samples, shards and patterns that can't be used: each is counted by name, and costs only itself."""

import json
import os

import pytest
from shard_files import jpeg, keys, loader, record, sample, write_index, write_shards, write_tar

BROKEN = {
    "damaged image": [("bad.jpg", b"\xff\xd8\xff\xe0 not a picture"), ("bad.json", json.dumps(record("bad")).encode())],
    "no captions": sample("bad", 1, raw_caption=None, longSV_captions="nan"),
    "unreadable captions": [("bad.jpg", jpeg(1)), ("bad.json", b'{"raw_caption": ')],
    "no image": [("bad.json", json.dumps(record("bad")).encode())],
}


POISONED_JSON = {
    "nested a hundred thousand deep": b'{"raw_caption": ' + b"[" * 100_000,
    "no object": b'["a dog", "a cat"]',
    "not UTF-8": b'{"raw_caption": "\xff\xfe"}',
    "cut off": b'{"raw_caption": ',
}


@pytest.mark.parametrize("poison", POISONED_JSON)
def test_poisoned_json_costs_only_its_sample(tmp_path, poison):
    bad = [("bad.jpg", jpeg(1)), ("bad.json", POISONED_JSON[poison])]
    write_tar(tmp_path / "00000.tar", [m for i in range(17) for m in (sample(f"{i:03d}", i) if i != 9 else bad)])
    write_index(tmp_path, [17])
    made = loader(tmp_path)
    assert len(keys(made.epoch(0))) == 16 and made.bad.counts == {"unreadable captions": 1}


@pytest.mark.parametrize("reason", BROKEN)
def test_bad_samples_are_counted_and_named(tmp_path, reason, caplog):
    write_tar(
        tmp_path / "00000.tar", [m for i in range(17) for m in (sample(f"{i:03d}", i) if i != 9 else BROKEN[reason])]
    )
    write_index(tmp_path, [16 if reason == "no image" else 17])  # an index counts images
    made = loader(tmp_path, quarantine=tmp_path / "q.jsonl")
    assert len(keys(made.epoch(0))) == 16
    assert made.bad.counts == {reason: 1}
    assert "00000.tar: bad" in str(made.bad) and "bad" in caplog.text
    assert json.loads((tmp_path / "q.jsonl").read_text())["key"] == "bad"


def test_a_silent_half_shard_is_counted(tmp_path):
    write_shards(tmp_path, [24, 24])
    data = (tmp_path / "00000.tar").read_bytes()
    half = len(data) // 2 // 512 * 512
    (tmp_path / "00000.tar").write_bytes(data[:half] + b"\0" * (len(data) - half))
    made = loader(tmp_path, batch_size=6, max_bad_fraction=1.0)
    list(made.epoch(0))
    assert made.bad.counts["missing from its shard"] >= 10
    assert "00000.tar" in str(made.bad)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", None])
def test_an_unreadable_shard_costs_only_itself(tmp_path, content):
    write_shards(tmp_path, [24, 24])
    data = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(data[: len(data) // 2 + 300] if content is None else content)
    made = loader(tmp_path, max_bad_fraction=1.0)
    assert set(f"{i:06d}" for i in range(24)) <= set(keys(made.epoch(0)))
    assert made.bad.total >= 1 and "00001.tar" in str(made.bad)


def test_too_many_bad_samples_stop_the_run_with_their_names(tmp_path):
    members = [
        m
        for i in range(256)
        for m in (sample(f"{i:03d}", i) if i % 4 else [(f"{i:03d}.jpg", b"x"), (f"{i:03d}.json", b"{}")])
    ]
    write_tar(tmp_path / "00000.tar", members)
    write_index(tmp_path, [256])
    with pytest.raises(
        RuntimeError,
        match=r"data.max_bad_fraction: .* of .* samples could not be used \(limit 5%\): "
        r".* x no captions, such as .*00000.tar",
    ):
        for epoch in range(3):
            list(loader(tmp_path).epoch(epoch))


def test_a_shard_without_any_caption_is_a_clear_error(tmp_path):
    write_tar(
        tmp_path / "00000.tar", [m for i in range(16) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.json", b'{"width": 3}'))]
    )
    write_index(tmp_path, [16])
    with pytest.raises(RuntimeError, match=r"data.shards: no usable sample in .*00000.tar .*: 16 x no captions"):
        list(loader(tmp_path).epoch(0))


def test_without_an_index_the_samples_are_counted_and_it_is_said(tmp_path, caplog):
    write_shards(tmp_path, [12, 13], index=False)
    assert sum(loader(tmp_path).counts) == 25
    assert "prepare validate" in caplog.text
    (tmp_path / "sizes.json").write_text('{"00000.tar": 12, "00001.tar": 13}')
    caplog.clear()
    assert sum(loader(tmp_path).counts) == 25 and not caplog.text


PATTERNS = {
    "": "is empty",
    "nothing/*.tar": "matches no shard",
    "pipe:cat x.tar": "runs a shell command",
    "{folder}/00000.tar::{folder}": "named more than once",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bad_patterns_are_named(tmp_path, pattern):
    write_shards(tmp_path, [8])
    with pytest.raises(ValueError, match="data.shards: .*" + PATTERNS[pattern]):
        loader(pattern.replace("{folder}", str(tmp_path)))


def test_patterns(tmp_path):
    write_shards(tmp_path / "a", [8, 8, 8])
    write_shards(tmp_path / "b", [8])
    pattern = f"{tmp_path}/a/{{00000..00001}}.tar::{tmp_path}/b"
    assert [os.path.relpath(s, tmp_path) for s in loader(pattern).shards] == [
        "a/00000.tar",
        "a/00001.tar",
        "b/00000.tar",
    ]
    piped = loader(f"pipe:cat {tmp_path}/a/00002.tar", allow_pipe=True)
    assert len(keys(piped.epoch(0))) == 8
