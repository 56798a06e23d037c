"""Kill runs at random moments and continue them: what is saved is whole, little is lost, and the end is the same, bit by bit.

    python scripts/kill_campaign.py OUT --program torchtrain --kills 100 --stops 50 [--processes 2] [--seed 0]

A run of the demo's model is continued with --resume until it is done; then another begins. A kill (SIGKILL) is of all of a
run's processes or, where there are several, by turns of one alone; every second one waits until a checkpoint is being
written. A stop is SIGTERM: by turns while the run loads and compiles, while it saves, and around an evaluation. Prints what was
seen, as JSON, which is in OUT/seen.json from the first one on; the exit code is 1 if anything was not as it has to be. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trainspec.checkpoints import folders
from trainspec.checkpoints.verify import damages
from trainspec.errors import EXIT_DONE, EXIT_MACHINE, EXIT_STOPPED

ROOT = Path(__file__).parent.parent
EVERY, EVALUATED, STEPS = 3, 4, 24
SETTINGS = (
    "data.sequence_tokens=64", "batch.global_examples=4", "precision.policy=fp64", "precision.reduce=fp64",
    f"checkpoint.every_steps={EVERY}", f"run.steps={STEPS}", f"run.eval_every_steps={EVALUATED}", "schedule.warmup_steps=2",
)  # fmt: skip
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
# Far more than a start and all updates take on a busy machine.
PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.001


@dataclass
class Seen:
    """What a campaign has seen; `wrong` are the things that must not be."""

    counts: Counter[str] = field(default_factory=Counter)
    most: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def at_most(self, name: str, value: float) -> None:
        """Note a value of which the largest is of interest."""
        self.most[name] = max(value, self.most.get(name, 0.0))

    def check(self, is_right: bool, what: str) -> None:
        """Note what is wrong."""
        if not is_right:
            self.wrong.append(what)
            print(f"wrong: {what}", file=sys.stderr, flush=True)


@dataclass
class Victim:
    """A run in a directory, started as a user starts it, and the lines that it has printed."""

    process: subprocess.Popen[str]
    out: Path
    lines: list[str] = field(default_factory=list)

    def steps(self) -> int:
        """The number of updates it has reported."""
        return sum(line.startswith("step ") for line in self.lines)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return when it is so, or when the run has ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None and not is_so():
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{self.out}: nothing in {PATIENCE_SECONDS:.0f} s; it printed {self.lines[-3:]}"
                )
            time.sleep(POLL_SECONDS)

    def end(self) -> str:
        """Wait for its end; what it wrote to stderr."""
        assert self.process.stderr is not None
        told = self.process.stderr.read()
        self.process.wait(PATIENCE_SECONDS)
        return told


def start(program: str, out: Path, processes: int) -> Victim:
    """Start or continue the run in `out`."""
    settings = [*SETTINGS, f"plan.data={processes}"]
    resume = ["--resume"] if folders.latest(out) else []
    process = subprocess.Popen(
        [sys.executable, "-m", program, "train", "configs/demo.yaml", "--out", str(out), *resume,
         *(word for setting in settings for word in ("--set", setting))],
        cwd=ROOT, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    victim = Victim(process, out)
    assert process.stdout is not None
    threading.Thread(
        target=lambda stream: victim.lines.extend(stream), args=(process.stdout,), daemon=True
    ).start()
    return victim


def told(seen: Seen) -> str:
    """All of it, as JSON."""
    return json.dumps({"counts": seen.counts, "most": seen.most, "wrong": seen.wrong}, indent=1)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def digests(out: Path) -> dict[str, str]:
    """Of the last checkpoint's arrays, and of the losses of all updates."""
    last = folders.latest(out)
    assert last is not None
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found | {"losses": json.dumps([(row["step"], row["loss"]) for row in rows])}


def is_saving(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folders.checkpoints_of(out).glob(".step-*.tmp"))


