"""The command line: options in, one call of another package, results printed.

What a command needs is imported when it runs, so that --help is quick.
"""

from dreamlip_train.cli.main import main

__all__ = ["main"]
