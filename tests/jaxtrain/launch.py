"""Start a script of this directory in a process of its own, with fake devices: XLA aborts a process where it fails."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DEVICES = 8


def launch(
    script: str,
    cases: Any,
    scratch: Path,
    *,
    processes: int = 1,
    devices: int = DEVICES,
    timeout: float = 900,
) -> list[Path]:
    """Run `script CASES OUT` in each of `processes`, `devices` in all; the OUT files, in their order."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parent.parent}",
    }
    outs = [scratch / f"out-{i}.npz" for i in range(processes)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for i, out in enumerate(outs):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
        }
        command = [sys.executable, str(HERE / script), str(scratch / "cases.json"), str(out)]
        with out.with_suffix(".err").open("w") as errors:
            process = subprocess.Popen(
                command,
                env=environment | (cluster if processes > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        running.append((process, out.with_suffix(".err")))
    try:
        wait_for_all(running, timeout)
    finally:
        for process, _ in running:
            process.kill()
            process.wait()
    return outs


def wait_for_all(running: list[tuple[subprocess.Popen, Path]], timeout: float) -> None:
    """Until all have ended well, or one badly: the others would wait for it. Shows what it had to say."""
    until = time.monotonic() + timeout
    while any(process.poll() is None for process, _ in running):
        assert not any(process.returncode for process, _ in running), said(running)
        assert time.monotonic() < until, f"not done in {timeout} s: {said(running)}"
        time.sleep(0.05)
    assert not any(process.returncode for process, _ in running), said(running)


def said(running: list[tuple[subprocess.Popen, Path]]) -> str:
    """The end of what each process wrote to stderr, those that ended badly last."""
    worst_last = sorted(running, key=lambda pair: bool(pair[0].returncode))
    return "\n".join(f"{p.args[-1]} {p.returncode}:\n{file.read_text()[-4000:]}" for p, file in worst_last)


class Runs:
    """What `run_plans.py` wrote, by the name of the case."""

    def __init__(self, file: Path) -> None:
        self._arrays = np.load(file)

    def of(self, name: str) -> dict[str, np.ndarray]:
        return {
            k.removeprefix(f"{name}/"): self._arrays[k]
            for k in self._arrays.files
            if k.startswith(f"{name}/")
        }


def worst(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """By kind the largest difference, relative to the largest entry of its tensor; NaN where one is."""
    assert mine.keys() == theirs.keys()
    differences: dict[str, list[float]] = {}
    for key, array in theirs.items():
        if "/" in key:
            size = np.abs(array).max()
            # A tensor of zeros (the gradient of LoRA's A at the start) has nothing to be relative to.
            difference = np.abs(mine[key] - array).max() / (size if size > 0 else 1.0)
            differences.setdefault(key.split("/")[0], []).append(float(difference))
    return {kind: float(np.max(values)) for kind, values in differences.items()}
