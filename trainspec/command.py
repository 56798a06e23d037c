"""The command line that both backends share, and what a person sees of an error."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from trainspec.errors import NonFiniteLossError, UserError
from trainspec.trace import TraceRequest

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2
EXIT_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def add_recipe(parser: ArgumentParser) -> None:
    """RECIPE and `--set KEY=VALUE`, the way every command names what to train."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override one field of the recipe, such as run.steps=10; may repeat",
    )  # fmt: skip


def backend_parser(program: str) -> ArgumentParser:
    """`PROGRAM train|eval|export RECIPE ...`: the same for jaxtrain and torchtrain."""
    parser = ArgumentParser(prog=program)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "train": "train; writes metrics, TensorBoard events and checkpoints under --out",
        "eval": "held-out loss of the newest checkpoint under --out, or of the starting weights",
        "export": "write the newest checkpoint under --out as a PEFT adapter or a Hugging Face model",
    }
    for name, help_text in helps.items():
        command = commands.add_parser(name, help=help_text)
        add_recipe(command)
        command.add_argument(
            "--out", type=Path, metavar="DIR", help=f"the run's directory; runs/RECIPE-{program} by default"
        )
        if name == "train":
            command.add_argument(
                "--trace", type=Path, metavar="DIR", help="record every gradient and update for parity"
            )
            command.add_argument(
                "--activations",
                type=_step_or_all,
                metavar="STEP",
                help="with --trace: activations and their gradients too, at this step or at `all`",
            )
            command.add_argument(
                "--resume", action="store_true", help="go on from the newest checkpoint under --out"
            )
        if name == "export":
            command.add_argument(
                "--merge", action="store_true", help="fold the adapter into the weights of the whole model"
            )
            command.add_argument(
                "--dtype",
                choices=("float64", "float32", "bfloat16", "float16"),
                help="how a whole model is stored; as trained by default, with --merge as its base is",
            )
    return parser


def out_directory(args: Namespace, program: str) -> Path:
    """Where the run's files go: `--out`, or `runs/RECIPE-PROGRAM`."""
    return args.out or Path("runs") / f"{args.recipe.stem}-{program}"


def trace_request(args: Namespace) -> TraceRequest | None:
    """What `--trace` and `--activations` ask for."""
    if args.trace is None and args.activations is not None:
        raise UserError("--activations: give --trace DIR as well, to say where")
    if args.trace and args.resume:
        raise UserError("--trace with --resume: a trace starts at step 1; leave one of them out")
    return TraceRequest(args.trace, args.activations) if args.trace else None


def _step_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no step; give 1 or more, or all")
    return int(text)


def run_command(
    main: Callable[[Namespace], int | None], parser: ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parse, run, and turn a person's mistake into one line and exit code 2, a stopped training into 1."""
    args = parser.parse_args(argv)
    try:
        return main(args) or EXIT_DONE
    except UserError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what was saved stays, go on with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        print(
            f"{parser.prog}: {error.filename or 'a file'}: {error.strerror}; nothing else was changed",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except NonFiniteLossError as error:
        print(f"{parser.prog}: stopped before the update: {error}", file=sys.stderr)
        return EXIT_FAILED
