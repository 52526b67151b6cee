"""prepare validate and stats: findings with examples and an exit code, repaired copies, and the numbers of a user's own
captions.
"""

import hashlib
import json
import resource
from collections import Counter

import pytest
from PIL import Image
from shard_files import jpeg, records, sample, write_shards, write_tar

from dreamlip_train import cli
from dreamlip_train.captions.statistics import percentile
from dreamlip_train.data.shards.shards import read_shard
from dreamlip_train.jobs.user_error import RunError, UserError
from dreamlip_train.prepare.validate import validate_shards
from dreamlip_train.reporting.caption_histograms import caption_histograms, format_histograms


def write(path, samples):
    """samples: (key, image bytes or None, json content)."""
    members = []
    for key, image, record in samples:
        members += [(f"{key}.jpg", image)] if image is not None else []
        members.append((f"{key}.json", record if isinstance(record, bytes) else json.dumps(record).encode()))
    write_tar(path, members)


@pytest.fixture
def dirty(tmp_path):
    folder = tmp_path / "in"
    good = {"raw_caption": "a dog", "longSV_captions": "One. Two."}
    write(
        folder / "00000.tar",
        [
            ("a", jpeg(0, 300), good),
            ("b", jpeg(1, 300), good | {"longSV_captions": list("It is split.")}),
            ("c", jpeg(2, 300), good | {"longSV_captions": ["One.", "Two."]}),
            ("d", jpeg(3, 300), good | {"raw_caption": None, "shortIB_captions": "nan"}),
            ("e", jpeg(4, 100), good),
            ("f", b"\xff\xd8 no picture", good),
        ],
    )
    write(
        folder / "00001.tar",
        [
            ("a", jpeg(5, 300), good),  # its key is in the shard before, its picture is not
            ("c", jpeg(2, 300), good | {"longSV_captions": ["One.", "Two."]}),  # the same sample
            ("g", None, good),
            ("h", jpeg(6, 300), b'{"raw_caption": '),
            ("i", jpeg(7, 300), {"url": "no captions"}),
            ("j", jpeg(8, 300), good),
            ("k", jpeg(9, 300), good),
            ("j", jpeg(9, 300), good),
            ("k", jpeg(9, 300), good),
        ],
    )
    return folder


EXPECTED = {
    "caption stored as characters": 1,
    "lists and strings in one column": 1,
    "empty raw_caption": 1,
    "empty shortIB_captions": 1,
    "image smaller than 224 pixels": 1,
    "damaged image": 1,
    "duplicate key": 2,
    "duplicate sample": 2,
    "no image": 1,
    "unreadable captions": 1,
    "no captions": 1,
}


def test_everything_a_trainer_would_trip_over_is_found(dirty, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "validate", str(dirty)])
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    manifest = json.loads((dirty / "manifest.json").read_text())
    for reason, count in EXPECTED.items():
        assert f"{count} x {reason}" in printed, printed
    assert "00001.tar: c: also in" in printed and "100 x 100" in printed and "longSV_captions: 2 lists, " in printed
    assert {name: entry["samples"] for name, entry in manifest["shards"].items()} == {"00000.tar": 6, "00001.tar": 8}


def test_three_examples_are_shown(tmp_path, capsys):
    write(tmp_path / "00000.tar", [(str(i), jpeg(i, 300) if i > 5 else b"x", {"raw_caption": "a"}) for i in range(9)])
    with pytest.raises(SystemExit):
        cli.main(["prepare", "validate", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "damaged image" in line)
    assert "6 x damaged image" in line and line.count("00000.tar: ") == 3


def test_sound_shards_exit_with_0(tmp_path, capsys):
    write(tmp_path / "00000.tar", [("a", jpeg(0, 300), {"raw_caption": "a dog"})])
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "validate", str(tmp_path)])
    assert ended.value.code == 0


def test_fix_writes_copies_that_are_sound_and_leaves_the_originals(dirty, tmp_path):
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dirty.glob("*.tar")}
    with pytest.raises(SystemExit):
        cli.main(["prepare", "validate", str(dirty), "--fix", str(tmp_path / "out")])
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dirty.glob("*.tar")}
    found = [s for name in sorted(before) for s in read_shard(str(tmp_path / "out" / name))]
    assert [s["key"] for s in found] == ["a", "b", "c", "d", "e", "a", "j", "k", "j~2"]
    assert [s["jpg"] for s in found[5:]] == [jpeg(5, 300), jpeg(8, 300), jpeg(9, 300), jpeg(9, 300)]
    found = {s["key"]: json.loads(s["json"]) for s in found}
    assert found["b"]["longSV_captions"] == "It is split." and found["d"] == {"longSV_captions": "One. Two."}
    again = validate_shards(str(tmp_path / "out"), index=False)
    assert set(again["bad"]) == {"lists and strings in one column"}  # both are read: nothing to repair
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 9


def test_fix_into_the_same_folder_is_refused(dirty):
    with pytest.raises(ValueError, match="--fix: .* is the folder of the shards"):
        validate_shards(str(dirty), fix=str(dirty))


def count_tokens(text):
    return len(text.split()) + 2


