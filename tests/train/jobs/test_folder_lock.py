"""Two trainers never share a run folder; a dead one does not keep it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dreamlip_train.jobs import folder_lock
from dreamlip_train.jobs.folder_lock import FolderLock
from dreamlip_train.jobs.user_error import UserError

HOLD = """
import sys, time
from pathlib import Path
from dreamlip_train.jobs.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), "run.lock", "--run-dir") as lock:
    print(lock.taken_over or "held", flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_folder_in_use_is_refused_with_host_and_process(tmp_path):
    process, _ = holder(tmp_path)
    with pytest.raises(UserError, match=rf"--run-dir: .* is in use by process {process.pid} on "):
        FolderLock(tmp_path, "run.lock", "--run-dir").__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with FolderLock(tmp_path, "run.lock", "--run-dir") as lock:
        assert lock.taken_over.startswith(f"process {process.pid} on ")
    with FolderLock(tmp_path, "run.lock", "--run-dir") as lock:
        assert not lock.taken_over, "it was given back"


def test_a_lock_that_does_not_reach_other_hosts_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_SILENT_SECONDS", 1.0)
    (tmp_path / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    beating = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time\nwhile True: os.utime({str(tmp_path / 'run.lock')!r}); time.sleep(0.1)",
        ]
    )
    try:
        time.sleep(0.3)
        with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
            FolderLock(tmp_path, "run.lock", "--run-dir").__enter__()
    finally:
        beating.kill()
        beating.wait()
    with FolderLock(tmp_path, "run.lock", "--run-dir") as lock:
        assert lock.taken_over == "process 7 on elsewhere"
