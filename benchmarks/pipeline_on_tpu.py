"""What a chip of a TPU pod holds in a pipelined train step: compiled here for a pod that is not here.

    python benchmarks/pipeline_on_tpu.py [--schedule 1f1b gpipe interleaved] [--microbatches 16] [--page FILE]

The two programs of a step (gradients, update) of full fine-tuning in bfloat16, gradients summed in float32, are compiled
by TPU's own compiler from shapes alone, on a CPU. One row per microbatch and replica; by default Llama-2-70B on 512 chips
of v5p. It takes `libtpu` (the extra `tpu` of pyproject.toml), and no TPU. Nothing is run, so nothing is timed but the
compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from trainspec.backends import BACKENDS
from trainspec.errors import UserError
from trainspec.plans.plan import BATCH_AXES, MESH_AXES, Plan
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve, resolve_on

if TYPE_CHECKING:
    from jax import ShapeDtypeStruct
    from jax.sharding import Mesh
    from jax.stages import Lowered

    from jaxtrain.program import Program

# libtpu asks for its pod over the network, and one process at a time may hold its lock, unless told otherwise.
NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
SCHEDULES = get_args(Plan.model_fields["schedule"].annotation)
GIB = 2**30
HEAD = """| schedule | microbatches | program | compiled in | arguments | results | temporaries | peak | beside | peak + beside | at most |
|---|---|---|---|---|---|---|---|---|---|---|"""

PAGE = """# A pipeline on a TPU pod, compiled ahead of time

Made by `python benchmarks/pipeline_on_tpu.py --page docs/pipeline-on-tpu.md`, on CPU, with libtpu 0.0.42.1.

The real train step of {model} on {topology}: {mesh}, `shards: params`, remat full, every weight trained, bf16 summed in
fp32, sequence {tokens}, a row for each microbatch and replica. GiB per chip of the program that makes the gradients and of the
update, as the compiler says; *beside* are masters and moments, which the gradients' program does not touch. Nothing was
run: whether a chip needs the compiler's peak or, at most, the sum of all is not known, so both stand here.

"""


@dataclass(frozen=True)
class Need:
    """What one program takes: seconds of its compilation, the rest bytes of a chip.

    `results` are those that do not lie where an argument was. `peak` is the compiler's own figure for the moment when
    most is alive, arguments and code and all; `beside` is what lies there meanwhile and is no argument of the program.
    """

    compile_seconds: float
    arguments: int
    results: int
    temporaries: int
    code: int
    peak: int
    beside: int

    @property
    def most(self) -> int:
        """All at once, gaps between temporaries too: the safe figure, since nothing has been run.

        libtpu itself refuses less: it compiles programs for which this is more than the chip has.
        """
        together = self.arguments + self.results + self.temporaries + self.code
        return max(together, self.peak) + self.beside

    def row(self) -> str:
        """Cells of the table."""
        sizes = (
            self.arguments,
            self.results,
            self.temporaries,
            self.peak,
            self.beside,
            self.peak + self.beside,
        )
        cells = [f"{size / GIB:.2f}" for size in (*sizes, self.most)]
        return " | ".join([f"{self.compile_seconds:.0f} s", *cells])


def use_compiler_alone() -> None:
    """Have JAX compile for TPUs that are not here; before it is imported. Ends the program where there is no libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit(
            "libtpu is not installed: pip install -e '.[tpu]', or its libtpu alone with --target DIR and PYTHONPATH=DIR"
        )
    os.environ |= NO_TPU  # before JAX is imported


def main() -> None:
    """Compile every schedule with every number of microbatches, and print a line of each program."""
    arguments = _arguments()
    use_compiler_alone()
    from jax.errors import JaxRuntimeError

    try:
        report(arguments)
    except UserError as error:
        sys.exit(str(error))
    except JaxRuntimeError as error:
        # No such pod, or a program that does not fit its chips: libtpu says which, and how much it would take.
        sys.exit(f"{arguments.topology}: {str(error).splitlines()[0]}")


