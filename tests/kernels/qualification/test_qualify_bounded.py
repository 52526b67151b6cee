"""A qualification that is killed keeps what it has, and what it times is bounded."""

import time
from types import SimpleNamespace

import pytest
import torch

from dreamlip_kernels.backends import cache, dispatch, verdicts
from dreamlip_kernels.qualification import journal, measure, worker
from dreamlip_kernels.qualification.cases.case import Speed

CPU = torch.device("cpu")


def test_a_qualification_that_is_killed_goes_on_where_it_was(fakes, monkeypatch):
    """On a GPU of two minutes all was lost at the end of the first one."""
    monkeypatch.setattr(
        dispatch, "_BACKENDS", {"twice": {name: lambda case: None for name in ("torch", "right", "slow")}}
    )
    monkeypatch.setattr(measure, "run_jobs", lambda jobs, *_: [{"sum": 64.0}])  # the probe
    asked = []

    def killed_after(count):
        def run_jobs(jobs, workers, limit_s, progress, finished):
            for job in jobs:
                if len(asked) == count:
                    raise KeyboardInterrupt
                asked.append((job["kind"], job.get("backend", "")))
                finished(job, worker.run(job, lambda name: None))

        return run_jobs

    jobs = [
        ("check", "right"),
        ("check", "slow"),
        ("rates", ""),
        ("time", "torch"),
        ("time", "right"),
        ("time", "slow"),
    ]
    for count in (1, 3):  # in the checks, then between what is timed
        asked.clear()
        monkeypatch.setattr(journal, "run_jobs", killed_after(count))
        with pytest.raises(KeyboardInterrupt):
            measure.qualify("cpu", widths=(8,))
        assert asked == jobs[:count], "correctness of all before any speed"
        assert verdicts.record(CPU) is None, "written whole or not at all"
        jobs = jobs[count:]
    asked.clear()
    monkeypatch.setattr(journal, "run_jobs", killed_after(-1))
    record = measure.qualify("cpu", widths=(8,))
    assert asked == jobs and [v.status for v in record.verdicts] == [
        "qualified",
        "right, not used: slower than torch code",
    ]
    assert not list((fakes / "cache").glob("*unfinished"))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 2, "answers": {}}', '{"format": 1, "answers": 3}', '{"format": 1}']
)
def test_a_journal_that_is_none_is_taken_for_empty(fakes, content):
    place = cache.folders()[0] / "x.unfinished"
    place.parent.mkdir()
    place.write_text(content)
    assert journal.Journal("x").answers == {}


def test_the_time_of_an_op_is_bounded(monkeypatch):
    """Torch code took most of two minutes on an H100: what is slow is timed twice, and larger sizes are left out where
    their turn would take more than what is left.
    """
    calls = []

    def speeds(backend, dtype, device, widths):
        for n in (1, 10, 100):
            for d in widths:
                yield Speed(f"N={n}", d, n, lambda n=n, d=d: lambda: calls.append((n, d)) or time.sleep(0.03 * n), 1, 1)

    monkeypatch.setattr(worker, "SUBJECTS", {"op": SimpleNamespace(speeds=speeds)})
    job = dict(op="op", backend="torch", dtype="float32", widths=[8, 16], budget_s=2.0)
    answer = worker._time(job, CPU, lambda name: None)
    assert [(t["shape"], t["width"]) for t in answer["timings"]] == [("N=1", 8), ("N=1", 16), ("N=10", 8)]
    assert answer["left_out"] == [["N=10", 16], ["N=100", 8], ["N=100", 16]]
    assert calls.count((10, 8)) == 2 and calls.count((1, 8)) > 4
    rates = {"flops": 1.0, "bytes": 1.0}
    mine = [t | {"shape": shape} for t in answer["timings"][:1] for shape in ("N=1", "N=100", "N=1000")]
    kept = measure._against(mine, answer, rates)
    assert [(t.shape, t.torch_ms is None) for t in kept] == [("N=1", False), ("N=1000", True)], (
        "no time is no lack of memory"
    )
