"""What a token costs in long rows, beside what attention's arithmetic says.

    python benchmarks/row_length.py [--tokens 512 1024 2048 4096] [--programs jaxtrain torchtrain trainer] [--rounds N]

The 28 M model, 4096 tokens per update in rows of each length. All lengths of a program take turns. A row of n tokens costs,
of products with weights, the same per token whatever n; attention's products grow with n / 2, as half of the scores are
masked: a kernel that skips that half costs no more than `arithmetic`, one that computes all scores up to `all scores`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from bench_recipe import HOME, METHODS, PROGRAMS, Case, has_gpu, launch
from beside_trainer import model_flops
from turns import Measured, command_line, machine, measure

from trainspec.recipe import load_recipe
from trainspec.runs.run import Run, resolve

TOKENS_PER_UPDATE = 4096


def main() -> None:
    """Measure every program at every length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="in a row")
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=["jaxtrain", "torchtrain", "trainer"]
    )
    parser.add_argument("--method", choices=tuple(METHODS), default="full")
    parser.add_argument("--policy", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model: only to see that everything runs")
    arguments = parser.parse_args()
    print(f"`{command_line()}`\n\n{machine()}\n")
    print(
        "| program | row | ms per 1000 tokens | core ms | ÷ the shortest | by core | arithmetic | all scores | peak GiB |"
    )
    print("|---" * 9 + "|", flush=True)
    model = "tiny" if arguments.tiny else "28m"
    cases = {
        tokens: Case(model, arguments.method, arguments.policy, tokens, examples=TOKENS_PER_UPDATE // tokens)
        for tokens in arguments.tokens
    }
    recipes = {tokens: case.write() for tokens, case in cases.items()}
    run = resolve(load_recipe(recipes[arguments.tokens[0]], []))
    for program in arguments.programs:
        launches = [
            replace(launch(program, path), name=f"{program}-{tokens}") for tokens, path in recipes.items()
        ]
        found = measure(
            launches,
            rounds=arguments.rounds,
            updates=1,
            warm_up=1,
            at_once=not has_gpu(),
            logs=HOME / "row-length",
        )
        shortest = found[f"{program}-{arguments.tokens[0]}"]
        for tokens in arguments.tokens:
            print(
                row(program, tokens, found[f"{program}-{tokens}"], shortest, run, arguments.tokens[0]),
                flush=True,
            )


def row(
    program: str, tokens: int, figures: Measured | str, shortest: Measured | str, run: Run, first: int
) -> str:
    """A line of the table."""
    if isinstance(figures, str) or isinstance(shortest, str):
        return f"| {program} | {tokens} | {figures} |"
    per_thousand = 1e6 / TOKENS_PER_UPDATE
    wall, core = shortest.speed_beside(figures)
    expected = (flops(run, tokens, share=share) / flops(run, first, share=share) for share in (0.5, 1.0))
    cells = [
        program, f"{tokens}", f"{per_thousand * figures.seconds:.0f}", f"{per_thousand * figures.core_seconds:.0f}",
        f"{wall}", f"{core}", *(f"{ratio:.2f}" for ratio in expected), f"{figures.last['peak_bytes'] / 2**30:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def flops(run: Run, tokens: int, *, share: float) -> float:
    """Operations per token in rows of `tokens`, of whose scores a `share` is computed: the products with weights, and attention's.

    Scores and their mixture of values are two products forward; backward they take two each, and the scores are made again.
    """
    spec = run.spec
    scores = share * tokens * spec.layers * spec.heads * spec.head_dim
    return model_flops(run, 1) + 7 * 2 * scores


if __name__ == "__main__":
    main()
