"""What is finished is not made again; what is damaged, cut off or noted otherwise is."""

import json

import pytest

from dreamlip_train.jobs.atomic_file import atomic_write
from dreamlip_train.jobs.atomic_json import parse_json, read_json_lines
from dreamlip_train.jobs.job_folder import finished, make_once


@pytest.fixture
def unit(tmp_path):
    """(file, note, makes): making it appends to ``makes``."""
    makes = []

    def make():
        makes.append(1)
        (tmp_path / "a.tar").write_bytes(b"content")
        return {"samples": 3}

    return tmp_path / "a.tar", tmp_path / "a.json", make, makes


def test_what_is_finished_is_made_once(unit):
    file, note, make, makes = unit
    assert finished(file, note) is None
    assert make_once(file, note, make) == make_once(file, note, make) == {"samples": 3, "bytes": 7}
    assert len(makes) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, note: file.unlink(),
        lambda file, note: file.write_bytes(b"cont"),
        lambda file, note: note.unlink(),
        lambda file, note: note.write_bytes(note.read_bytes()[:9]),
        lambda file, note: note.write_bytes(b""),
        lambda file, note: note.write_text(json.dumps({"entry": {"samples": 3, "bytes": 7}, "counts": {}})),
        lambda file, note: note.write_text("[]"),
    ],
)
def test_what_is_damaged_is_made_again(unit, damage):
    file, note, make, makes = unit
    make_once(file, note, make)
    damage(file, note)
    assert finished(file, note) is None
    assert make_once(file, note, make) == {"samples": 3, "bytes": 7}
    assert len(makes) == 2


def test_nothing_to_write_is_finished_too(tmp_path):
    file, note = tmp_path / "a.tar", tmp_path / "a.json"
    assert make_once(file, note, lambda: {"samples": 0}) == {"samples": 0, "bytes": None}
    assert make_once(file, note, pytest.fail) == {"samples": 0, "bytes": None}


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("ne")
        raise RuntimeError
    with atomic_write(path):
        pass
    assert path.read_text() == "old"
    with atomic_write(path, shared=True) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["a"]


def test_every_fault_of_json_is_a_value_error(tmp_path):
    for text in ("[" * 100_000, b"\xff", "", '{"a": 1'):
        with pytest.raises(ValueError):
            parse_json(text)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n' + b"[" * 100_000 + b'\n{"b": "\xff"}\n{"c": 3}\n{"d": ')
    assert list(read_json_lines(path)) == [{"a": 1}, {"c": 3}]
