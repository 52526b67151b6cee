"""What ends or disturbs a run: kill -9, signals through launchers, a full disk, loss spikes, silence."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shard_files import sample, write_index, write_shards, write_tar
from tiny import clean_environment, tiny_config
from warm import Command, two_ranks

from dreamlip_train.checkpoint.files import complete_checkpoints, newest
from dreamlip_train.config.toml import format_config
from dreamlip_train.training import loop
from dreamlip_train.training.run import train

pytestmark = pytest.mark.usefixtures("undrawn")
SUPPORT = Path(__file__).parents[2] / "support/processes"


def tiny_run(shards: Path, steps: int, every_steps: int = 1000):
    config = tiny_config(steps=steps)
    config.logging.every_steps, config.checkpoint.every_steps = 1, every_steps
    config.data.shards, config.data.num_workers, config.data.num_sub_captions, config.data.shuffle_buffer = (
        str(shards),
        1,
        3,
        10,
    )
    return config


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("kills, data", [(5, "mixture"), pytest.param(20, "one set", marks=pytest.mark.slow)])
def test_killed_again_and_again_the_losses_are_those_of_the_undisturbed_run_to_the_bit(tmp_path, kills, data):
    command = [SUPPORT / "killed.py", tmp_path, kills, time.time_ns(), data]
    process = Command(command, tmp_path / "printed.txt")
    assert process.wait(280) == 0, f"{command}\n{process.text()[-3000:]}"
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert len(facts["whole"]) == facts["steps"] and max(map(len, facts["killed"].values())) > 1, (
        "no step was ever repeated"
    )
    for step, (loss,) in facts["whole"].items():
        assert set(facts["killed"][step]) == {loss}, (command, step)
    assert max(facts["lost"]) <= facts["interval"], (command, facts["lost"])


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Shards, and the words of a run that would take hours and saves rarely."""
    folder = tmp_path_factory.mktemp("signals")
    config = tiny_run(write_shards(folder / "shards", [16, 25, 9, 14]), 100_000)
    (folder / "base.toml").write_text(format_config(config))

    def words(run: Path, *extra: str) -> list[str]:
        return ["dreamlip_train", "train", "demo", "--config", str(folder / "base.toml"), "--run-dir", str(run), *extra]

    return words


