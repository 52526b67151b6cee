"""An install of the kernels alone has the command, which names the extra it needs."""

import subprocess
import sys

CODE = """
import sys
sys.modules["tyro"] = None  # as if it were not installed
from dreamlip_train.cli import main
main(["doctor"])
"""


def test_a_missing_dependency_is_named_with_its_extra():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "tyro is not installed" in done.stderr and "pip install 'dreamlip[train]'" in done.stderr
