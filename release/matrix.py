"""The kernels' tests under every version that the metadata promises: ``python release/matrix.py [--torch 2.6 ...]``.

For each Python that this machine has (3.11 and newer), each torch and each numpy that goes with it: an environment of
its own under build/matrix, the package built into it, and the tests of the kernels away from this checkout, so that
what is installed is tested. Prints a Markdown table (docs/versions.md). ``--each-once`` takes as few cells as have each
Python and each torch, instead of all their pairs.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.6", "2.8", "2.10", "newest")
NUMPY = {"2.6": "1.26.*"}  # the oldest torch with the oldest numpy; later ones with numpy 2
TESTS = [
    "contrastive/test_logsumexp.py",
    "contrastive/test_contrastive.py",
    "grouping/test_group_patches.py",
    "grouping/test_grouping.py",
    "sigmoid/test_sigmoid.py",
    "test_losses.py",
    "grouping/test_grouping_triton.py",
    "test_reference.py",
    "test_dispatch.py",
    "distributed/test_distributed.py",
    "distributed/test_agreement.py",
    "distributed/test_distributed_compiled.py",
    "test_extension.py",
]
PACKAGES = ("dreamlip_kernels", "dreamlip_train")
VERSIONS = "platform.python_version(), torch.__version__, numpy.__version__, sep=' | '"


def interpreters(wanted: list[str]) -> dict[str, str]:
    """The path of each wanted Python that is here."""
    paths = {version: shutil.which(f"python{version}") for version in wanted}
    for version in paths:  # pyenv's shims are on the path also where the version is not chosen
        if paths[version] and subprocess.run([paths[version], "--version"], capture_output=True).returncode != 0:
            paths[version] = None
    return {version: path for version, path in paths.items() if path}


def run(words: list[str], log: Path, **options) -> bool:
    """Whether a command succeeded; what it printed is added to ``log``."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, words))}\n")
        file.flush()
        options = {"cwd": ROOT, **options}
        return subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, **options).returncode == 0


def copied(folder: Path) -> Path:
    """What building and testing need of this checkout, without what was built in it for other versions."""
    for name in (*PACKAGES, "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def try_versions(python: str, path: str, torch: str) -> str:
    """One cell of the table."""
    folder = ROOT / "build" / "matrix" / f"py{python}-torch{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, binary = folder / "log.txt", folder / "env" / "bin" / "python"
    numpy = NUMPY.get(torch, "2.*,<2.4")
    pinned = "torch" if torch == "newest" else f"torch=={torch}.*"
    steps = [
        ([path, "-m", "venv", folder / "env"], "no environment"),
        (
            [binary, "-m", "pip", "install", "-q", pinned, f"numpy=={numpy}", "ninja", "setuptools>=77", "wheel"],
            "no torch",
        ),
        ([binary, "-m", "pip", "install", "-q", "pytest", "pytest-timeout", "pytest-xdist"], "no pytest"),
        ([binary, "-m", "pip", "install", "-q", "--no-build-isolation", copied(folder / "source")], "does not build"),
    ]
    environment = os.environ | {"DREAMLIP_NO_CUDA": "1", "DREAMLIP_REQUIRE_EXTENSION": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    for words, failure in steps:
        if not run(words, log, env=environment):
            return f"| {python} | {torch} | {numpy} | {failure} ({log.relative_to(ROOT)}) |"
    for package in PACKAGES:  # the tests shall find what is installed
        shutil.rmtree(folder / "source" / package)
    tests = [f"tests/kernels/{name}" for name in TESTS]
    words = [binary, "-m", "pytest", "-p", "no:cacheprovider", *tests]  # quiet once already: twice says no count
    passed = run(words, log, env=environment, cwd=folder / "source")
    versions = f"import numpy, platform, torch; print({VERSIONS})"
    told = subprocess.run([binary, "-c", versions], env=environment, capture_output=True, text=True).stdout.strip()
    shutil.rmtree(folder / "env")
    shutil.rmtree(folder / "source")
    last = log.read_text().strip().splitlines()[-1]
    return f"| {told} | {last} |" if passed else f"| {told} | FAILED: {last} ({log.relative_to(ROOT)}) |"


def cells(pythons: list[str], torches: list[str], each_once: bool) -> list[tuple[str, str]]:
    """All pairs, or as few as have each Python and each torch: the older with the older."""
    if not each_once:
        return [(python, torch) for python in pythons for torch in torches]
    count = max(len(pythons), len(torches))
    spread = lambda values: [values[i * len(values) // count] for i in range(count)]  # noqa: E731
    return list(zip(spread(pythons), spread(torches), strict=True))


def main() -> None:
    """Parse the arguments, try them all, print the table; exit with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=list(PYTHONS))
    parser.add_argument("--torch", nargs="+", default=list(TORCHES))
    parser.add_argument("--each-once", action="store_true", help="not every pair: each Python and each torch once")
    options = parser.parse_args()
    here = interpreters(options.python)
    if not here:
        parser.exit(1, f"matrix: none of Python {', '.join(options.python)} is on the path\n")
    print("| Python | torch | numpy | result |\n|---|---|---|---|")
    failed = False
    for python, torch in cells(list(here), options.torch, options.each_once):
        row = try_versions(python, here[python], torch)
        failed |= " passed" not in row or "FAILED" in row
        print(row, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
