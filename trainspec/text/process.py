"""The worker process, which imports transformers, seen from a process that does not."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

from trainspec.errors import DataError

# An idle worker is ended after this time; the next request starts another.
_IDLE_SECONDS = 20.0
_END_SECONDS = 2.0
# How long to wait for the exit code of a worker that has closed its output.
_DYING_SECONDS = 30.0


def versions() -> str:
    """The versions of the libraries that determine a text's tokens. Raises DataError where one is missing."""
    try:
        return " ".join(
            f"{name} {metadata.version(name)}"
            for name in ("transformers", "tokenizers", "jinja2", "sentencepiece")
        )
    except metadata.PackageNotFoundError as error:
        raise DataError(
            f"{error.name} is not installed; it reads tokenizers: pip install 'twintrain[tokenizers]'"
        ) from None


def ask(*, online: bool = False, **request: Any) -> Any:
    """The worker's result. Only an `online` request, for a hub id that the user named, may use the network.

    Raises DataError for a user's mistake, OSError where the machine failed.
    """
    return (_online if online else _offline).ask(request)


class _Worker:
    """One worker process, started on the first request and ended when it is idle or this process ends."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            self._stop_timer()
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                raise _ended(self._end(_DYING_SECONDS), request)
            self._timer = threading.Timer(_IDLE_SECONDS, self.close)
            self._timer.daemon = True
            self._timer.start()
        return _result(json.loads(line))

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop_timer()
            self._end()

    def _running(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():  # after a fork the worker is the parent's
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            here = str(Path(__file__).parents[2])
            path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
            # The worker uses no accelerator.
            quiet = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1", "PYTHONPATH": path}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainspec.text.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=os.environ | quiet | self._environment,
            )
        return self._process

    def _end(self, patience: float = _END_SECONDS) -> int | None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:  # it is still busy with an abandoned request
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _ended(code: int | None, request: dict[str, Any]) -> Exception:
    """The error for a worker that is gone: killed by the kernel, or crashed in a library on its input."""
    if code == -signal.SIGABRT and "tokenizer" in request:
        return DataError(
            f"{request['tokenizer']}: the library that reads it crashed; most likely a file of the tokenizer is damaged"
        )
    return OSError(f"the process that tokenises ended with code {code}; most likely it ran out of memory")


def _result(answer: dict[str, Any]) -> Any:
    match answer:
        case {"result": result}:
            return result
        case {"error": line}:
            raise DataError(line)
        case {"os_error": [number, text, filename]}:
            raise OSError(number, text, filename)
        case {"crash": line, "stack": stack}:
            raise RuntimeError(f"the process that tokenises: {line}\n{stack}")
        case other:
            raise AssertionError(f"no answer: {other}")


_offline, _online = _Worker({"HF_HUB_OFFLINE": "1"}), _Worker({})
atexit.register(_offline.close)
atexit.register(_online.close)
