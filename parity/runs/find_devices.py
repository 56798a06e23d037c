"""What a backend finds on this machine. It is a program of its own, as JAX and torch never share a process.

python -m parity.runs.find_devices BACKEND      prints a kind of device and how many, such as ["gpu", 8]
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import cast

from trainspec.backends import BACKENDS
from trainspec.command import ArgumentParser, run_command
from trainspec.contract import Cluster
from trainspec.plans.plan import Backend


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a backend finds; the exit code."""
    parser = ArgumentParser(prog="find_devices")
    parser.add_argument("backend", choices=tuple(BACKENDS))
    return run_command(_tell, parser, argv)


def _tell(args: Namespace) -> None:
    program = BACKENDS[cast(Backend, args.backend)].program
    cluster = cast(Cluster, importlib.import_module(f"{program}.cluster"))
    print(json.dumps(cluster.default_devices()))


if __name__ == "__main__":
    sys.exit(main())
