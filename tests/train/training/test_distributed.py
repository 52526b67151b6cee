"""Which rank of which world a process is: from a launcher, from srun, or alone; contradictions are messages."""

import pytest
from warm import Command

from dreamlip_train.jobs.user_error import UserError
from dreamlip_train.training.distributed import first_host, world_of

SRUN = {
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}


def test_srun_works_out_of_the_box():
    world = world_of(SRUN)
    assert world == {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24711",
    }
    assert world_of(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "5"})["MASTER_ADDR"] == "head"


def test_a_launcher_under_srun_wins():
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert world_of(SRUN | launched) == {}


def test_a_single_process_needs_nothing():
    world = world_of({})
    assert (world["RANK"], world["WORLD_SIZE"], world["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert world_of({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})["WORLD_SIZE"] == "1"


def test_tasks_that_srun_did_not_start_are_not_worlds_of_one():
    """Each once trained by itself into the same run folder, and a checkpoint was lost."""
    with pytest.raises(UserError, match="SLURM_NTASKS=4, but this process was not started by srun"):
        world_of({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert world_of({"SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "1"})["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "a", "WORLD_SIZE": "b"},
    ],
)
def test_half_a_world_is_a_message(environment):
    with pytest.raises(UserError, match="RANK=.*WORLD_SIZE=.*a launcher sets both"):
        world_of(environment)


NUMBERS = [
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_NODEID",
    "MASTER_PORT",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["a", "-1", "1.5", "1(x2)", "²", "9" * 30])
def test_a_variable_that_is_no_number_is_a_message(name, value):
    """A site's own wrapper or a typo ended in int()'s traceback."""
    with pytest.raises(UserError, match=f"{name}"):
        world_of(SRUN | {name: value})


def test_numbers_that_contradict_each_other_are_a_message():
    with pytest.raises(UserError, match="SLURM_PROCID=6, SLURM_STEP_NUM_TASKS=6"):
        world_of(SRUN | {"SLURM_PROCID": "6"})
    with pytest.raises(UserError, match="SLURM_NTASKS: got 'x'"):
        world_of({"SLURM_NTASKS": "x"})
    with pytest.raises(UserError, match="MASTER_PORT: got 70000"):
        world_of({"MASTER_PORT": "70000"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[007-010,12],login1", "gpu007"),
        ("node-a,node-b", "node-a"),
        ("alone", "alone"),
        ("rack1-[3,5].cluster", "rack1-3.cluster"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, host):
    assert first_host(nodes) == host


LATE = """
import socket
from dreamlip_train.training import distributed

free_port, taken = distributed._free_port, socket.create_server(("127.0.0.1", 0))
ports = iter([str(taken.getsockname()[1]), free_port()])
distributed._free_port = lambda: next(ports)
print(distributed.init_distributed())
"""


def test_a_port_that_was_taken_while_deepspeed_was_imported_stops_nobody(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    process = Command([script], tmp_path / "printed.txt")
    assert process.wait() == 0, process.text()[-2000:]
