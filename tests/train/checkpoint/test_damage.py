"""A damaged or incomplete checkpoint is never used and never passed over in silence."""

import gc
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from tiny import tiny_config, tiny_engine

from dreamlip_train.checkpoint.files import MANIFEST, MANIFEST_DIGEST, complete_checkpoints, find_checkpoint, problem_of
from dreamlip_train.checkpoint.ranks import SaveError, deaths_told_afterwards
from dreamlip_train.checkpoint.resume import restore_quarantine, starting_point
from dreamlip_train.checkpoint.saving import save
from dreamlip_train.checkpoint.state import TrainState
from dreamlip_train.jobs.user_error import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with the checkpoints of steps 2 and 4."""
    run, config = tmp_path_factory.mktemp("run"), tiny_config()
    engine = tiny_engine(config)
    (run / "quarantine.jsonl").write_text('{"shard": "a.tar", "key": "1"}\n')
    for step in (2, 4):
        save(engine, run / "checkpoints", config, TrainState(step=step))
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def resigned(checkpoint, content):
    (checkpoint / MANIFEST).write_bytes(content)
    (checkpoint / MANIFEST_DIGEST).write_text(hashlib.sha256(content).hexdigest())


DAMAGE = {
    "manifest missing": lambda c: (c / MANIFEST).unlink(),
    "manifest empty": lambda c: (c / MANIFEST).write_text(""),
    "manifest another object": lambda c: (c / MANIFEST).write_text("[]"),
    "hash of the manifest missing": lambda c: (c / MANIFEST_DIGEST).unlink(),
    "hash of the manifest cut": lambda c: (c / MANIFEST_DIGEST).write_text("ab"),
    "manifest of the other step": lambda c: [
        shutil.copy(c.parent / "step-00000002" / name, c / name) for name in (MANIFEST, MANIFEST_DIGEST)
    ],
    "file missing": lambda c: (c / "config.toml").unlink(),
    "file cut": lambda c: cut(c / "mp_rank_00_model_states.pt"),
    "a file more": lambda c: shutil.copy(c / "mp_rank_00_model_states.pt", c / "mp_rank_01_model_states.pt"),
    "another manifest with its hash": lambda c: resigned(c, b'{"step": 4, "files": ["a"]}'),
    "a manifest of less": lambda c: resigned(c, b'{"step": 4, "files": {}}'),
    "no manifest with its hash": lambda c: resigned(c, b"[" * 100_000),
    "everything missing": lambda c: [shutil.rmtree(c), c.mkdir()],
    "a file in its place": lambda c: [shutil.rmtree(c), c.write_text("x")],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_whole_is_named_and_put_aside(run, kind, caplog):
    """15 of 16 kinds once fell back in silence."""
    checkpoint = run / "checkpoints" / "step-00000004"
    DAMAGE[kind](checkpoint)
    assert starting_point(run, "auto").name == "step-00000002"
    assert f"CHECKPOINT DAMAGED: {checkpoint}: " in caplog.text and "put aside as step-00000004.damaged" in caplog.text
    assert not checkpoint.exists() and (run / "checkpoints" / "step-00000004.damaged").exists()


@pytest.mark.parametrize("name", ["step-4", "step-00000004 (copy)", "step-00000004.damaged", "step-00000003"])
def test_an_evaluation_says_which_checkpoints_it_passes_over(run, caplog, name):
    """Folders of other names were passed over in silence, and an earlier checkpoint was evaluated."""
    (run / "checkpoints" / "step-00000004").rename(run / "checkpoints" / name)
    assert find_checkpoint(run).name == "step-00000002"
    assert f"CHECKPOINT NOT WHOLE: {run / 'checkpoints' / name}: " in caplog.text


def test_every_flipped_bit_of_a_manifest_is_noticed(saved, tmp_path):
    """Of 250 flips 29 were accepted, and 11 ended in a traceback."""
    checkpoint = shutil.copytree(saved / "checkpoints" / "step-00000004", tmp_path / "step-00000004")
    content, rng = (checkpoint / MANIFEST).read_bytes(), random.Random(0)
    for bit in rng.sample(range(8 * len(content)), 500):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (checkpoint / MANIFEST).write_bytes(flipped)
        assert "is not what was written" in problem_of(checkpoint)
    (checkpoint / MANIFEST).write_bytes(content)
    assert problem_of(checkpoint) is None


def test_a_run_whose_only_checkpoints_are_damaged_does_not_start_over_by_itself(run):
    """A lone damaged one once restarted at step 0 with exit code 0."""
    (run / "metrics.jsonl").write_text('{"step": 4}\n')
    for name in ("step-00000002", "step-00000004"):
        cut(run / "checkpoints" / name / "config.toml")
    for _ in range(2):  # the second time everything is put aside already
        with pytest.raises(UserError, match="--resume: .* had checkpoints, and none is whole now.*--resume never"):
            starting_point(run, "auto")
    assert starting_point(run, "never") is None
    assert not (run / "metrics.jsonl").exists() and (run / "metrics-1.jsonl").read_text() == '{"step": 4}\n'


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(run):
    checkpoint = run / "checkpoints" / "step-00000004"
    (checkpoint / MANIFEST_DIGEST).unlink()
    (checkpoint / MANIFEST).write_text('{"format": 2, "step": 4, "files": {}}')
    with pytest.raises(UserError, match="step-00000004 was written by an earlier version of this trainer"):
        starting_point(run, "auto")
    assert checkpoint.is_dir()


def test_the_quarantine_travels_with_the_checkpoint(run, tmp_path):
    """--resume RUN into a new folder once trained on other data: no sample was known to be bad there."""
    other = tmp_path / "other"
    (other).mkdir()
    (other / "quarantine.jsonl").write_text('{"shard": "b.tar", "key": "2"}\n')
    for _ in range(2):
        restore_quarantine(starting_point(run, "auto"), other)
    assert (other / "quarantine.jsonl").read_text().splitlines() == [
        '{"shard": "b.tar", "key": "2"}',
        '{"shard": "a.tar", "key": "1"}',
    ]


def test_the_last_checkpoint_before_skipped_steps_is_kept(tmp_path):
    """Rotation dropped it: of three checkpoints saved while every step was skipped none was worth resuming."""
    config = tiny_config()
    engine = tiny_engine(config)
    for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
        save(engine, tmp_path / "checkpoints", config, TrainState(step=step, skipped_in_a_row=skipped))
    assert [path.name[-1] for path in complete_checkpoints(tmp_path / "checkpoints")] == ["5", "4", "2"]
    save(engine, tmp_path / "checkpoints", config, TrainState(step=6))
    assert [path.name[-1] for path in complete_checkpoints(tmp_path / "checkpoints")] == ["6", "5"]


def test_failed_saves_leave_no_deleted_file_open(tmp_path):
    """A kept exception kept its frames and their files: each failed save took the disk space that it could not use."""
    config = tiny_config()
    engine = tiny_engine(config)
    gc.collect()
    gc.disable()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        for _ in range(3):
            with pytest.raises(SaveError):
                save(engine, tmp_path / "checkpoints", config, TrainState(step=2))
        targets = [
            os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{name}")
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        gc.enable()
    assert not [target for target in targets if str(tmp_path) in target]


def test_a_childs_death_interrupts_no_save_and_is_told_after_it():
    """torch raises wherever the main thread is: in a save that was called CHECKPOINT NOT SAVED ... make room."""

    def raise_of_worker(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, raise_of_worker)
    finished = []
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"), deaths_told_afterwards():
            subprocess.run([sys.executable, "-c", ""])
            finished.append(True)
        assert finished and signal.getsignal(signal.SIGCHLD) is raise_of_worker
    finally:
        signal.signal(signal.SIGCHLD, before)
