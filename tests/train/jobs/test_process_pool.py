"""The pool of processes gives everything in order, and ends also where the parent has a signal handler of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import clean_environment

import dreamlip_train
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.user_error import RunError

PARENT_WITH_A_HANDLER = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray leaves it
from dreamlip_train.jobs.atomic_json import write_json
from dreamlip_train.jobs.process_pool import map_bounded
for _ in range(100):
    assert list(map_bounded(abs, range(-6, 0), processes=2)) == [6, 5, 4, 3, 2, 1]
"""


def test_results_come_in_order():
    assert list(map_bounded(lambda n: n * n, iter(range(200)), processes=3)) == [n * n for n in range(200)]


def test_ctrl_c_in_the_middle_of_a_fork_is_not_lost():
    """Python ignores what is raised in the functions that run after a fork: the command went on to its end."""
    interrupts = iter([lambda: os.kill(os.getpid(), signal.SIGINT)])
    os.register_at_fork(after_in_parent=lambda: next(interrupts, lambda: None)())
    with pytest.raises(KeyboardInterrupt):
        list(map_bounded(abs, range(4), processes=1))


def write_often(path):
    for _ in range(200):
        write_json(path, list(range(100)))
    return True


def test_a_json_file_that_several_processes_write_is_whole(tmp_path):
    assert all(map_bounded(write_often, [tmp_path / "x.json"] * 4, processes=4))
    assert json.loads((tmp_path / "x.json").read_text()) == list(range(100)) and len(list(tmp_path.iterdir())) == 1


def test_an_inherited_signal_handler_does_not_keep_the_pool_from_ending():
    subprocess.run([sys.executable, "-c", PARENT_WITH_A_HANDLER], env=clean_environment(), check=True, timeout=60)


def test_an_error_lets_the_others_finish_what_they_have_begun(tmp_path):
    """A pool that is terminated kills its processes, here in the middle of a file."""

    def work(item):
        if item == 1:
            time.sleep(0.2)
            raise OSError("full")
        (tmp_path / f"{item}.begun").touch()
        time.sleep(0.6)
        (tmp_path / f"{item}.done").touch()

    with pytest.raises(OSError, match="full"):
        list(map_bounded(work, range(100), processes=3))
    begun, done = ({path.stem for path in tmp_path.glob(f"*.{kind}")} for kind in ("begun", "done"))
    assert begun == done and 2 <= len(done) < 12, "queued items are not begun any more"


def test_a_killed_worker_is_named_with_what_it_was_at():
    """multiprocessing.Pool never notices, and the map waited for ever."""

    def work(task):
        if task[1] == "00003.tar":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return task[0]

    results = []
    began = time.monotonic()
    with pytest.raises(RunError, match=r"a worker process died.*00003\.tar"):
        for result in map_bounded(work, ((i, f"{i:05d}.tar") for i in range(50)), processes=2):
            results.append(result)
    assert time.monotonic() - began < 20 and results == list(range(len(results)))


def test_workers_end_with_a_killed_parent(tmp_path):
    script = f"""
import os, time
from dreamlip_train.jobs.process_pool import map_bounded
from dreamlip_train.jobs.user_error import RunError
def work(item):
    open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
    time.sleep(60)
list(map_bounded(work, range(2), processes=2))
"""
    parent = subprocess.Popen([sys.executable, "-c", script], env=clean_environment())
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.2)
    assert len(workers) == 2


def test_no_other_pool_is_used():
    """multiprocessing.Pool never notices that one of its processes was killed; `prepare scenes` waited for ever."""
    package = Path(dreamlip_train.__file__).parent
    assert not [path for path in package.rglob("*.py") if re.search(r"\bPool\(", path.read_text())]
