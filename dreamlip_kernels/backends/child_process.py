"""How this package starts itself in a process of its own: the same Python and package, whatever folder it is in."""

from __future__ import annotations

import os
import sys

PYTHON = [sys.executable, "-P"]  # -P: the folder it starts in has no part in what it imports


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment and path, without a wish to qualify in turn, and with what is ``extra``."""
    path = os.pathsep.join([p or os.getcwd() for p in sys.path])
    return os.environ | {"DREAMLIP_AUTO": "", "PYTHONPATH": path} | (extra or {})
