"""Run command lines of jaxtrain in one process, each in an environment of its own, or in one of several processes.

    python tests/jaxtrain/run_commands.py CASES.json OUT.json      CASES: {name: {"argv": [...], "environment": {...}}}

With "jax_version" a case believes that this version of JAX is installed. OUT is {name: {"code": ..., "out": ..., "err": ...}}.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import jax
from many import ended

from jaxtrain import cluster
from jaxtrain.cli import main as jaxtrain

# Nobody answers where a case describes a cluster that is not there, and five minutes are long. Processes that are there are waited for.
if cluster._PROCESSES not in os.environ:
    cluster._PATIENCE_SECONDS = 0.2


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        version = case.get("jax_version", jax.__version__)
        with patch.dict("os.environ", case.get("environment", {})), patch("jax.__version__", version):
            found[name] = ended(jaxtrain, case["argv"])
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
