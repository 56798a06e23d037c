"""What is to be generated, and what the options of `generate` are on a command line."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from trainspec.errors import DataError, UserError
from trainspec.generation.choice import GREEDY, Sampling


@dataclass(frozen=True)
class Settings:
    """How responses are made and end, whatever the prompts.

    `batch`: prompts at once. `caches`: whether keys and values are kept, where the plan can. `scores`: whether the logits of each
    token are reported.
    """

    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    batch: int = 8
    caches: bool = True
    scores: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts, as texts or the records of a `file`, and how their responses are made.

    `out` is the run's directory: its newest checkpoint is read, and `generations.jsonl` is written there. `untrained`: the
    starting weights answer, and no checkpoint is read.
    """

    out: Path
    texts: tuple[str, ...]
    file: Path | None
    settings: Settings
    untrained: bool = False

    @property
    def trained_in(self) -> Path | None:
        """Where the checkpoint is that is read."""
        return None if self.untrained else self.out

    @property
    def streams(self) -> bool:
        """Whether the response is shown while it is made: that of one prompt."""
        return len(self.texts) == 1


def generation_request(args: Namespace, out: Path) -> GenerationRequest:
    """The request that the options of `generate` make. Raises UserError."""
    texts = (args.prompt,) if args.prompt is not None else ()
    how = replace(settings(args), scores=args.scores)
    return GenerationRequest(out, texts, prompt_file(args), how, args.untrained)


def prompt_file(args: Namespace) -> Path | None:
    """What `--file` names. Raises DataError where that is no file."""
    if args.file is not None and not args.file.is_file():
        what = "is a directory" if args.file.is_dir() else "no such file"
        raise DataError(f"--file {args.file}: {what}; give records, one in each line")
    return args.file


def settings(args: Namespace) -> Settings:
    """The settings that the options of `generate` and `eval` make. Raises UserError."""
    for name in ("max_tokens", "batch"):
        value = getattr(args, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if any(not text for text in args.stop):
        raise UserError("--stop '': would stop at once; give a text")
    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed
    )
    return Settings(args.max_tokens, tuple(args.stop), sampling, args.batch, caches=not args.no_cache)
