"""The options of `generate` and `eval` on a command line. Light: `--help` loads nothing but this."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def add_generation(parser: ArgumentParser) -> None:
    """The prompts, how they are answered, and what is said of the answers."""
    add_prompts(parser)
    add_decoding(parser)
    _add_untrained(parser)
    parser.add_argument(
        "--scores",
        action="store_true",
        help="with each token its log-probability, its closest rival and by how much that is less",
    )


def add_evaluation(parser: ArgumentParser) -> None:
    """What is answered of the held-out records, and how."""
    parser.add_argument(
        "--loss-only", action="store_true", help="only the newest model's held-out loss, in one line; writes nothing"
    )  # fmt: skip
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="answer the first N held-out records only; the loss is of all",
    )
    add_decoding(parser)
    _add_untrained(parser)


def _add_untrained(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--untrained", action="store_true", help="only the model that the recipe starts from; reads no checkpoint"
    )  # fmt: skip


def add_prompts(parser: ArgumentParser, *, required: bool = True) -> None:
    """`--prompt` and `--file`, of which one is given."""
    prompts = parser.add_mutually_exclusive_group(required=required)
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt, written as a record of data.train is")
    prompts.add_argument(
        "--file", type=Path, metavar="FILE",
        help="records with prompts, such as .jsonl; a response in them is kept as the reference",
    )  # fmt: skip


def add_decoding(parser: ArgumentParser) -> None:
    """How responses are made and end."""
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="the longest response (128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="what logits are divided by before a token is drawn; 0 takes the most probable one (0)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens with that probability together"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens with that share of the largest probability"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X",
        help="divide the logits of tokens that are there already (1: no penalty)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a response before this text, or at this special token; repeatable",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="how many prompts at once (8)")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute the whole row for every token, as training does"
    )
