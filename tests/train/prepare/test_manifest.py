"""prepare validate writes what the loader reads: counts, captions, and everything that is wrong."""

import json

import pytest
from shard_files import jpeg, record, sample, tokenize, write_shards, write_tar

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.prepare.validate import validate_shards


def count_tokens(text):
    return len(text.split()) + 2


def test_validate_indexes_existing_shards_without_touching_them(tmp_path):
    img2dataset = [m for i in range(6) for m in sample(f"{i}", i, **record(f"{i}"), url="http://x", status="success")]
    flair = [m for i in range(6, 10) for m in sample(f"{i}", i, longSV_captions=["One.", "Two.", "Three."])]
    open_clip = [m for i in range(10, 14) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"a dog"))]
    for n, content in enumerate((img2dataset, flair, open_clip)):
        write_tar(tmp_path / f"{n:05d}.tar", content)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.tar")}
    manifest = validate_shards(str(tmp_path), count_tokens=count_tokens)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.tar")} == before
    assert manifest["samples"] == 14 and list(manifest["bad"]) == ["lists and strings in one column"]
    assert [entry["samples"] for entry in manifest["shards"].values()] == [6, 4, 4]
    assert (
        manifest["captions"]["longSV_captions"]["samples"] == 10
        and manifest["captions"]["raw_caption"]["samples"] == 10
    )
    assert json.loads((tmp_path / "manifest.json").read_text())["samples"] == 14


def test_validate_names_what_a_trainer_would_trip_over(tmp_path):
    content = [
        *sample("good", 1),
        *sample("chars", 2, raw_caption="x", longSV_captions=list("A dog runs")),
        ("broken.jpg", b"\xff\xd8 x"),
        ("broken.json", b'{"raw_caption": "a"}'),
        ("json.jpg", jpeg(3)),
        ("json.json", b"{"),
        *sample("empty", 4, raw_caption=""),
        ("alone.json", b"{}"),
        *sample("good", 5),
    ]
    write_tar(tmp_path / "a.tar", content)
    write_tar(tmp_path / "b.tar", sample("good", 1))
    (tmp_path / "c.tar").write_text("<html>404</html>")
    manifest = validate_shards(str(tmp_path))
    assert manifest["samples"] == 4
    for reason, name in {
        "caption stored as characters": "chars: longSV_captions",
        "damaged image": "broken",
        "unreadable captions": "json",
        "no captions": "empty",
        "no image": "alone",
        "duplicate key": "good~2",
        "duplicate sample": "good",
        "shard could not be read to its end": "c.tar",
    }.items():
        entry = manifest["bad"][reason]
        assert entry["count"] == 1 and name in entry["examples"][0], reason


def test_validate_without_a_usable_sample_is_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", sample("k", 0, width=3))
    with pytest.raises(ValueError, match="no sample of .* is usable: 1 x no captions"):
        validate_shards(str(tmp_path))
    with pytest.raises(ValueError, match="PATTERN: .* matches no shard"):
        validate_shards(str(tmp_path / "none*.tar"))


def test_the_loader_takes_its_counts_from_the_manifest(tmp_path, caplog):
    write_shards(tmp_path, [8, 8], index=False)
    validate_shards(str(tmp_path))
    made = train_loader(DataConfig(shards=str(tmp_path), num_workers=0), image_size=16, tokenize=tokenize, batch_size=4)
    assert made.counts == [8, 8] and made.steps_per_epoch == 4 and not caplog.text
