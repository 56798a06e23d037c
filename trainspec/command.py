"""The command line that both backends share, and how errors are reported. Light: `--help` loads nothing but this.

Exit codes of every program: 0 done, or the verdict is pass; 1 the verdict is fail, or training stopped itself; 2 a
mistake of the user; 3 the machine failed (an OSError, its memory, a device, a driver, the network); 75 training was asked
to stop, by SIGTERM or Ctrl-C, and what it had done is saved, if it had done anything; 130 interrupted, and ended at once; 70 a
mistake of ours, the only one that prints a stack.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import sys
import traceback
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from trainspec.checkpoints.allow import ALLOWABLE
from trainspec.errors import (
    EXIT_CRASHED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    ProcessError,
    nearest,
)
from trainspec.generation.options import add_evaluation, add_generation
from trainspec.runs.stops import listening

# A word that begins with a dash and is no option.
_NUMBER = re.compile(r"-\.?\d")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose errors are one line as every other mistake of a user is; commands below one are of the same kind."""

    def error(self, message: str) -> NoReturn:
        """End the program with the line; the usage, which argparse would print before it, is in `--help`."""
        self.exit(EXIT_USER_ERROR, f"{self.prog.split()[0]}: {message}; see {self.prog} --help\n")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """argparse's, which every parser of a command is called by; an option that it does not know is an error here.

        The first of them is told before anything that is missing: most likely it is the same mistake.
        """
        words = list(sys.argv[1:] if args is None else args)
        if unknown := next(self._unknown(words), None):
            self.error(f"unrecognised option {unknown}{nearest(unknown, self._option_string_actions)}")
        return super().parse_known_args(words, namespace)

    def _unknown(self, words: Sequence[str]) -> Iterator[str]:
        """The words that argparse takes for options, as they begin with a dash, and that are none, nor the beginning of one."""
        for word in words:
            if word == "--" or (self._subparsers and not word.startswith("-")):
                return  # what follows are no options, or those of a command
            if not word.startswith("-") or word == "-" or " " in word or _NUMBER.match(word):
                continue
            name = word.partition("=")[0]
            if not any(option.startswith(name) for option in self._option_string_actions):
                yield name


def add_recipe(parser: ArgumentParser) -> None:
    """RECIPE and `--set KEY=VALUE`, the same for every command."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as configs/demo.yaml")
    add_overrides(parser, "override one setting of the recipe, such as run.steps=10")


def add_overrides(parser: ArgumentParser, help_text: str) -> None:
    """`--set KEY=VALUE`."""
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=f"{help_text}; repeatable"
    )  # fmt: skip


def add_stored_type(parser: ArgumentParser) -> None:
    """`--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16"),
        help="stored type of a whole model (default: as trained; with --merge, as the base model)",
    )


def backend_parser(program: str, *, converts: bool = False) -> ArgumentParser:
    """`PROGRAM train|eval|generate|export RECIPE ...`: the same for jaxtrain and torchtrain; `converts` adds `convert DIR OUT`."""
    parser = ArgumentParser(prog=program)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "train": "train; writes metrics, TensorBoard events and checkpoints under --out",
        "eval": "measure the newest checkpoint under --out and the starting weights on data.heldout: loss, metrics, samples",
        "generate": "write what the newest checkpoint under --out answers to prompts",
        "export": "write the newest checkpoint under --out as a PEFT adapter or a Hugging Face model",
    }
    for name, help_text in helps.items():
        command = commands.add_parser(name, help=help_text)
        add_recipe(command)
        command.add_argument(
            "--out",
            type=directory,
            metavar="DIR",
            help=f"directory of the run (default: runs/RECIPE-{program})",
        )
        match name:
            case "train":
                _add_training(command)
            case "eval":
                add_evaluation(command)
            case "generate":
                add_generation(command)
            case _:
                command.add_argument(
                    "--merge", action="store_true", help="merge the adapter into the model's weights"
                )
                add_stored_type(command)
    if converts:
        command = commands.add_parser(
            "convert", help="write pickled weights (.bin) as safetensors, bit for bit"
        )
        command.add_argument(
            "directory", type=Path, metavar="DIR", help="a model's or an adapter's directory"
        )
        command.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    return parser


def _add_training(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="write a trace for parity: every gradient and update; with --resume from the checkpoint on",
    )
    parser.add_argument(
        "--activations",
        type=_step_or_all,
        metavar="STEP",
        help="with --trace: also activations and their gradients, at this step or at `all`",
    )
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint under --out")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="WHAT",
        help=f"with --resume: what may differ from the checkpoint's recipe: {','.join(ALLOWABLE)}; repeatable",
    )
    parser.add_argument(
        "--timings",
        action="store_true",
        help="print where the time went, to the first update and in the later ones, and write timings.json",
    )


def directory(text: str) -> Path:
    """A directory that is given; an empty text, as of a variable that is not set, is none."""
    if not text:
        raise ArgumentTypeError("no directory is named; give one, or . for the one that you are in")
    return Path(text)


def _step_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a step; give 1 or more, or all")
    return int(text)


def run_command(
    main: Callable[[Namespace], int | None],
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    *,
    tell: Callable[[int, str], None] | None = None,
    is_program: bool | None = None,
) -> int:
    """Parse, run, and turn an error into an exit code and one line.

    The process is this program's (`is_program`; None: where the words are those of its command line) and ends with the code,
    or it may run others.

    The line goes to stderr, after the stack if the mistake is ours. With `tell`, line (without its notes) and code go there
    instead, while the error is still being handled.
    """
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if getattr(args, "command", None) != "train":
            return _written(main(args))
        ends = argv is None if is_program is None else is_program
        # What follows takes seconds before there is a loop that listens.
        with listening(is_last=ends) as args.stopping:
            with args.stopping.held_back():
                import trainspec.failures
                import trainspec.training.request  # noqa: F401 - what `_ended` needs
            return _written(main(args))
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        return _ended(error, args, parser.prog, tell)


def _written(code: int | None) -> int:
    """The exit code of a command, when all that it has printed is written: the interpreter's end would tell an error in its own way."""
    print(end="", flush=True)
    return code or EXIT_DONE


def _ended(
    error: BaseException, args: Namespace, program: str, tell: Callable[[int, str], None] | None
) -> int:
    """Report the error that ended a command, and return the exit code."""
    # Knows recipes and checkpoints, which --help does without.
    from trainspec.failures import notes_of, outcome, saved_in
    from trainspec.training.request import directory_of

    code, line = outcome(error)
    notes = notes_of(error)
    if code == EXIT_STOPPED and not notes:  # while it was loading, or in a process whose launcher adds them
        notes = [saved_in(directory_of(args, program))]
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        # The reader has seen enough, as in `| head`. Without this Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
        if not notes:
            return code
    if tell:
        tell(code, line)
        return code
    if code == EXIT_CRASHED and not isinstance(error, ProcessError):
        traceback.print_exc()
    print("; ".join([f"{program}: {line}", *notes]), file=sys.stderr)
    return code


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
