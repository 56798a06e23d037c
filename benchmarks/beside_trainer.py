"""How fast both backends train, beside torch eager, Hugging Face's Trainer with PEFT, and the same with Liger's kernels.

    python benchmarks/beside_trainer.py [--only 28m 8b-widths 8b] [--rounds N] [--updates N] [--tiny]
    python benchmarks/beside_trainer.py --only 28m --programs jaxtrain eager --methods full --policies bf16

On a CPU the programs of a case are all there and take turns; on a GPU, which holds one of them, they come one after
another. `÷ eager` is how many times as fast as eager a program is, by the wall's seconds and by core seconds: a ratio is taken
within a round, and its median, smallest and largest are printed. A recipe and what a program wrote
are in build/bench. `loss` is that of the last update: in fp32 the same for all, so that all are seen to do the same work.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bench_recipe import HOME, METHODS, PROGRAMS, Case, has_gpu, launch
from turns import Launch, Measured, command_line, machine, measure

from trainspec.errors import UserError
from trainspec.methods import trainable_table
from trainspec.recipe import load_recipe
from trainspec.runs.run import Run, resolve

POLICIES = ("fp32", "bf16")
# Llama-3.1-8B, LoRA of rank 16 on all linear layers, dropout 0.1, rows of 4096, 2 per part, on one H100 in bfloat16:
# NVIDIA NeMo AutoModel, docs/performance-summary. It has 16 parts per update, we have 4: the optimizer comes four times as often.
PUBLIC_TOKENS_PER_SECOND, PUBLIC_TFLOPS = 12473, 402
GIB = 2**30


def main() -> None:
    """Measure every case and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=("28m", "8b-widths", "8b"), help="default: what fits the device"
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        choices=PROGRAMS,
        default=list(available()),
        help="default: all that are installed but compiled",
    )
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="of 28m")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="of 28m")
    parser.add_argument(
        "--remat", nargs="+", choices=("none", "full"), default=["none", "full"], help="of 8b-widths, 8b"
    )
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="plan.KEY=VALUE", type=plan_setting,
                        help="a setting of ours, such as plan.attention=reference")  # fmt: skip
    parser.add_argument(
        "--before", type=Path, help="another checkout, whose jaxtrain and torchtrain take turns as well"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=2, help="of a turn")
    parser.add_argument("--warm-up", type=int, default=2, help="updates after the first that are not counted")
    parser.add_argument(
        "--tiny", action="store_true", help="small models and rows: only to see that everything runs"
    )
    arguments = parser.parse_args()
    chosen = arguments.only or (["8b-widths", "8b"] if has_gpu() else ["28m"])
    print(f"`{command_line()}`\n\n{machine()}\n", flush=True)
    for case in cases(chosen, arguments.methods, arguments.policies, arguments.remat):
        case = replace(case.tiny() if arguments.tiny else case, settings=tuple(arguments.settings))
        recipe = case.write()
        try:
            run = resolve(load_recipe(recipe, []))
        except UserError as error:
            parser.error(str(error))
        found = measure(
            launches(arguments.programs, recipe, arguments.before),
            rounds=arguments.rounds,
            updates=arguments.updates,
            warm_up=arguments.warm_up,
            at_once=not has_gpu(),
            logs=HOME / case.slug,
        )
        print("\n".join(table(case, run, found)) + "\n", flush=True)


def plan_setting(text: str) -> tuple[str, str]:
    """KEY and VALUE of `plan.KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not (key.startswith("plan.") and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not plan.KEY=VALUE")
    return key, value


def available() -> Iterator[str]:
    """The programs that this installation has."""
    needs = {"trainer-liger": "liger_kernel", "jaxtrain": "jax"}
    return (p for p in PROGRAMS if p != "compiled" and importlib.util.find_spec(needs.get(p, "torch")))


def launches(programs: Sequence[str], recipe: Path, before: Path | None) -> list[Launch]:
    """How the programs are started; with `before`, those of ours also as they are in that checkout."""
    ours = [p for p in programs if before and p in ("jaxtrain", "torchtrain")]
    return [launch(p, recipe) for p in programs] + [
        launch(p, recipe, checkout=before.absolute()) for p in ours if before
    ]


def cases(
    chosen: Sequence[str], methods: Sequence[str], policies: Sequence[str], remats: Sequence[str]
) -> Iterator[Case]:
    """The cases of these names."""
    if "28m" in chosen:
        yield from (Case("28m", method, policy) for method, policy in product(methods, policies))
    large = Case(method="lora", policy="bf16", sequence_tokens=4096, accumulation=4)
    if "8b-widths" in chosen:
        yield from (replace(large, model="8b-widths", examples=4, remat=remat) for remat in remats)
    if "8b" in chosen:
        yield from (replace(large, model="8b", examples=8, remat=remat, dropout=0.1) for remat in remats)


def table(case: Case, run: Run, found: Mapping[str, Measured | str]) -> list[str]:
    """Markdown: a row for each program."""
    title = f"**{case}**"
    if case.model == "8b":
        title += f" (in public: {PUBLIC_TOKENS_PER_SECOND:,} tokens/s, {PUBLIC_TFLOPS} TFLOP/s)"
    measured = {name: figures for name, figures in found.items() if isinstance(figures, Measured)}
    others = [name for name in measured if name not in ("jaxtrain", "torchtrain")]
    heads = [
        "",
        "s/update",
        "core s",
        "tokens/s",
        "model TFLOP/s",
        "first update, s",
        "peak GiB",
        "loss",
        *(f"÷ {o}{kind}" for o in others for kind in ("", ", core")),
    ]
    lines = [title, "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, figures in found.items():
        if isinstance(figures, str):
            lines.append(f"| {name} | {figures} |")
            continue
        ratios = (ratio for other in others for ratio in figures.speed_beside(measured[other]))
        cells = [
            name,
            f"{figures.seconds:.3f}",
            f"{figures.core_seconds:.3f}",
            f"{case.tokens / figures.seconds:,.0f}",
            f"{model_flops(run, case.tokens) / figures.seconds / 1e12:.3g}",
            f"{figures.first_seconds:.1f}",
            f"{figures.last['peak_bytes'] / GIB:.2f}",
            f"{figures.last['loss']:.4f}",
            *map(str, ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def model_flops(run: Run, tokens: int) -> float:
    """2 per token and weight that a product takes, thrice if the weight is trained and twice if not; attention is left out.

    Forward, by the input, and by the weight; the embedding is looked up. So others count LoRA: 4 × parameters × tokens.
    """
    trained = {p.name for p in trainable_table(run.spec, run.recipe.method)}
    products = (p for p in run.full_table if len(p.shape) > 1 and p.role != "embedding")
    return sum(2.0 * (3 if p.name in trained else 2) * p.size * tokens for p in products)


if __name__ == "__main__":
    sys.exit(main())
