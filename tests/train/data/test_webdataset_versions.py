"""The trainer reads shards with the oldest webdataset that it promises too, which open_clip's training extra pins."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import clean_environment

ROOT = Path(__file__).parents[3]
TESTS = ("tests/train/data/test_shards.py", "tests/train/data/test_loader.py", "tests/security/test_shard_names.py")


def oldest() -> str:
    """The lower bound in the metadata."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    return re.search(r"webdataset>=([\d.]+)", " ".join(extra))[1]


@pytest.mark.slow
def test_shards_are_read_with_the_oldest_webdataset(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*pip, f"webdataset=={oldest()}"], capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"no webdataset {oldest()} to be had: {installed.stderr.strip()[-200:]}")
    environment = clean_environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    taken = [sys.executable, "-c", "import importlib.metadata as m; print(m.version('webdataset'))"]
    version = subprocess.run(taken, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert version.stdout.strip() == oldest()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
