"""The report of a run: a progress bar, a line per step, metrics.jsonl, samples.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from trainspec.generation.generation import Generation
from trainspec.runs.clock import table
from trainspec.training.events import Events


@dataclass(frozen=True)
class Speed:
    """What was done in a second of updates, and how much of the time went on waiting for batches.

    `all_tokens_per_second` counts every token but padding, `tokens_per_second` target tokens; `model_tflops_per_second` is that
    of all devices together, by `trainspec.plans.flops`.
    """

    tokens_per_second: float
    all_tokens_per_second: float
    model_tflops_per_second: float
    input_share: float

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} target tokens/s  {self.all_tokens_per_second:,.0f} tokens/s"
            f"  {self.model_tflops_per_second:,.3g} TFLOP/s  input {self.input_share:.1%}"
        )


@dataclass(frozen=True)
class Work:
    """What updates did, in how many seconds, and for how many more their batches were waited for."""

    targets: int = 0
    tokens: int = 0
    operations: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    def speed(self) -> Speed:
        """Per second."""
        return Speed(
            self.targets / self.seconds,
            self.tokens / self.seconds,
            self.operations / self.seconds / 1e12,
            self.waited / (self.waited + self.seconds),
        )


@dataclass(frozen=True)
class StepReport:
    """One update, `step` counted from 1; `loss` is the mean over the batch's target tokens.

    `checkpoint_seconds`: how long the run waited for a checkpoint that was begun after it to have its copy of the state.
    The process's first update has no `speed`: most of its time went on what later ones do not do again.
    """

    step: int
    loss: float
    tokens: int
    grad_norm: float
    lr: float
    seconds: float
    speed: Speed | None = None
    heldout_loss: float | None = None
    checkpoint_seconds: float | None = None

    def values(self) -> dict[str, float]:
        """What there is of it by name, as a line of metrics.jsonl."""
        given = asdict(self)
        speed = given.pop("speed") or {}
        return {name: value for name, value in (given | speed).items() if value is not None}


class Reporter:
    """Shows and records a run; a context manager. `resumed_at` is the last step already made."""

    def __init__(self, out: Path, *, backend: str, steps: int, resumed_at: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        metrics = out / "metrics.jsonl"
        _drop_steps_after(metrics, resumed_at)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._samples = out / "samples.jsonl"
        _drop_steps_after(self._samples, resumed_at)
        self._timings, self._program = out / "timings.json", backend
        self._events = Events(out)
        self._bar = tqdm(
            total=steps,
            initial=resumed_at,
            desc=backend,
            unit="step",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._events.close()
        self._metrics.close()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def step(self, report: StepReport) -> None:
        """Show and record one update."""
        values = report.values()
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if name != "step":
                self._events.scalar(name, value, report.step)
        self._bar.update()
        heldout = "" if report.heldout_loss is None else f"  held-out {report.heldout_loss:.4f}"
        self.say(
            f"step {report.step:>5}  loss {report.loss:.4f}  |g| {report.grad_norm:.3e}  lr {report.lr:.2e}"
            f"  {report.tokens} tokens  {report.speed or f'first update {report.seconds:.2f} s'}{heldout}"
        )

    def samples(self, step: int, generations: Sequence[Generation]) -> None:
        """Record what held-out prompts are answered after an update: the lines of one step are written at once."""
        lines = [
            json.dumps(
                {"step": step, "prompt": made.prompt, "text": made.text, "reference": made.reference},
                ensure_ascii=False,
            )
            for made in generations
        ]
        with self._samples.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        for number, made in enumerate(generations, 1):
            self._events.text(f"samples/{number}", _shown(made), step)

    def timings(self, report: Mapping[str, Any]) -> None:
        """Show and record where the time went."""
        self._timings.write_text(
            json.dumps({"program": self._program} | dict(report), indent=1), encoding="utf-8"
        )
        self.say("\n".join(table(report)))


class NullReporter:
    """The reporter of a process that is not the leader: it shows and records nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        """Do nothing."""

    def step(self, report: StepReport) -> None:
        """Do nothing."""

    def samples(self, step: int, generations: Sequence[Generation]) -> None:
        """Do nothing."""

    def timings(self, report: Mapping[str, Any]) -> None:
        """Do nothing."""


def _shown(made: Generation) -> str:
    """A prompt, its response and its reference as Markdown that shows them as they are."""
    parts = {"prompt": made.prompt, "response": made.text, "reference": made.reference}
    return "\n\n".join(
        "\n".join([f"**{name}**", "", *(f"    {line}" for line in text.split("\n"))])
        for name, text in parts.items()
        if text is not None
    )


def _drop_steps_after(file: Path, step: int) -> None:
    """Drop the lines of the steps that a resumed run repeats."""
    if file.is_file():
        # A killed run may have left half a line at the end.
        *whole, _ = file.read_text(encoding="utf-8").split("\n")
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
