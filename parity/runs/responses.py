"""The two sides of `parity generate`, each a program of its own that answers the same prompts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parity.runs.programs import Launcher
from parity.runs.sides import Side, as_options, failure_of, precision_settings
from trainspec.backends import BACKENDS
from trainspec.checkpoints.folders import checkpoints_of, latest
from trainspec.errors import EXIT_DONE, DataError, UserError
from trainspec.generation.generation import Generation, read_generations
from trainspec.generation.loop import FILE
from trainspec.plans.names import DeviceKind, Policy
from trainspec.recipe import Data
from trainspec.text.files import read_raw
from trainspec.text.records import BadRecord

# Prompts of the recipe's own data, where none are given; of plain text so many characters each.
OWN_PROMPTS, TEXT_CHARACTERS = 8, 120


@dataclass(frozen=True)
class SideGeneration:
    """A side and what it generates, under `out`/`name`. `start` is the directory of a run whose newest checkpoint answers.

    `words` are those of its command line that say what is generated, and how.
    """

    side: Side
    name: str
    recipe: Path
    overrides: Sequence[str]
    precision: Policy
    words: Sequence[str]
    out: Path
    start: Path | None = None
    launcher: Launcher = field(default_factory=Launcher)
    device: DeviceKind = "cpu"

    def run(self) -> list[Generation]:
        """The responses. Raises UserError, naming the side, for a user's mistake and a crash, MachineError for a failed machine."""
        home = self.out / self.name
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        if self.start:
            link_newest(self.start, home / "run")
        program, log = BACKENDS[self.side.backend].program, home / "log.txt"
        command = [sys.executable, "-m", program, *self._arguments(home / "run")]
        code, last = self.launcher.run(self.name, command, log=log, device=self.device)
        if code != EXIT_DONE:
            said = last.removeprefix(f"{program}: ")
            raise failure_of(f"{self.name} ({self.side})", code, said, log=log)
        return read_generations(home / "run" / FILE)

    def _arguments(self, out: Path) -> list[str]:
        settings = [*self.overrides, *self.side.overrides, *precision_settings(self.precision)]
        words = ["generate", str(self.recipe), *as_options(settings)]
        start = [] if self.start else ["--untrained"]
        return [*words, "--out", str(out), "--scores", *start, *self.words]


def newest_of(start: Path) -> Path:
    """The newest checkpoint of the run in `start`. Raises UserError where there is none."""
    newest = latest(start)
    if newest is None:
        raise UserError(
            f"--from {start}: has no checkpoint; give the --out directory of a run that saved one"
        )
    return newest


def link_newest(start: Path, out: Path) -> None:
    """Have `out` hold the newest checkpoint of the run in `start` as its own. Raises UserError where there is none."""
    saved, checkpoints = newest_of(start), checkpoints_of(out)
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / saved.name).symlink_to(saved.absolute(), target_is_directory=True)
    recipe = start / "recipe.yaml"  # which an error about another recipe names
    if recipe.is_file():
        (out / recipe.name).symlink_to(recipe.absolute())


def write_own_prompts(data: Data, out: Path, count: int = OWN_PROMPTS) -> tuple[Path, str]:
    """A file of prompts, the first records of the recipe's held-out data, else of its training data, and what to call them.

    Of plain text a prompt is the beginning of a document. Raises DataError.
    """
    source = data.heldout or data.train
    records = []
    for raw in read_raw(source):
        try:
            records.append(_beginning(raw.value()) if data.task == "text" else raw.value())
        except BadRecord as error:
            raise DataError(f"{source} {raw.where}: {error}") from None
        if len(records) == count:
            break
    if not records:
        raise DataError(f"{source}: has no record to make a prompt of; give --prompt or --file")
    path = out / "prompts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_lines(records)), encoding="utf-8")
    whose = "held-out" if data.heldout else "training"
    return path, f"the first {len(records)} records of the {whose} data, {source}"


def count_records(file: Path) -> int:
    """How many records a file has, be they what they may; 0 for one that cannot be read, of which a side says why."""
    try:
        return sum(1 for _ in read_raw(str(file)))
    except (DataError, OSError):
        return 0


def _beginning(record: object) -> object:
    """A document of plain text, cut."""
    if isinstance(record, dict):
        cut = {name: v[:TEXT_CHARACTERS] if isinstance(v, str) else v for name, v in record.items()}
        return cut
    return {"text": record[:TEXT_CHARACTERS]} if isinstance(record, str) else record


def _lines(records: Sequence[object]) -> Iterator[str]:
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
