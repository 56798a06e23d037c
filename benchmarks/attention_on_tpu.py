"""What a chip of a TPU pod holds with fused attention and with the reference: compiled here for pods that are not here.

    python benchmarks/attention_on_tpu.py [--case 7b 70b] [--attention fused reference]

The two programs of a step (gradients, update) of full fine-tuning in bfloat16, gradients summed in float32, everything
recomputed, are compiled by TPU's own compiler from shapes alone, on a CPU: Llama-2-7B on 64 chips of v5e, 64 rows of 4096, and
Llama-2-70B on 512 chips of v5p in a pipeline of 16 microbatches. It takes `libtpu` (the extra `tpu` of pyproject.toml), and no
TPU. Nothing is run, so nothing is timed but the compiler.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections import Counter

from pipeline_on_tpu import GIB, held, lowered_update, pod, recipe_of, scalar, use_compiler_alone

from trainspec.errors import UserError
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

# Model, topology, mesh and microbatches of each case.
CASES = {
    "7b": ("llama2-7b", "v5e:8x8", (1, 1, 64, 1), 1),
    "70b": ("llama2-70b", "v5p:8x8x8", (4, 1, 32, 4), 16),
}
TOKENS = 4096
# A kernel of Mosaic's in a compiled program, by the name of the instruction that calls it.
_KERNEL = re.compile(r'%(splash_\w+?)(?:\.\d+)? = .*custom_call_target="tpu_custom_call"')
HEAD = """| model | attention | program | compiled in | state | temporaries | both | splash's calls |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Compile every case, and print a line of each program."""
    arguments = _arguments()
    use_compiler_alone()
    print(f"python {' '.join(sys.argv)} on {os.cpu_count()} cores, {platform.machine()}; GiB per chip")
    print(HEAD, flush=True)
    try:
        for name in arguments.case:
            for attention in arguments.attention:
                report(name, attention)
    except UserError as error:
        sys.exit(str(error))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--attention", nargs="+", choices=("fused", "reference"), default=["fused", "reference"]
    )
    return parser.parse_args()


def report(name: str, attention: str) -> None:
    """Print a line for each program of a case."""
    from jaxtrain.program import Program

    model, topology, sizes, microbatches = CASES[name]
    settings = argparse.Namespace(model=model, mesh=sizes, tokens=TOKENS)
    recipe = with_attention(recipe_of(settings, "1f1b", microbatches), attention)
    mesh = pod(topology, sizes)
    program = Program(resolve(recipe), mesh)
    trained = program.run.trained
    weights = program.storage.shapes(trained, "weights", program.storage.compute_dtype)
    stored = program.storage.shapes(trained, "optimizer", program.storage.stored_dtype)
    gradients = program.storage.shapes(trained, "gradients", program.storage.reduce_dtype)
    # Weights, gradients, masters and both moments are there in either program, as its arguments, its results or beside it.
    state = held(weights) + held(gradients) + 3 * held(stored)
    lowered = {
        "gradients": program.gradients.lower(
            weights, {}, program.feeder.slice_shapes(), scalar("int32", mesh), record_activations=False
        ),
        "update": lowered_update(program, weights, stored, mesh),
    }
    for kind, program_lowered in lowered.items():
        begin = time.monotonic()
        compiled = program_lowered.compile()
        seconds = time.monotonic() - begin
        memory = compiled.memory_analysis()
        assert memory is not None  # TPU's compiler has it
        temporaries = memory.temp_size_in_bytes
        calls = Counter(_KERNEL.findall(compiled.as_text() or ""))
        said = ", ".join(f"{count} {kernel}" for kernel, count in sorted(calls.items())) or "none"
        cells = [f"{size / GIB:.2f}" for size in (state, temporaries, state + temporaries)]
        words = [f"{model} on {topology}", program.attention.name, kind, f"{seconds:.0f} s", *cells, said]
        print(f"| {' | '.join(words)} |", flush=True)


def with_attention(recipe: Recipe, attention: str) -> Recipe:
    """The recipe with that plan of attention."""
    return recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"attention": attention})})


if __name__ == "__main__":
    main()
