"""Run by test_faults.py: a run killed with SIGKILL at random moments and started again each time,
against the run that nobody disturbed.

The parent imports everything and computes nothing, so that each start is a fork and takes a second instead of ten.
Usage: killed.py FOLDER KILLS SEED "mixture"|"one set"
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401
import open_clip  # noqa: F401
import torch
from shard_files import write_shards
from tiny import tiny_config

import dreamlip_train.reporting.curves
import dreamlip_train.reporting.grouping_figure  # noqa: F401
from dreamlip_train.checkpoint.files import complete_checkpoints
from dreamlip_train.training.run import train

INTERVAL = 2


def start(shards: Path, run: Path, steps: int) -> int:
    """The process of a run that begins or goes on."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    config = tiny_config()
    config.checkpoint.every_steps, config.logging.every_steps = INTERVAL, 1
    config.train.steps = steps
    config.data.num_workers, config.data.num_sub_captions, config.data.shuffle_buffer = 1, 3, 10
    if sys.argv[4] == "mixture":
        config.data.mixture = {"small": str(shards / "0000[02].tar"), "large": str(shards / "0000[13].tar")}
        config.data.proportions = {"small": 2.0, "large": 1.0}
    else:
        config.data.shards = str(shards)
    with (run.parent / f"{run.name}.out").open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    code = 1
    try:
        train(config, run)
        code = 0
    finally:
        os._exit(code)


def losses(run: Path) -> dict[int, list[float]]:
    """Every loss logged for each step, in the order of logging."""
    found: dict[int, list[float]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the kill cut it off
            continue
        found.setdefault(row["step"], []).append(row["loss"])
    return found


def newest_step(run: Path) -> int:
    return max((int(path.name[-8:]) for path in complete_checkpoints(run / "checkpoints")), default=0)


folder, kills = Path(sys.argv[1]), int(sys.argv[2])
steps = 3 * kills + 6
shards = write_shards(folder / "shards", [16, 25, 9, 14])
assert os.waitstatus_to_exitcode(os.waitpid(start(shards, folder / "whole", steps), 0)[1]) == 0, (
    folder / "whole.out"
).read_text()[-3000:]
rng, run, lost = random.Random(int(sys.argv[3])), folder / "killed", []
for number in range(kills):
    reached = max(losses(run), default=0)
    child = start(shards, run, steps)
    target, moment = reached + rng.randrange(0, 4), rng.uniform(0.0, 0.4)
    if number == kills - 1:  # at once after an odd step, which no checkpoint has: it at least is repeated
        target, moment = reached + 1 + reached % 2, 0.0
    deadline = time.time() + 60
    while max(losses(run), default=0) < target and time.time() < deadline:
        time.sleep(0.002)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lost.append(max(losses(run), default=0) - newest_step(run))
assert os.waitstatus_to_exitcode(os.waitpid(start(shards, run, steps), 0)[1]) == 0, (folder / "killed.out").read_text()[
    -3000:
]
(folder / "facts.json").write_text(
    json.dumps(
        {"whole": losses(folder / "whole"), "killed": losses(run), "lost": lost, "steps": steps, "interval": INTERVAL}
    )
)
