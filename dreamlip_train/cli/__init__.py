"""The command line: options in, one call of another package, results printed.

What a command needs is imported when it runs, so that --help is quick.
"""

import sys

try:
    from dreamlip_train.cli.main import main
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("dreamlip"):
        raise
    _missing = missing.name

    def main(arguments: list[str] | None = None) -> None:
        """Say which extra the commands need: this install has the kernels alone."""
        sys.exit(
            f"dreamlip-train: {_missing} is not installed: the trainer needs its extra, pip install 'dreamlip[train]'"
        )


__all__ = ["main"]
