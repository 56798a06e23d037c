"""Run a backend with a mistake planted in it, to show that a check catches it.

    python -m parity.runs.plant CASES.json RESULTS.jsonl

A mistake is an edit of a module while it is loaded (`parity.runs.edit`): the product contains none of it, and an edit
that no longer fits is an error. Many cases run in one process: the backend's own modules are loaded anew for each, its
framework once.

CASES is a list of {"program": "jaxtrain", "argv": [...], "edits": [{"at": ..., "pattern": ..., "replacement": ...}]}.
RESULTS gets a line {"case": ..., "code": ..., "out": ..., "err": ..., "at": ...} when a case has ended. If torch's
launcher has started several processes the first writes it, and the others write RESULTS.1, ... for a case that failed in
them. A failed case ends the launch, as the processes would otherwise wait for each other forever.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from parity.runs.edit import Edit, edited

CRASHED = 70
LEADER_SECONDS = 10.0
# Packages that are loaded anew for each case, as it may have edited them.
OWN = ("trainspec", "jaxtrain", "torchtrain", "parity.faults.substitutes")
# But for what holds the process that tokenises, which takes seconds to start, and the errors that it raises.
KEPT = ("trainspec.text.process", "trainspec.errors")


class _EditedLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(fullname, path)
        self._edits = edits

    def get_code(self, fullname: str) -> CodeType:
        tree = edited(self.get_data(self.path).decode(), self._edits)
        return compile(tree, self.path, "exec", dont_inherit=True)


class _EditedFinder(MetaPathFinder):
    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        mine = [edit for edit in self._edits if edit.module == fullname]
        spec = PathFinder.find_spec(fullname, path, target) if mine else None
        if spec is None or spec.origin is None:
            return None
        spec.loader = _EditedLoader(fullname, spec.origin, mine)
        return spec


@contextlib.contextmanager
def planted(edits: Sequence[Edit]) -> Any:
    """Within it, modules of `OWN` are loaded anew with `edits` applied; afterwards they are forgotten."""
    edited_of_kept = {edit.module for edit in edits} & set(KEPT)
    assert not edited_of_kept, f"{edited_of_kept} are loaded once, and cannot be edited"
    _forget()
    finder = _EditedFinder(edits)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()


def _forget() -> None:
    own = tuple(f"{package}." for package in OWN)
    for name in [name for name in sys.modules if f"{name}.".startswith(own) and name not in KEPT]:
        del sys.modules[name]


def run_case(program: str, argv: Sequence[str], edits: Sequence[Edit]) -> dict[str, Any]:
    """The exit code and the output of one command line. A crash has code 70 and its traceback."""
    out, err = io.StringIO(), io.StringIO()
    with planted(edits), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(f"{program}.cli").main(list(argv))
        except SystemExit as stop:
            code = stop.code
        except Exception:
            traceback.print_exc()
            code = CRASHED
        unloaded = [edit.module for edit in edits if edit.module not in sys.modules]
        if unloaded and code != CRASHED:  # an edit of a module that is never loaded plants nothing
            print(f"{unloaded[0]} was not loaded, so nothing was planted", file=err)
            code = CRASHED
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main() -> None:
    """Run every case of CASES and write its result to RESULTS."""
    cases, results = map(Path, sys.argv[1:])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = results if rank == 0 else results.with_name(f"{results.name}.{rank}")
    for number, case in enumerate(json.loads(cases.read_text(encoding="utf-8"))):
        ended = run_case(case["program"], case["argv"], [Edit(**edit) for edit in case["edits"]])
        if rank == 0 or ended["code"]:
            with mine.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": number, "at": time.time(), **ended}) + "\n")
        if ended["code"] and processes > 1:
            _wait_for_the_leader(results, number)
            os._exit(1)  # a regular exit would wait for stuck processes


def _end_with(parent: int) -> None:
    """Exit when the launcher is killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _wait_for_the_leader(results: Path, number: int) -> None:
    """Give the first process time to report a case that failed in all of them."""
    until = time.monotonic() + LEADER_SECONDS
    while time.monotonic() < until:
        lines = results.read_text(encoding="utf-8").count("\n") if results.exists() else 0
        if lines > number:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main()