class Campaign:
    """Runs one program again and again in `home`, each time to be ended by `end`."""

    def __init__(self, program: str, home: Path, *, processes: int, seed: int) -> None:
        self._program, self._home, self._processes = program, home, processes
        self._random, self._chains = random.Random(seed), 0
        self.seen = Seen()
        whole = self._new()
        victim = start(program, whole, processes)
        line = victim.end()
        if victim.process.returncode != EXIT_DONE:
            raise RuntimeError(f"the undisturbed run ended with {victim.process.returncode}: {line}")
        self._wanted = digests(whole)

    def run(self, times: int, end: Callable[[Victim, int], None]) -> None:
        """End runs until that many have been; each is continued to its end."""
        done = 0
        while done < times:
            out, is_done = self._new(), False
            while not is_done:
                before = self._newest(out)
                victim = start(self._program, out, self._processes)
                if done < times:
                    end(victim, done)
                line = victim.end()
                while children_of(victim.process.pid):
                    time.sleep(0.01)
                is_done = victim.process.returncode == EXIT_DONE
                if not is_done and done < times:
                    done += 1
                self._look(victim, before, line)
                (self._home / "seen.json").write_text(told(self.seen) + "\n")
            self._compare(out)

    def kill(self, victim: Victim, number: int) -> None:
        """Kill the run, or one of its processes, at a random moment; every second time while it saves."""
        after = self._random.randrange(0, STEPS // 4)
        victim.wait_until(lambda: victim.steps() >= after)
        if number % 2 == 0:
            victim.wait_until(lambda: is_saving(victim.out))
        time.sleep(self._random.random() * (0.01 if number % 2 == 0 else 0.2))
        children = children_of(victim.process.pid) if self._processes > 1 else []
        in_save = is_saving(victim.out)
        if children and number % 4 >= 2:
            began = time.monotonic()
            try:
                os.kill(self._random.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                return
            victim.wait_until(lambda: False)
            self.seen.at_most(
                "seconds until the others of a killed process have ended", time.monotonic() - began
            )
            if victim.process.returncode == EXIT_DONE:
                return
            self.seen.check(victim.process.returncode == EXIT_MACHINE, f"code {victim.process.returncode}")
            self.seen.counts["kills of one process"] += 1
        elif victim.process.poll() is None:
            victim.process.kill()
            self.seen.counts["kills of all"] += 1
        else:
            return
        self.seen.counts["kills inside a save"] += in_save

    def stop(self, victim: Victim, number: int) -> None:
        """Send SIGTERM after the first line, by turns before the first update, inside a save, and before or in an evaluation."""
        began, before = time.monotonic(), self._newest(victim.out)
        after = 0 if number % 3 == 0 else self._random.randrange(1, STEPS // 4)
        victim.wait_until(lambda: bool(victim.lines) and victim.steps() >= after)
        match number % 3:
            case 0:  # after that data and weights are read, and programs are compiled
                until = time.monotonic() + self._random.random() * (time.monotonic() - began) / 2
                victim.wait_until(lambda: victim.steps() > 0 or time.monotonic() > until)
            case 1:
                victim.wait_until(lambda: is_saving(victim.out))
                time.sleep(self._random.random() * 0.01)
            case _:
                victim.wait_until(lambda: (before + victim.steps()) % EVALUATED == EVALUATED - 1)
                time.sleep(self._random.random() * 0.2)
        if victim.process.poll() is not None:
            return
        in_save = is_saving(victim.out)
        where = "before the first update" if not victim.steps() else "later"
        began = time.monotonic()
        victim.process.terminate()
        victim.wait_until(lambda: False)
        self.seen.at_most("seconds from SIGTERM to the end", time.monotonic() - began)
        if victim.process.returncode == EXIT_DONE:  # it was in its last update, or was ending
            return
        self.seen.counts[f"stops {where}"] += 1
        self.seen.check(
            victim.process.returncode == EXIT_STOPPED, f"SIGTERM: code {victim.process.returncode}"
        )
        self.seen.counts["stops inside a save"] += in_save
        metrics = victim.out / "metrics.jsonl"
        rows = list(map(json.loads, metrics.read_text().splitlines())) if metrics.exists() else []
        made = len(rows)
        is_due = made > before and made % EVALUATED == 0
        self.seen.counts["stops before or in an evaluation"] += is_due and "heldout_loss" not in rows[-1]
        self.seen.check(
            self._newest(victim.out) == made, f"SIGTERM after {made}: saved {self._newest(victim.out)}"
        )
        self.seen.counts["stopped and saved"] += 1

    def _look(self, victim: Victim, before: int, line: str) -> None:
        """What a run that has ended leaves, and what it said when it was continued."""
        resumed = [int(line.split()[3]) for line in victim.lines if line.startswith("resuming after step ")]
        if resumed:
            self.seen.counts["continued"] += 1
            self.seen.check(resumed == [before], f"continued from {resumed}, there was {before}")
        for path in folders.complete(victim.out):
            self.seen.check(not damages(path), f"{path}: {damages(path)}")
        made = max([before, *(int(line.split()[1]) for line in victim.lines if line.startswith("step "))])
        lost = made - self._newest(victim.out)
        self.seen.at_most("updates lost", lost)
        # Those since the last one that is complete: one is being written while the updates to the next are made.
        self.seen.check(lost <= 2 * EVERY, f"{lost} updates lost")
        code = victim.process.returncode
        if code not in (EXIT_DONE, -signal.SIGKILL):
            self.seen.check(line.count("\n") == 1, f"code {code}, and not one line: {line!r}")

    def _compare(self, out: Path) -> None:
        """A run that is done is the undisturbed one, and has left nothing besides."""
        self.seen.counts["runs continued to their end"] += 1
        self.seen.check(digests(out) == self._wanted, f"{out}: not the undisturbed run")
        left = [path.name for path in folders.checkpoints_of(out).iterdir() if path.name.startswith(".")]
        self.seen.check(not left, f"{out}: left {left}")
        self.seen.check(len(folders.complete(out)) <= 2, f"{out}: {len(folders.complete(out))} checkpoints")
        shutil.rmtree(out)

    def _newest(self, out: Path) -> int:
        newest = folders.latest(out)
        return int(newest.name.removeprefix("step-")) if newest else 0

    def _new(self) -> Path:
        self._chains += 1
        out = self._home / f"run-{self._chains}"
        shutil.rmtree(out, ignore_errors=True)
        return out


def main() -> int:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--program", choices=("jaxtrain", "torchtrain"), required=True)
    parser.add_argument(
        "--processes", type=int, default=1, help="devices; torchtrain starts a process for each"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    campaign = Campaign(args.program, args.out, processes=args.processes, seed=args.seed)
    campaign.run(args.kills, campaign.kill)
    campaign.run(args.stops, campaign.stop)
    seen = campaign.seen
    print(told(seen))
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