def wait_for_step(run: Path, step: int, process: subprocess.Popen | Command) -> None:
    deadline = time.time() + 100
    while time.time() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step:
            return
        time.sleep(0.1)
    printed = process.text() if isinstance(process, Command) else process.communicate(timeout=5)
    raise AssertionError(f"step {step} was not reached: {printed}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_process_group_saves_the_step_and_exits_with_0(long_run, tmp_path, number):
    """To loader workers too, as a terminal sends Ctrl-C and a scheduler SIGTERM. A worker that died of it would take
    the run along.
    """
    process = Command(long_run(tmp_path)[1:], tmp_path / "printed.txt", session=True)
    wait_for_step(tmp_path, 3, process)
    os.killpg(process.pid, number)
    assert process.wait() == 0, process.text()[-2000:]
    step = max(losses(tmp_path))
    assert newest(tmp_path / "checkpoints").name == f"step-{step:08d}"
    assert f"stopped by {number.name} after step {step}, saved as " in (tmp_path / "log.txt").read_text()
    assert f"{number.name}: finishing the step and saving" in process.text()


def test_a_loader_worker_that_the_system_kills_is_an_error_that_says_what_to_do(long_run, tmp_path):
    """As the kernel does when memory runs out. torch's handler raises wherever the training process happens to be."""
    process = Command(long_run(tmp_path)[1:], tmp_path / "printed.txt")
    wait_for_step(tmp_path, 3, process)
    # Again and again: a worker that has handed over the last batch of its epoch is missed by nobody.
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "resource_tracker" not in " ".join(child.cmdline()):
                    child.kill()
        time.sleep(0.2)
    assert process.wait() == 2, process.text()[-2000:]
    assert re.search(
        r"data.num_workers: DataLoader worker (\(pid.*\d+|is gone in the middle of a batch).*lower data.num_workers "
        r"or data.shuffle_buffer",
        process.text(),
    ), process.text()[-2000:]


def assert_saved_by_both(run: Path) -> None:
    step = max(losses(run))
    assert newest(run / "checkpoints").name == f"step-{step:08d}"
    for log in ("log.txt", "logs/rank-0001.txt"):
        assert f"after step {step}, saved as " in (run / log).read_text().splitlines()[-1]


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(long_run, tmp_path):
    """SLURM's SIGUSR1 to a single rank."""
    ranks = two_ranks(long_run(tmp_path, "--deepspeed.zero-stage", "3")[1:], tmp_path)
    wait_for_step(tmp_path, 3, ranks[0])
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.text()[-2000:] for rank in ranks]
    assert_saved_by_both(tmp_path)


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_all_with_a_checkpoint(long_run, tmp_path):
    """SIGTERM to torchrun, which hands it on, and itself ends with an error whatever its ranks do."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = long_run(tmp_path, "--deepspeed.zero-stage", "3")
    process = subprocess.Popen(
        [*launcher, *words], env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(tmp_path, 3, process)
    process.terminate()
    process.communicate(timeout=60)
    assert_saved_by_both(tmp_path)


def at_step(monkeypatch, actions: dict[int, object]) -> None:
    """Call ``actions[n]`` on the result of the n-th training step, which really runs."""
    real, count = loop.train_step, [0]

    def step(*arguments, **named):
        count[0] += 1
        result = real(*arguments, **named)
        action = actions.get(count[0])
        return (action(result) or result) if action else result

    monkeypatch.setattr(loop, "train_step", step)


@pytest.fixture
def small_disk():
    """A function that allows this process no file over so many bytes, until called with None."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (old[0] if size is None else size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, small_disk, capsys):
    """Kept exceptions once kept the files of failed saves open, deleted, until the disk was full of them."""
    kept_open = []

    def make_room(_):
        small_disk(None)
        targets = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        kept_open.extend(target for target in targets if "deleted" in target and str(tmp_path) in target)

    at_step(monkeypatch, {3: lambda _: small_disk(200_000), 5: make_room})
    train(tiny_run(write_shards(tmp_path / "shards", [40]), 6, every_steps=1), tmp_path / "run")
    assert not kept_open
    said = (tmp_path / "run" / "log.txt").read_text()
    for step, kept in ((3, 2), (4, 2)):
        assert (
            f"step-{step:08d} could not be written: rank 0: " in said
            and f"step-{kept:08d} is complete. Training goes on without it" in said
        )
    assert "CHECKPOINT NOT SAVED" in capsys.readouterr().out
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000006",
        "step-00000005",
    ]
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_costs_no_line_of_what_was_left_out(tmp_path, monkeypatch, small_disk):
    """ENOSPC in quarantine.jsonl ended the run; and no checkpoint may be without what a resume of it skips."""
    damaged_shards(tmp_path / "shards")
    config = tiny_run(tmp_path / "shards", 6, every_steps=1)
    config.data.max_bad_fraction = 1.0
    at_step(monkeypatch, {2: lambda _: small_disk(300), 4: lambda _: small_disk(None)})
    train(config, tmp_path / "run")
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "quarantine.jsonl CAN'T BE WRITTEN" in said and "quarantine.jsonl is written again" in said
    noted = [json.loads(line)["key"] for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    train(config, tmp_path / "undisturbed")
    lines = (tmp_path / "undisturbed" / "quarantine.jsonl").read_text().splitlines()
    assert noted == [json.loads(line)["key"] for line in lines] and len(noted) > 8


def damaged_shards(folder: Path) -> Path:
    for shard in range(3):
        write_tar(
            folder / f"{shard:05d}.tar",
            [
                (name, b"\xff\xd8 no" if i % 4 == 0 and name.endswith("jpg") else data)
                for i in range(24)
                for name, data in sample(f"{shard}{i:03d}", i)
            ],
        )
    write_index(folder, [24] * 3)
    return folder


@pytest.mark.parametrize("names", ["one set", "two sets of one name"])
def test_resume_over_damaged_samples_from_moved_shards_in_a_new_folder_is_exact(tmp_path, names):
    """0 of 30 losses were equal: what was left out was known by its path, and by the run folder."""
    before, after = str(damaged_shards(tmp_path / "a" / "s")), str(tmp_path / "b" / "s")
    if names == "two sets of one name":
        before, after = f"{before}::{damaged_shards(tmp_path / 'a' / 't')}", f"{tmp_path / 'b' / 't'}::{after}"
    config = tiny_run(before, 7, every_steps=3)
    config.checkpoint.keep_last = 3
    config.data.max_bad_fraction = 1.0
    train(config, tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "b")
    if names == "two sets of one name":
        (tmp_path / "b" / "s").rename(tmp_path / "b" / "x")  # so that their names change places
        (tmp_path / "b" / "t").rename(tmp_path / "b" / "s")
        (tmp_path / "b" / "x").rename(tmp_path / "b" / "t")
    for step in (6, 7):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    config.data.shards = after
    train(config, tmp_path / "other", start=str(tmp_path / "run"))
    whole = losses(tmp_path / "run")
    assert losses(tmp_path / "other") == {step: whole[step] for step in (4, 5, 6, 7)}


def test_a_run_whose_last_checkpoint_fails_says_so_and_fails(tmp_path, monkeypatch, small_disk):
    at_step(monkeypatch, {4: lambda _: small_disk(200_000)})
    with pytest.raises(
        RuntimeError,
        match="trained to the end at step 4, but that checkpoint could not be written .* the newest is of step 2",
    ):
        train(tiny_run(write_shards(tmp_path / "shards", [40]), 4, every_steps=2), tmp_path / "run")
    small_disk(None)
    assert train(tiny_run(tmp_path / "shards", 4, every_steps=2), tmp_path / "run")["steps"] == 4


def test_minutes_save_too(tmp_path):
    config = tiny_run(write_shards(tmp_path / "shards", [40]), 4, every_steps=1000)
    config.checkpoint.every_minutes = 1e-6
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "log.txt").read_text().count(" saved ") == 4


def test_a_loss_spike_is_reported_with_its_samples(tmp_path, monkeypatch):
    def spike(result):
        result.losses["contrastive_loss"] *= 3

    at_step(monkeypatch, {55: spike, 56: spike})
    train(tiny_run(write_shards(tmp_path / "shards", [40]), 58), tmp_path / "run")
    said = (tmp_path / "run" / "log.txt").read_text()
    assert said.count("loss spike at step") == 1 and "loss spike at step 55: " in said
    spikes = [json.loads(line) for line in (tmp_path / "run" / "spikes.jsonl").read_text().splitlines()]
    assert [spike["step"] for spike in spikes] == [55, 56] and len(spikes[0]["samples"]) == 8
    assert spikes[0]["loss"] > 1.5 * spikes[0]["median"]


def test_a_crash_keeps_its_traceback_in_the_log(tmp_path, monkeypatch):
    def crash(_):
        raise ZeroDivisionError("in the middle")

    at_step(monkeypatch, {2: crash})
    with pytest.raises(ZeroDivisionError):
        train(tiny_run(write_shards(tmp_path / "shards", [40]), 4), tmp_path / "run")
    assert "ZeroDivisionError: in the middle" in (tmp_path / "run" / "log.txt").read_text()
