"""The first build: killed builders, several processes at once, a compiler that hangs, libraries that are not whole,
folders that take nothing, and the reason of a failure.

Processes are forked: they need not import torch again.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from dreamlip_kernels.backends import first_build

SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&module); }
"""
NAME = "tiny_of_the_first_build"
PATIENCE = 120.0


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    file = tmp_path / "tiny.cpp"
    file.write_text(SOURCE.replace("NAME", NAME))
    return file


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A compiler that notes its process and waits until it may go on, at the latest when the test is over."""
    script = tmp_path / "waiting"
    script.write_text(
        f"""#!/bin/sh
case "$1" in -v|*version) exec c++ "$@";; esac
echo $$ >> {tmp_path}/compilers
while [ ! -e {tmp_path}/go ]; do sleep 0.1; done
exec c++ "$@"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    yield lambda: (tmp_path / "go").touch()
    (tmp_path / "go").touch()


def start(file, log, patience=PATIENCE, compiler=None):
    """A process that builds and writes down what came of it."""

    def run():
        if compiler:
            os.environ["CXX"] = compiler
        try:
            said = f"built {first_build.build(NAME, [str(file)], ['-O0'], patience=patience).__name__}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        log.write_text(said)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def compilers(tmp_path) -> list[int]:
    file = tmp_path / "compilers"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def builder(tmp_path) -> int:
    """The process that is written down as the one that builds."""
    return int((tmp_path / "extensions" / f"{NAME}.lock").read_text().split()[0])


def test_a_killed_build_keeps_nobody_waiting_and_its_compiler_writes_into_nothing_of_ours(source, tmp_path, waiting):
    """torch's mark of a build stayed behind, and every later first use waited for ever, in silence."""
    killed = start(source, tmp_path / "1")
    wait_for(lambda: compilers(tmp_path))
    for pid in (killed.pid, builder(tmp_path)):
        os.kill(pid, signal.SIGKILL)
    killed.join()
    second = start(source, tmp_path / "2", compiler="c++")
    second.join(PATIENCE)
    assert (tmp_path / "2").read_text() == f"built {NAME}"
    (library,) = (tmp_path / "extensions").glob("*.so")
    before = library.read_bytes()
    waiting()  # the compiler that nobody waits for any more goes on, and ends
    wait_for(lambda: not os.path.exists(f"/proc/{compilers(tmp_path)[0]}"))
    assert library.read_bytes() == before and not list((tmp_path / "extensions").glob("*.building"))


def test_a_build_whose_caller_was_killed_ends_well_and_is_waited_for(source, tmp_path, waiting):
    killed = start(source, tmp_path / "1")
    wait_for(lambda: compilers(tmp_path))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    impatient = start(source, tmp_path / "2", patience=0.5)
    impatient.join(PATIENCE)
    said = (tmp_path / "2").read_text()
    assert said.startswith(f"TimeoutError: process {builder(tmp_path)} of ") and f"{tmp_path}" in said
    second = start(source, tmp_path / "3")
    time.sleep(0.5)
    waiting()
    second.join(PATIENCE)
    assert (tmp_path / "3").read_text() == f"built {NAME}"
    assert len(compilers(tmp_path)) == 2, "one compilation and one link: nothing was built twice"


def test_processes_at_once_build_once(source, tmp_path, waiting):
    processes = [start(source, tmp_path / str(i)) for i in range(3)]
    wait_for(lambda: compilers(tmp_path))
    waiting()
    for i, process in enumerate(processes):
        process.join(PATIENCE)
        assert (tmp_path / str(i)).read_text() == f"built {NAME}"
    assert len(compilers(tmp_path)) == 2


def test_a_compiler_that_hangs_is_ended(source, tmp_path, waiting):
    """The caller hung with it."""
    with pytest.raises(TimeoutError, match="the compiler has not come to its end in 8 s"):
        first_build.build(NAME, [str(source)], ["-O0"], patience=8.0)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in compilers(tmp_path)), 10)


def test_libraries_that_are_not_whole_or_do_not_load_are_built_again(source, tmp_path):
    """A library that is cut off ends the process that loads it, by SIGBUS."""

    def build():
        start(source, tmp_path / "log").join(PATIENCE)
        assert (tmp_path / "log").read_text() == f"built {NAME}"
        (library,) = (tmp_path / "extensions").glob("*.so")
        return library

    library = build()
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\0" * len(whole)):
        library.write_bytes(damaged)
        assert build().read_bytes() == whole


def test_folders_that_take_nothing_are_passed_over(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/self/extensions")
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", str(tmp_path / "cache"))
    assert first_build._writable() == tmp_path / "cache"
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", "/dev/null/cache")
    monkeypatch.setattr(first_build.cache, "_temporary", lambda: None)
    with pytest.raises(OSError, match=r"no folder takes .*/proc/self.*/dev/null/cache: Not a directory.*set DREAMLIP"):
        first_build.build(NAME, [str(source)], ["-O0"])


def test_without_a_home_nothing_is_built_below_the_working_directory(tmp_path, monkeypatch):
    """torch's own folder was then `~` below it."""
    for name in ("HOME", "TORCH_EXTENSIONS_DIR", "DREAMLIP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456)
    monkeypatch.chdir(tmp_path)
    assert all(folder.is_absolute() and tmp_path not in folder.parents for folder in first_build.folders())
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("DREAMLIP_CACHE_DIR", "own")
    assert first_build.folders()[0] == tmp_path / "own", "wherever the process goes later"


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
    Path(source).write_text("this is no C++")
    with pytest.raises(RuntimeError, match="error: .*this"):
        first_build.build(NAME, [str(source)], ["-O0"])
