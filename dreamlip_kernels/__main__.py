"""``python -m dreamlip_kernels explain``, and ``qualify``: which code runs on this machine, and the measurement that
decides it.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .backends.cache import write_file
from .backends.explain import explain, table
from .qualification import qualify
from .qualification.measure import WIDTHS


def main(arguments: list[str] | None = None) -> None:
    """Parse and run a command."""
    parser = argparse.ArgumentParser(prog="python -m dreamlip_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("explain", help="what can run here and why not, and the verdicts on this machine's devices")
    measure = commands.add_parser("qualify", help="test and time every backend on a device, and store the verdict")
    measure.add_argument("--device", help="cpu, cuda or cuda:1; the first CUDA device, or the CPU, by default")
    measure.add_argument(
        "--widths", type=int, nargs="+", default=list(WIDTHS), metavar="D", help="feature widths (%(default)s)"
    )
    measure.add_argument("--tune", action="store_true", help="also look for the fastest tiles of the Triton kernels")
    measure.add_argument(
        "--reuse", action="store_true", help="show the verdict that is there, and measure only without one"
    )
    measure.add_argument("--output", type=Path, metavar="FILE", help="write the verdict into this JSON file as well")
    options = parser.parse_args(arguments)
    if options.command == "explain":
        print(explain())
        return
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        record = qualify(options.device, widths=tuple(options.widths), tune=options.tune, reuse=options.reuse)
        print(table(record))
        if options.output:
            write_file(options.output, record.to_json())
    except (RuntimeError, ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: what is answered so far is kept, and the same command goes on from there\n")


if __name__ == "__main__":
    main()
