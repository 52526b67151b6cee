"""The first build: killed builders, several processes and threads, a timeout, and the reason of a failure."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamlip_kernels.backends import first_build

SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&module); }
"""
CODE = """
import sys, time
from dreamlip_kernels.backends import first_build
print("start", flush=True)
print(first_build.build("NAME", [sys.argv[1]], ["-O0"], patience=float(sys.argv[2])).__name__, flush=True)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    file = tmp_path / "tiny.cpp"
    file.write_text(SOURCE.replace("NAME", f"tiny_{tmp_path.name}".replace("-", "_")))
    return file, f"tiny_{tmp_path.name}".replace("-", "_")


def start(file, name, patience=120.0, **environment):
    words = [sys.executable, "-c", CODE.replace("NAME", name), str(file), str(patience)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen(words, env=os.environ | environment, **options)


def slow_compiler(tmp_path) -> str:
    """A compiler that takes two minutes for every file."""
    script = tmp_path / "slow"
    script.write_text('#!/bin/sh\ncase "$*" in *--version*|*-v*) ;; *) sleep 120;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script)


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_killed_build_keeps_nobody_waiting(source, tmp_path):
    """torch's mark of a build, the file `lock`, stayed behind, and every later first use waited for ever,
    in silence.
    """
    file, name = source
    killed = start(file, name, CXX=slow_compiler(tmp_path))
    marks = lambda: list((tmp_path / "extensions").rglob("lock"))  # noqa: E731
    wait_for(marks)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert marks(), "the mark of the killed build is there"
    out, err = start(file, name).communicate(timeout=200)
    assert out.split() == ["start", name], err


def test_who_waits_too_long_is_told_for_whom(source, tmp_path):
    file, name = source
    building = start(file, name, CXX=slow_compiler(tmp_path))
    try:
        wait_for(lambda: list((tmp_path / "extensions").rglob("lock")))
        out, err = start(file, name, patience=1.0).communicate(timeout=100)
        assert f"TimeoutError: process {building.pid} has been building in {tmp_path}" in err and out == "start\n"
    finally:
        os.killpg(building.pid, signal.SIGKILL)
        building.communicate()


def test_processes_at_once_build_once(source, tmp_path):
    file, name = source
    log = tmp_path / "log"
    script = tmp_path / "counting"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-c*) echo x >> {log};; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    for process in [start(file, name, CXX=str(script)) for _ in range(3)]:
        out, err = process.communicate(timeout=200)
        assert out.split() == ["start", name], err
    assert len(log.read_text().split()) == 1


@pytest.mark.parametrize(
    "output, line",
    [
        (
            "Error building extension 'x': [1/2] c++ -c a.cpp\na.cpp:3:1: error: expected ';'\n1 error\nninja: "
            "build stopped.",
            "a.cpp:3:1: error: expected ';'",
        ),
        ("a.cpp:1:10: fatal error: torch/all.h: No such file\nninja: build stopped.", None),
        ("ninja: build stopped: subcommand failed.", "ninja: build stopped: subcommand failed."),
        ("", "no message"),
    ],
)
def test_the_reason_is_the_compilers(output, line):
    assert first_build.error_line(output) == (line or output.splitlines()[0])


def test_a_source_that_does_not_compile_says_why(source):
    file, name = source
    Path(file).write_text("this is no C++")
    with pytest.raises(RuntimeError, match="error: .*this"):
        first_build.build(name, [str(file)], ["-O0"])
