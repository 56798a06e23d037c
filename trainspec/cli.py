"""trainspec show | data | schema | import: what a recipe means, before anything is trained."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from trainspec.command import add_recipe, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """The command line of `trainspec`."""
    parser = ArgumentParser(prog="trainspec", description="What a recipe means, before anything is trained.")
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


def _run(args: Namespace) -> None:
    # What --help does without.
    from trainspec import commands

    commands.run(args)
