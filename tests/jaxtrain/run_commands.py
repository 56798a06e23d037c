"""Run command lines of jaxtrain in one process, each in an environment of its own, or in one of several processes.

    python tests/jaxtrain/run_commands.py CASES.json OUT.json      CASES: {name: {"argv": [...], "environment": {...}}}

OUT is {name: {"code": ..., "out": ..., "err": ...}}.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jaxtrain import parallel
from jaxtrain.cli import main as jaxtrain

# Nobody answers in these tests, and five minutes are long.
parallel._PATIENCE_SECONDS = 0.2


def ended(argv: list[str], environment: dict[str, str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.dict("os.environ", environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = jaxtrain(argv)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    found = {
        name: ended(case["argv"], case.get("environment", {}))
        for name, case in json.loads(cases.read_text()).items()
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
