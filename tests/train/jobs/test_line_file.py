"""A full disk costs a log no line and a program nothing."""

import resource

import pytest

from dreamlip_train.jobs.line_file import LineFile


@pytest.fixture
def full_disk():
    """Files end at 100 bytes until ``make_room`` is called."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_lines_wait_for_room_and_none_is_lost(tmp_path, full_disk):
    """ENOSPC in metrics.jsonl or log.txt once ended a run."""
    said = []
    file = LineFile(tmp_path / "metrics.jsonl", said.append)
    lines = [f"line {number} " + "x" * 20 for number in range(10)]
    for line in lines[:8]:
        file.write(line)
    assert len(said) == 1 and "metrics.jsonl CAN'T BE WRITTEN" in said[0]
    with pytest.raises(OSError, match="metrics.jsonl"):
        file.require_written()
    full_disk()
    file.require_written()
    file.write(lines[8])
    file.write(lines[9])
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
    assert len(said) == 2 and "is written again, with nothing missing" in said[1]


def test_a_line_that_a_crash_cut_off_gets_its_end(tmp_path):
    (tmp_path / "x").write_text("whole\nhal")
    file = LineFile(tmp_path / "x", print)
    file.write("\ud800 next")
    file.close()
    assert (tmp_path / "x").read_bytes() == b"whole\nhal\n\\ud800 next\n"


def test_a_file_that_cannot_be_made_is_made_when_it_can(tmp_path):
    """A disk without room for a new file's name ended the run, where one without room for its lines did not."""
    said = []
    (tmp_path / "folder").write_text("in the way")
    file = LineFile(tmp_path / "folder" / "x", said.append)
    file.write("one")
    (tmp_path / "folder").unlink()
    file.write("two")
    file.close()
    assert (tmp_path / "folder" / "x").read_text() == "one\ntwo\n" and len(said) == 2
