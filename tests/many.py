"""Run many command lines of one program in one process: imports and compilations are paid once.

    python tests/many.py PROGRAM CASES.json RESULTS.json      CASES: [[word, ...], ...]

RESULTS is [{"code": ..., "out": ..., "err": ...}, ...].
"""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_many(
    program: str, cases: list[list[str]], scratch: Path, *, timeout: float = 900
) -> list[dict[str, Any]]:
    """Called by tests: each case's exit code and what it printed."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, __file__, program, str(scratch / "cases.json"), str(scratch / "results.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((scratch / "results.json").read_text())


def ended(command_line: Callable[[list[str]], int | str | None], argv: list[str]) -> dict[str, Any]:
    """The exit code of one command line, run in this process, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command_line(argv)
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    program, cases, results = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    command_line = importlib.import_module(f"{program}.cli").main
    found = [ended(command_line, argv) for argv in json.loads(Path(cases).read_text())]
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
