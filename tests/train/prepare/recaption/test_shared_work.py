"""Processes that share shards, and those that are killed: no finished picture is asked for again."""

import errno
import json
import os
import signal
import subprocess
import threading
import time
import uuid

import pytest
from chat_server import ChatServer, through
from shard_files import records
from warm import Command

from dreamlip_train.jobs.work_claims import Claims


def start(shards, output, server) -> Command:
    words = ["recaption", shards, "--output", output, "--model", "served", "--name", "X"]
    printed = output.with_name(f"{uuid.uuid4().hex}.txt")
    return Command([*words, "--endpoint", server.url, "--batch-size", "2"], printed)


def slowly(attempt, image):
    time.sleep(0.15)
    return "ok"


def answered(output) -> int:
    return (
        sum(path.read_text().count("\n") for path in (output / ".recaption").glob("*.jsonl")) if output.exists() else 0
    )


def test_killed_in_the_middle_no_finished_picture_is_asked_for_again(tmp_path, shards):
    with ChatServer(slowly) as server:
        for goal in (5, 13):
            process = start(shards, tmp_path / "out", server)
            while answered(tmp_path / "out") < goal and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        finished = answered(tmp_path / "out")
        asked = server.asked.total()
        counts = through(server, shards, tmp_path / "out", batch_size=4)
    assert counts["captioned"] == 24 - finished and server.asked.total() - asked == 2 * (24 - finished)
    assert len([record for record in records(tmp_path / "out").values() if "longX_captions" in record]) == 24


def test_several_processes_share_the_shards_without_overlap(tmp_path, shards):
    with ChatServer(slowly) as server:
        processes = [start(shards, tmp_path / "out", server) for _ in range(3)]
        codes = [process.wait() for process in processes]
    assert codes == [0, 0, 0], [process.text() for process in processes]
    assert set(server.asked.values()) == {1} and len(records(tmp_path / "out")) == 24
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 24


def test_a_claim_that_a_full_disk_cut_off_is_nobodys(tmp_path, monkeypatch):
    """It stayed empty, and kept the shard from the very command that was given again, for half an hour."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dreamlip_train.jobs.work_claims.json.dump", full)
        with pytest.raises(OSError, match="No space left"):
            Claims(tmp_path, 60.0).take("a")
    assert Claims(tmp_path, 60.0).take("a")


def test_claims_are_exclusive_and_those_of_the_dead_are_free(tmp_path):
    ours, theirs = Claims(tmp_path, 60.0, "here:1"), Claims(tmp_path, 60.0, "there:2")
    assert ours.take("a") and not theirs.take("a")
    ours.release("a")
    assert theirs.take("a") and theirs.take("a") and not ours.take("a")  # a task that is run again finds its own claim
    os.utime(tmp_path / "a.claim", (0, 0))
    assert ours.take("a")  # stale
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert Claims(tmp_path, 60.0, f"{ours.host}:{ended.pid}").take("b") and theirs.take("b")  # its process is gone
    for attempt in range(20):
        winners = []
        Claims(tmp_path, 60.0, "slow:x").take(f"c{attempt}")
        os.utime(tmp_path / f"c{attempt}.claim", (0, 0))

        def rival(number, attempt=attempt, winners=winners):
            if Claims(tmp_path, 60.0, f"rival{number}:x").take(f"c{attempt}"):
                winners.append(number)

        rivals = [threading.Thread(target=rival, args=(number,)) for number in range(8)]
        for thread in rivals:
            thread.start()
        for thread in rivals:
            thread.join()
        assert len(winners) == 1