def test_stats_count_sub_captions_and_tokens_by_source(tmp_path, capsys):
    for shard in range(3):
        members = []
        for i in range(4):
            long = " ".join(f"This is sentence {j}." for j in range(i + 1))
            members += sample(
                f"{shard}{i}", i, raw_caption="a dog", longSV_captions=long, longMine_captions=["one two", "three"]
            )
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    found = caption_histograms(str(tmp_path), count_tokens)
    assert list(found) == ["raw_caption", "longSV_captions", "longMine_captions"]
    assert found["longSV_captions"]["sub_captions"] == {1: 3, 2: 3, 3: 3, 4: 3}
    assert found["longSV_captions"]["sub_caption_tokens"] == {6: 30} and found["longSV_captions"]["tokens"] == {
        6: 3,
        10: 3,
        14: 3,
        18: 3,
    }
    assert found["longMine_captions"]["sub_caption_tokens"] == {4: 12, 3: 12}
    one = caption_histograms(str(tmp_path), count_tokens, max_shards=1)
    assert one["raw_caption"]["sub_captions"].total() == 4
    cli.main(["prepare", "stats", str(tmp_path), "--output", str(tmp_path / "c.png")])
    printed = capsys.readouterr().out
    assert (
        "longSV_captions" in printed
        and "2.50" in printed
        and "longer than 77 tokens" in printed
        and "bucket" not in printed
    )
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_the_share_that_is_cut_follows_the_lengths():
    lengths = Counter({length: 1 for length in range(3, 103)})
    histograms = {"raw_caption": {"sub_captions": Counter({1: 100}), "tokens": lengths, "sub_caption_tokens": lengths}}
    assert percentile(lengths, 50) == 52 and percentile(lengths, 99) == 101
    assert (
        "25.00% of the sub-captions are longer than 77 tokens, the context of CLIP, and are cut"
        in format_histograms(histograms)
    )


def test_stats_without_captions_say_so(tmp_path):
    write(tmp_path / "00000.tar", [("a", jpeg(0), {"url": "x"})])
    with pytest.raises(ValueError, match="PATTERN: no sample of .* has a caption"):
        caption_histograms(str(tmp_path), count_tokens)


def test_two_sets_may_count_their_keys_from_the_same_number(tmp_path):
    """Keys were once taken as unique over everything named: the second set's samples all were "duplicates"."""
    for name in ("cc3m", "cc12m"):
        write(tmp_path / name / "00000.tar", [("000000000", jpeg(1), {"raw_caption": f"a dog in {name}"})])
    both = f"{tmp_path / 'cc3m'}::{tmp_path / 'cc12m'}"
    checked = validate_shards(both)
    assert checked["samples"] == 2 and not checked["bad"] and len(checked["shards"]) == 2
    with pytest.raises(UserError, match="PATTERN: two shards are both called '00000.tar' .*--fix the folders one"):
        validate_shards(both, fix=str(tmp_path / "fixed"))
    (tmp_path / "cc12m" / "00000.tar").rename(tmp_path / "cc12m" / "00001.tar")
    validate_shards(both, fix=str(tmp_path / "fixed"))
    (tmp_path / "cc3m" / "00000.tar").rename(tmp_path / "cc12m" / "00000.tar")
    assert not validate_shards(str(tmp_path / "cc12m"))["bad"], "in one folder too"
    for folder in ("fixed", "cc12m"):
        keys = [s["key"] for i in range(2) for s in read_shard(str(tmp_path / folder / f"0000{i}.tar"))]
        assert keys == ["000000000", "000000000"]


def test_a_folder_that_cannot_be_written_does_not_cost_the_findings(tmp_path, capsys):
    write(tmp_path / "00000.tar", [("a", jpeg(1), {"raw_caption": "a dog"}), ("b", b"no image", {"raw_caption": "x"})])
    (tmp_path / "manifest.json").mkdir()
    checked = validate_shards(str(tmp_path / "*.tar"))
    assert checked["samples"] == 1 and "damaged image" in checked["bad"]
    assert "no manifest.json in" in capsys.readouterr().err


def test_a_column_of_the_users_own_is_a_caption(tmp_path):
    """After `recaption --name Qwen` on shards without raw captions everything was once unusable."""
    write(tmp_path / "00000.tar", [("a", jpeg(1), {"url": "u", "longQwen_captions": "A dog runs. It is red."})])
    checked = validate_shards(str(tmp_path), fix=str(tmp_path / "fixed"))
    assert checked["samples"] == 1 and not checked["bad"] and (tmp_path / "fixed" / "00000.tar").is_file()


def test_captions_that_were_written_as_text_are_said(tmp_path, capsys):
    captions = {"raw_caption": "b'A dog.'", "longSV_captions": "['A dog.', 'It runs.']", "longIB_captions": "{'a': 1}"}
    write(tmp_path / "0.tar", [("a", jpeg(1, 300), captions)])
    checked = validate_shards(str(tmp_path))
    found = checked["bad"]["caption that was a list or bytes, written as text"]
    assert found["count"] == 3 and checked["captions"]["longSV_captions"]["sentences_mean"] == 2.0
    assert "longIB_captions" not in checked["captions"]


def test_a_full_disk_under_stats_names_the_figure_and_leaves_none(tmp_path, capsys):
    """A limit of a file's size ended in a traceback."""
    shards, old = write_shards(tmp_path / "s", [8]), resource.getrlimit(resource.RLIMIT_FSIZE)
    figure = tmp_path / "o.png"
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(["prepare", "stats", str(shards), "--output", str(figure)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert end.value.code == 2 and not list(tmp_path.glob("o.png*"))
    assert f"{figure}: [Errno" in (message := capsys.readouterr().err) and "make room" in message


def test_a_full_disk_under_fix_names_what_to_do_and_the_same_command_goes_on(tmp_path):
    """It said "[Errno 28] No space left on device", and nothing else."""
    shards, old = write_shards(tmp_path / "s", [30, 30]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(RunError, match=r"--fix: .*GB free\).*make room and give the same command again"):
            validate_shards(str(shards), fix=str(tmp_path / "fixed"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list((tmp_path / "fixed").glob("*.tar"))
    validate_shards(str(shards), fix=str(tmp_path / "fixed"))
    assert records(tmp_path / "fixed") == records(shards)