def report(arguments: argparse.Namespace) -> None:
    """Print the table. Raises UserError, and JaxRuntimeError where libtpu refuses."""
    mesh = pod(arguments.topology, arguments.mesh)
    table = [HEAD]
    print(HEAD, flush=True)
    for schedule, microbatches in itertools.product(arguments.schedule, arguments.microbatches):
        recipe = recipe_of(arguments, schedule, microbatches)
        resolve_on(recipe, BACKENDS["jax"])
        for name, need in needs(recipe, mesh).items():
            table.append(f"| {schedule} | {microbatches} | {name} | {need.row()} |")
            print(table[-1], flush=True)
    if arguments.page:
        sizes = " × ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, arguments.mesh, strict=True))
        about = PAGE.format(**vars(arguments) | {"mesh": sizes})
        arguments.page.write_text(about + "\n".join(table) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=["1f1b", "gpipe", "interleaved"])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[16])
    parser.add_argument("--model", default="llama2-70b", help="a preset")
    parser.add_argument("--topology", default="v5p:8x8x8", help="as libtpu names it")
    parser.add_argument(
        "--mesh", type=int, nargs=4, metavar=tuple(a.upper() for a in MESH_AXES), default=[4, 1, 32, 4]
    )
    parser.add_argument("--page", type=Path, help="write Markdown there")
    parser.add_argument("--tokens", type=int, default=4096, help="in a row")
    return parser.parse_args()


def recipe_of(arguments: argparse.Namespace, schedule: str, microbatches: int) -> Recipe:
    """Full fine-tuning with everything split, everything recomputed, and one row per microbatch and replica."""
    sizes = dict(zip(MESH_AXES, arguments.mesh, strict=True))
    rows = microbatches * prod(sizes[axis] for axis in BATCH_AXES)
    return Recipe.model_validate(
        {
            "model": {"from": f"preset:{arguments.model}", "weights": "random"},
            "method": {"kind": "full"},
            "data": {"train": "none", "sequence_tokens": arguments.tokens},
            "batch": {"global_examples": rows},
            "precision": {"policy": "bf16", "reduce": "fp32"},
            "plan": sizes
            | {"shards": "params", "schedule": schedule, "microbatches": microbatches, "remat": "full"},
        }
    )


def pod(topology: str, sizes: Sequence[int]) -> Mesh:
    """A mesh of chips that are not here."""
    import numpy as np
    from jax.experimental.topologies import get_topology_desc
    from jax.sharding import AxisType, Mesh

    chips = np.array(get_topology_desc(platform="tpu", topology_name=topology).devices)
    if chips.size != prod(sizes):
        sys.exit(f"--mesh takes {prod(sizes)} chips, {topology} has {chips.size}")
    return Mesh(chips.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def needs(recipe: Recipe, mesh: Mesh) -> dict[str, Need]:
    """What each program of one step takes."""
    from jaxtrain.program import Program

    program = Program(resolve(recipe), mesh)
    trained = program.run.trained
    weights = program.storage.shapes(trained, "weights", program.storage.compute_dtype)
    stored = program.storage.shapes(trained, "optimizer", program.storage.stored_dtype)
    gradients = compiled(
        program.gradients.lower(
            weights, {}, program.feeder.slice_shapes(), scalar("int32", mesh), record_activations=False
        ),
        # Masters and both moments wait for the update.
        beside=3 * held(stored),
    )
    update = compiled(lowered_update(program, weights, stored, mesh), beside=0)
    return {"gradients": gradients, "update": update}


def lowered_update(
    program: Program,
    weights: dict[str, ShapeDtypeStruct],
    stored: dict[str, ShapeDtypeStruct],
    mesh: Mesh,
) -> Lowered:
    """The update, which takes all of the training state: frozen weights there are none."""
    from jaxtrain.optim import Moments, rates

    gradients = program.storage.shapes(program.run.trained, "gradients", program.storage.reduce_dtype)
    optimizer = program.recipe.optimizer
    scalars = rates(optimizer, lr=optimizer.lr, step=0)
    norm = scalar("float32", mesh)
    # JAX takes shapes for arrays here.
    moments = Moments(stored, stored)  # pyright: ignore[reportArgumentType]
    return program.update.lower(weights, stored, moments, gradients, norm, scalars)


def scalar(dtype: str, mesh: Mesh) -> ShapeDtypeStruct:
    """A number that every chip has."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def held(arrays: dict[str, ShapeDtypeStruct]) -> int:
    """Bytes of a chip for arrays of these shapes, each with its sharding."""
    total = 0
    for array in arrays.values():
        assert array.sharding is not None  # `Program.shapes` gives it
        total += prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return total


def compiled(lowered: Lowered, *, beside: int) -> Need:
    """Compile, and read what the compiler says of memory."""
    begin = time.monotonic()
    sizes = lowered.compile().memory_analysis()
    seconds = time.monotonic() - begin
    assert sizes is not None  # TPU's compiler has it
    return Need(
        compile_seconds=seconds,
        arguments=sizes.argument_size_in_bytes,
        results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        peak=sizes.peak_memory_in_bytes,
        beside=beside,
    )


if __name__ == "__main__":
    main()
