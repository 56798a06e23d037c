"""How fast both backends generate, with a cache of keys and values and by whole rows, beside transformers' `generate`.

    python benchmarks/generation.py [--model 28m] [--rows 1 8] [--policy fp32] [--rounds N] [--tokens N] [--tiny]
    python benchmarks/generation.py --model 8b-widths --rows 1 32 --policy bf16          # on a GPU

Random weights, prompts of 100 tokens, greedy, no token ends a row. On a CPU the programs are all there and take turns of one batch of
prompts; on a GPU they come one after another. `÷ transformers` is a ratio within a round, by the wall and by core seconds, the median
with the smallest and the largest. A turn has the pass over the prompts in it. `same tokens` says how many of the first row are those of
transformers. `peak GiB` is of host memory, on a GPU of transformers' and torchtrain's device memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_recipe import HOME, ROOT, Case, has_gpu, model_directory, sizes_of
from numpy.typing import NDArray
from turns import Launch, Measured, command_line, machine, measure

from trainspec.generation.decoding import WholeRows
from trainspec.generation.rows import STRETCH, batch_of
from trainspec.recipe import load_recipe

PROGRAMS = ("jaxtrain", "jaxtrain-whole-rows", "torchtrain", "torchtrain-whole-rows", "transformers")
PROMPT_TOKENS = 100
Generate = Callable[[NDArray[np.int32], int], NDArray[Any]]


def main() -> None:
    """Measure every number of rows and print its table, or be one of the programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("28m", "8b-widths"), default="28m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--policy", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="generated of each row in a turn")
    parser.add_argument("--tiny", action="store_true", help="a small model: only to see that everything runs")
    parser.add_argument("--as", dest="program", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = "tiny" if arguments.tiny else arguments.model
    if arguments.program:
        take_turns(arguments.program, model, arguments.policy, arguments.rows[0], arguments.tokens)
        return
    print(f"`{command_line()}`\n\n{machine()}\n", flush=True)
    for rows in arguments.rows:
        shared = ["--policy", arguments.policy, "--rows", f"{rows}", "--tokens", f"{arguments.tokens}"]
        shared += ["--tiny"] if arguments.tiny else ["--model", model]
        launches = [
            Launch(
                name,
                [sys.executable, __file__, *shared, "--as", name],
                {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            )
            for name in arguments.programs
        ]
        found = measure(
            launches,
            rounds=arguments.rounds,
            updates=1,
            warm_up=1,
            at_once=not has_gpu(),
            logs=HOME / f"generation-{rows}",
        )
        print(f"**{model}, {arguments.policy}, {rows} row(s), {arguments.tokens} tokens each**\n")
        print("\n".join(table(found, rows * arguments.tokens)) + "\n", flush=True)


def table(found: dict[str, Measured | str], tokens: int) -> list[str]:
    """Markdown: a row for each program."""
    heads = [
        "",
        "tokens/s",
        "core ms a token",
        "÷ transformers",
        "by core",
        "same tokens",
        "first turn, s",
        "peak GiB",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    theirs = found.get("transformers")
    for name, figures in found.items():
        if isinstance(figures, str):
            lines.append(f"| {name} | {figures} |")
            continue
        ratios, same = ("", ""), ""
        if isinstance(theirs, Measured):
            ratios = figures.speed_beside(theirs)
            pairs = zip(figures.last["ids"], theirs.last["ids"], strict=True)
            same = f"{sum(a == b for a, b in pairs)} of {len(theirs.last['ids'])}"
        cells = [
            name,
            f"{tokens / figures.seconds:,.1f}",
            f"{1e3 * figures.core_seconds / tokens:.1f}",
            *map(str, ratios),
            same,
            f"{figures.first_seconds:.1f}",
            f"{figures.last['peak_bytes'] / 2**30:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def take_turns(program: str, model: str, policy: str, rows: int, tokens: int) -> None:
    """Generate for one batch of prompts whenever it is asked to, and say how long it took."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate = theirs(model, policy) if program == "transformers" else ours(program, model, policy)
    vocab = sizes_of(model)["vocab_size"]
    prompts = np.random.default_rng(0).integers(3, vocab, (rows, PROMPT_TOKENS)).astype(np.int32)
    turns, ids = 1, np.zeros((rows, 0))
    while True:
        began, used = time.perf_counter(), time.process_time()
        for _ in range(turns):
            ids = generate(prompts, tokens)
        words = {"seconds": time.perf_counter() - began, "core_seconds": time.process_time() - used}
        print(json.dumps(words), file=answers, flush=True)
        line = sys.stdin.readline().strip()
        if not line.isdecimal():
            print(json.dumps({"ids": ids[0].tolist(), "peak_bytes": _peak()}), file=answers, flush=True)
            return
        turns = int(line)


def _peak() -> int:
    """The device memory that torch has had, on a GPU with torch; else the host memory of this process."""
    torch = sys.modules.get("torch")
    if has_gpu() and torch is not None:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(program: str, model: str, policy: str) -> Generate:
    """This project's decoding, with its cache or without."""
    package = program.partition("-")[0]
    cluster: Any = importlib.import_module(f"{package}.cluster")
    step: Any = importlib.import_module(f"{package}.step")
    # Fresh LoRA is the base, which in bf16 is then stored as it is computed with.
    method = "lora" if model == "8b-widths" else "full"
    state = step.init_state(cluster.start(load_recipe(Case(model, method, policy).write(), [])))
    has_cache = program == package

    def generate(prompts: NDArray[np.int32], tokens: int) -> NDArray[Any]:
        count, longest = prompts.shape
        limit = -(-(longest + tokens) // STRETCH) * STRETCH
        decoding = step.decoding(state, length=limit) if has_cache else None
        if has_cache and decoding is None:
            raise SystemExit(f"{package} has no cache")
        decoding = decoding or WholeRows(step, state, limit=limit)
        logits_BV = decoding.begin(*batch_of(prompts.tolist(), limit=limit, count=count))
        made = [logits_BV.argmax(-1).astype(np.int32)]
        while len(made) < tokens:
            made.append(decoding.extend(made[-1]).argmax(-1).astype(np.int32))
        return np.stack(made, axis=1)

    return generate


def theirs(model: str, policy: str) -> Generate:
    """transformers' `generate` with its cache, as its users call it."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if policy == "bf16" else torch.float32
    directory: Path = model_directory(sizes_of(model))
    device = "cuda" if has_gpu() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    loaded = loaded.eval().to(device)

    def generate(prompts: NDArray[np.int32], tokens: int) -> NDArray[Any]:
        with torch.inference_mode():
            ids = loaded.generate(
                torch.from_numpy(prompts).long().to(device), do_sample=False, use_cache=True, pad_token_id=0,
                min_new_tokens=tokens, max_new_tokens=tokens,
                attention_mask=torch.ones(prompts.shape, dtype=torch.long, device=device),
            )  # fmt: skip
        return ids[:, prompts.shape[1] :].cpu().numpy()

    return generate


if __name__ == "__main__":
    main()
