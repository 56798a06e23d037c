"""Which kernel of attention a run has, what its program does on a GPU, and how its memory grows, as JSON.

    python tests/jaxtrain/inspect_attention.py CASES.json OUT.json

CASES: {"chosen": {name: [attention, policy, platform, head_dim, compute_capability]}, "lengths": [...],
"step_lengths": [...]}. Lengths are those of rows whose temporary memory is measured: of attention alone, and of a whole update.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax.sharding import Mesh
from small import SMALL, recipe_maker, write_checkpoint

from jaxtrain import cluster
from jaxtrain.attention import FUSED, REFERENCE, choose_kernel
from jaxtrain.attention.kernel import AttentionSite, Kernel
from jaxtrain.attention.visible import Visible
from jaxtrain.mesh import make_mesh
from jaxtrain.optim import Moments, rates
from jaxtrain.program import Program
from trainspec.plans.plan import MESH_AXES, Plan

KERNELS = {kernel.name: kernel for kernel in (REFERENCE, *FUSED)}
HERE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)


def chosen(attention: Any, policy: Any, platform: str, head_dim: int, capability: str) -> str:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    mesh: Any = SimpleNamespace(devices=np.array([[device]]))
    return choose_kernel(Plan(attention=attention), AttentionSite(mesh, policy, head_dim)).name


def gradients(kernel: Kernel, *, length: int, has_causal_rows: bool = False) -> jax.stages.Traced:
    """Result and gradients of attention of one row, traced."""
    attend = kernel.make(AttentionSite(HERE, "bf16", 16, has_causal_rows=has_causal_rows))
    tokens = jnp.zeros((1, length), jnp.int32)
    visible = Visible(segments_BS=tokens, positions_BS=tokens)

    def made(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        mixed, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, visible), q, k, v)
        return mixed, vjp(mixed)

    q, kv = (jax.ShapeDtypeStruct((1, length, heads, 16), jnp.bfloat16) for heads in (4, 2))
    return jax.jit(made).trace(q, kv, kv)


def on_gpu(kernel: Kernel, *, length: int, has_causal_rows: bool) -> dict[str, Any]:
    """Of a program for a GPU: cuDNN's calls, the number of matrix products, and whether a [S, S] is in it."""
    traced = gradients(kernel, length=length, has_causal_rows=has_causal_rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [
        line.partition("@__cudnn$")[2].partition("(")[0] for line in text.splitlines() if "@__cudnn$" in line
    ]
    has_mask = any(f"x{n}x{n}x" in text for n in (length, length + 1))
    return {"calls": calls, "products": text.count("dot_general"), "has_mask": has_mask}


def temporaries(kernel: Kernel, length: int) -> int:
    sizes = gradients(kernel, length=length).lower().compile().memory_analysis()
    assert sizes is not None
    return sizes.temp_size_in_bytes


def temporaries_of_step(attention: str, length: int, scratch: Path) -> int:
    directory = scratch / "model"
    if not directory.exists():
        write_checkpoint(directory, replace(SMALL, max_positions=8192))
    recipe = recipe_maker({"small": directory})(
        "small",
        method={"kind": "full"},
        data={"sequence_tokens": length, "packing": True},
        batch={"global_examples": 1},
        plan={"attention": attention},
        model={"weights": "random"},
    )
    run = cluster.start(recipe)
    program = Program(run, make_mesh(recipe.plan))
    stored = program.storage.shapes(run.trained, "optimizer", program.storage.stored_dtype)
    lowered = program.train.lower(
        stored, {}, {}, Moments(stored, dict(stored)), program.feeder.slice_shapes(),
        jax.ShapeDtypeStruct((), jnp.int32), rates(recipe.optimizer, lr=1e-3, step=0),
    )  # fmt: skip
    sizes = lowered.compile().memory_analysis()
    assert sizes is not None
    return sizes.temp_size_in_bytes


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    asked = json.loads(cases.read_text())
    # cuDNN itself is not here, and its version decides nothing of what is looked at.
    fused_attention.check_cudnn_version = lambda: 91000
    names = ("reference", "blocks")
    found = {
        "chosen": {name: chosen(*facts) for name, facts in asked["chosen"].items()},
        "gpu": {
            "masked": on_gpu(KERNELS["cudnn"], length=72, has_causal_rows=False),
            "masked-odd": on_gpu(KERNELS["cudnn"], length=73, has_causal_rows=False),
            "causal": on_gpu(KERNELS["cudnn"], length=72, has_causal_rows=True),
            "causal-odd": on_gpu(KERNELS["cudnn"], length=73, has_causal_rows=True),
            "reference": on_gpu(KERNELS["reference"], length=72, has_causal_rows=True),
        },
        "bytes": {
            name: [temporaries(KERNELS[name], length) for length in asked["lengths"]] for name in names
        },
        "step_bytes": {
            name: [temporaries_of_step(name, length, out.parent) for length in asked["step_lengths"]]
            for name in ("reference", "fused")
        },
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
