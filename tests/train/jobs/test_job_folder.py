"""What a command that fails leaves of its claim on the output folder."""

import pytest

from dreamlip_train.jobs.job_folder import job_folder
from dreamlip_train.jobs.user_error import UserError

WRONG, RIGHT = {"model": "servde"}, {"model": "served"}


def fail(output, work=lambda state: None, error=UserError, shared=True):
    with pytest.raises(error), job_folder(output, ".job", WRONG, "work of another job", shared=shared) as state:
        (state / "00000.tar.jsonl").touch()
        work(state)
        raise error("no such model")


def claim_of_another(state):
    (state / "claims").mkdir()
    (state / "claims" / "00001.tar").write_text('{"owner": "other:7"}')


def test_a_shared_job_that_nobody_has_begun_gives_way_to_the_corrected_one(tmp_path):
    fail(tmp_path)
    with job_folder(tmp_path, ".job", RIGHT, "work of another job", shared=True) as state:
        assert [path.name for path in state.iterdir()] == ["job.json"]


@pytest.mark.parametrize(
    "work, error",
    [
        (lambda state: (state / "00000.tar.jsonl").write_text("{}\n"), UserError),  # an answer
        (claim_of_another, UserError),  # a process that is at one
        (lambda state: (state.parent / "00000.tar").touch(), UserError),
        (lambda state: None, KeyboardInterrupt),  # says nothing of the job: others may begin with it
    ],
)
def test_a_shared_job_that_may_go_on_keeps_its_folder(tmp_path, work, error):
    fail(tmp_path, work, error)
    with (
        pytest.raises(UserError, match="--output: .* holds work of another job"),
        job_folder(tmp_path, ".job", RIGHT, "work of another job", shared=True),
    ):
        pass


def test_notes_of_a_job_that_failed_are_not_taken_for_those_of_the_corrected_one(tmp_path):
    fail(tmp_path, lambda state: (state / "0.json").write_text("{}"), shared=False)
    with job_folder(tmp_path, ".job", RIGHT, "work of another job") as state:
        assert {path.name for path in state.iterdir()} == {"job.json", "writing.lock"}
