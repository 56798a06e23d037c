"""trainspec show | data | schema | import | checkpoint: what a recipe means, and what a run has saved."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from trainspec.command import (
    ArgumentParser,
    add_overrides,
    add_recipe,
    add_stored_type,
    directory,
    run_command,
)

# Of `checkpoint convert`. Some are there to be refused with the reason.
FORMATS = ("portable", "native", "hf", "peft", "universal", "trainer")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """The command line of `trainspec`."""
    parser = ArgumentParser(prog="trainspec", description="What a recipe means, and what a run has saved.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = commands.add_parser("show", help="the resolved recipe, the model and what is trained")
    add_recipe(shown)
    data = commands.add_parser("data", help="records and examples as tokens, target tokens marked")
    add_recipe(data)
    data.add_argument("--split", choices=("train", "heldout"), default="train")
    data.add_argument("--rows", type=int, default=4, help="how many examples to show (4)")
    _add_import(
        commands.add_parser(
            "import", help="a configuration of Axolotl, LLaMA-Factory, TRL or the Trainer as a recipe"
        )
    )
    _add_checkpoint(commands.add_parser("checkpoint", help="what a checkpoint holds, and as files of others"))
    schema = commands.add_parser("schema", help="the JSON schema of a recipe")
    schema.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="ignored: every recipe has the same schema"
    )
    return parser


def _add_import(parser: ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE",
        help="YAML or JSON; after it the adapter_config.json and the DeepSpeed JSON that go with it",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="RECIPE", help="write the recipe to this file (default: to the console)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="how many devices it is trained on there")
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="how many examples an epoch has there, packed ones where it packs",
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="one of our settings, in place of what their file says, such as data.train=FILE; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--their", dest="changes", action="append", default=[], metavar="KEY=VALUE",
        help="give one of their settings another value first, such as fp16=false; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--drop", dest="drops", action="append", default=[], metavar="KEY",
        help="leave one of their settings out, or all inside it; repeatable",
    )  # fmt: skip


def _add_checkpoint(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="COMMAND")
    helps = {
        "show": "step, data position, what wrote it, its arrays and files",
        "verify": "whether it is whole, and else what is damaged; exit code 1 if it is not",
        "consolidate": "write it as one Hugging Face model or PEFT adapter, one tensor in memory at a time",
        "convert": "write it in another format",
    }
    for name, help_text in helps.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument(
            "directory", type=Path, metavar="DIR", help="a checkpoint, or a run's directory: its newest one"
        )
        match name:
            case "show":
                command.add_argument("--json", action="store_true", help="as one JSON object")
            case "verify":
                command.add_argument(
                    "--all", action="store_true", help="all checkpoints of a run's directory"
                )
            case "consolidate":
                command.add_argument(
                    "--out", type=directory, required=True, metavar="DIR", help="the directory to write"
                )
                command.add_argument(
                    "--merge", action="store_true", help="merge the adapter into the model's weights"
                )
            case _:
                command.add_argument("out", type=directory, metavar="OUT", help="the directory to write")
                command.add_argument(
                    "--to", choices=FORMATS, required=True, help="hf: a model, an adapter merged into it"
                )
        if name in ("consolidate", "convert"):
            add_stored_type(command)
            add_overrides(command, "override one setting of the checkpoint's recipe, such as model.from=DIR")


def _run(args: Namespace) -> int:
    # What --help does without.
    from trainspec import commands

    return commands.run(args)
