"""The shape of the code: who imports whom, twins that look like twins, a README that is true, clean linters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trainspec.families import FAMILIES, PRESETS
from trainspec.params import param_table

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainspec", "jaxtrain", "torchtrain", "parity")
JAX_WORLD = {"jax", "jaxlib", "flax", "optax", "orbax"}
TORCH_WORLD = {"torch", "deepspeed", "peft", "transformers", "accelerate"}
# The process that tokenises runs the first (docs/decisions/0014). The others are imported by planted modules only, in
# the process of the backend that their name begins with (docs/decisions/0015).
MAY_IMPORT = {
    "trainspec/text/encode.py": {"transformers"},
    "parity/faults/substitutes/jax_*.py": {*JAX_WORLD, "jaxtrain"},
    "parity/faults/substitutes/torch_*.py": {*TORCH_WORLD, "torchtrain"},
}
SUBSTITUTES = "parity.faults.substitutes"
FORBIDDEN = {
    "trainspec": {*JAX_WORLD, *TORCH_WORLD, "jaxtrain", "torchtrain", "parity"},
    "parity": {*JAX_WORLD, *TORCH_WORLD, "jaxtrain", "torchtrain"},
    "jaxtrain": {*TORCH_WORLD, "torchtrain", "parity"},
    "torchtrain": {*JAX_WORLD, "jaxtrain", "parity"},
}
# Inside a backend a module imports from its own layer's left to the right only.
LAYERS = (
    ("cli",),
    ("train", "cost"),
    ("step",),
    ("passes",),
    ("parallel", "pipeline", "zero", "feed", "storage"),
    ("methods",),
    ("optim", "loss"),
    ("model", "weights"),
    ("families", "decoder", "layers", "dropout", "activations", "tensor", "engine", "launch"),
)

# Files that one twin has and the other has not, each with its reason.
ONE_SIDED_FILES = {
    "torchtrain/zero.py": "DeepSpeed; in JAX the compiler splits what the plan says",
    "torchtrain/engine.py": "what DeepSpeed, its pipeline and plain torch have in common; JAX has functions",
    "jaxtrain/passes.py": "the order of passes is a loop of our own; torch's is DeepSpeed's",
    "jaxtrain/feed.py": "a compiled function takes the whole batch, in torch each process takes its examples",
    "jaxtrain/storage.py": "the state of JAX is arrays, which functions take and give; torch's is in the engine's store",
    "jaxtrain/decoder.py": "what families have in common; torch's come from Hugging Face",
    "torchtrain/families/anatomy.py": "Hugging Face's modules are asked where in them is what",
    "torchtrain/launch.py": "a process for every device; in JAX one process has many",
}

# Public names that one twin has and the other has not, each with its reason.
ONE_SIDED = {
    "jaxtrain/activations.py": {
        "Probes": "JAX adds zeros and takes the gradient by them",
        "Tap": "JAX adds zeros and takes the gradient by them",
        "zero_probes": "JAX adds zeros and takes the gradient by them",
    },
    "torchtrain/activations.py": {
        "Recording": "torch has hooks",
        "recorded": "torch has hooks",
    },
    "jaxtrain/layers.py": {
        "Linear": "torch's come from Hugging Face",
        "Embedding": "torch's come from Hugging Face",
        "Dim": "Hugging Face's modules know no logical axes",
        "Build": "Hugging Face's modules know no logical axes",
        "wide": "Hugging Face's modules choose their own",
        "abstract": "torch has the meta device",
        "rotary_tables": "torch's are a module that takes Hugging Face's place",
        "rotate": "torch's come from Hugging Face",
        "attend": "torch's come from Hugging Face",
        "VIRTUAL": "JAX makes the mask from segments in the model",
        "VirtualTokens": "an input of the compiled passes; in torch hooks put them in",
        "Encoder": "an input of the compiled passes; in torch hooks put them in",
        "in_front": "an input of the compiled passes; in torch hooks put them in",
    },
    "torchtrain/layers.py": {
        "RotaryTables": "JAX's is a function, rotary_tables",
    },
    "jaxtrain/families/llama.py": {
        "Attention": "torch's come from Hugging Face",
        "SwiGLU": "torch's come from Hugging Face",
        "Block": "torch's come from Hugging Face",
    },
    "torchtrain/families/llama.py": {
        "sizes": "the arguments of Hugging Face's configuration",
    },
    "torchtrain/families/__init__.py": {
        "anatomy_of": "Hugging Face's modules are asked where in them is what",
    },
    "jaxtrain/weights.py": {
        "native_module": "JAX stacks layers under names of its own",
        "native_name": "JAX stacks layers under names of its own",
        "LSTM_LEAF": "a module for each layer and direction in JAX",
        "LAYER": "JAX stacks layers under names of its own",
        "LEAVES": "JAX stacks layers under names of its own",
        "TRANSPOSED": "torch's layout is the canonical one",
        "native_spec": "torch's processes each hold their own part",
        "native_shapes": "JAX compiles for shapes",
        "is_stacked": "torch has a module for every layer",
        "Order": "torch has a module for every layer",
        "to_host": "torch's to_canonical gathers",
    },
    "jaxtrain/tensor.py": {
        "Constrain": "JAX says where an activation lies, the compiler moves it",
        "Place": "JAX says where a weight lies, the compiler moves it",
        "Weight": "a weight of torch is a parameter, which has its gradient",
        "matmul": "for torch autograd and DeepSpeed do this",
        "matmul_transposed": "for torch autograd and DeepSpeed do this",
        "read": "for torch autograd and DeepSpeed do this",
        "scale": "for torch autograd and DeepSpeed do this",
        "shift": "for torch autograd and DeepSpeed do this",
        "chosen": "a stage of torch has one piece of the model",
        "lookup": "for torch autograd and DeepSpeed do this",
    },
    "jaxtrain/parallel.py": {
        "Layout": "JAX's arrays are global, a process of torch holds its own part",
        "constrained": "JAX's arrays are global, a process of torch holds its own part",
    },
    "torchtrain/weights.py": {
        "canonical_name": "PEFT renames modules in memory",
        "allocate": "torch's module is there before its weights",
    },
    "jaxtrain/methods/lora.py": {
        "LoRALinear": "torch's is PEFT's",
    },
    "jaxtrain/methods/dora.py": {
        "DoRALinear": "torch's is PEFT's, with another variant",
        "IsTarget": "JAX stacks layers, some of which may be no targets",
    },
    "torchtrain/methods/dora.py": {
        "Magnitude": "ZeRO gathers the weights of a module",
    },
    "torchtrain/methods/__init__.py": {
        "layer_inputs": "DeepSpeed's pipeline calls layers one by one; in JAX they are an input of the compiled passes",
    },
    "jaxtrain/dropout.py": {
        "DropoutKey": "torch's is held by CounterDropout",
        "dropped": "torch's is a module, CounterDropout",
    },
    "torchtrain/dropout.py": {
        "CounterDropout": "takes the place of PEFT's dropout modules",
    },
    "jaxtrain/methods/virtual_tokens.py": {
        "all_rows": "one function that is compiled; torch makes each where it is needed",
        "all_segments": "JAX makes the mask from segments in the model",
        "linear_layers": "torch's are PEFT's",
    },
    "jaxtrain/methods/prompt.py": {
        "PromptEmbedding": "torch's is PEFT's",
    },
    "jaxtrain/methods/ptuning.py": {
        "PromptEncoder": "torch's is PEFT's",
        "LSTM": "torch's is PEFT's",
        "Recurrence": "torch's is PEFT's",
    },
    "jaxtrain/methods/prefix.py": {
        "PrefixEncoder": "torch's is PEFT's",
        "PREFIX_AXES": "torch's processes each hold their own part",
    },
    "torchtrain/methods/virtual_tokens.py": {
        "all_visible": "the mask is made before the model",
        "put_in_front": "JAX's model asks its encoder",
    },
    "torchtrain/methods/prefix.py": {
        "Prefix": "JAX's model has VirtualTokens",
        "layer_inputs": "see torchtrain/methods/__init__.py",
        "make_prefix": "each process takes its own heads",
        "attend_behind_prefix": "takes the place of Hugging Face's attention",
    },
    "jaxtrain/optim.py": {
        "Moments": "torch's optimizer holds its own",
        "Rates": "torch computes them inside",
        "rates": "torch computes them inside",
        "Weights": "torch's module holds its own",
    },
    "torchtrain/optim.py": {
        "MOMENTS": "torch's names in the optimizer's state",
        "start_moments": "torch's optimizer makes its own at its first step",
        "set_learning_rate": "torch's optimizer holds its rate",
        "set_steps": "torch's optimizer counts its steps",
    },
    "torchtrain/parallel.py": {
        "make_engine": "an update is DeepSpeed's",
    },
    "jaxtrain/pipeline.py": {
        name: "the schedules are our own; torch's is DeepSpeed's"
        for name in (
            "N",
            "NO_TOKENS",
            "of_encoder",
            "HEAD_POINTS",
            "Inputs",
            "Merge",
            "Stages",
            "layers_and_ends",
            "forward_work",
            "forward_tick",
            "backward_work",
            "backward_tick",
            "num_ticks",
        )
    },
    "torchtrain/pipeline.py": {
        "PipelineEngine": "DeepSpeed's; in JAX a pipeline is a loop of the program",
        "placeholder": "DeepSpeed's optimizer takes no empty list",
        "point_stages": "a process of torch records the points of its own stage",
    },
    "torchtrain/tensor.py": {
        "compute_device": "torch has to be told",
        "Peers": "a group of processes; JAX has a mesh",
        "Mesh": "JAX has one",
        "RowLinear": "layers are split by hand, in JAX by the compiler",
        "WholeLinear": "layers are split by hand, in JAX by the compiler",
        "HeadNorm": "layers are split by hand, in JAX by the compiler",
        "VocabEmbedding": "layers are split by hand, in JAX by the compiler",
        "split_layers": "layers are split by hand, in JAX by the compiler",
        "copy_inputs": "layers are split by hand, in JAX by the compiler",
        "own_part": "layers are split by hand, in JAX by the compiler",
        "is_split": "JAX reads weight_axes",
        "to_numpy": "numpy arrays of JAX know bfloat16",
        "cross_entropy_sum": "the vocabulary is split by hand, in JAX by the compiler",
    },
    "jaxtrain/step.py": {
        "Program": "the compiled functions; torch runs eagerly",
        "Found": "what a compiled function gives back",
    },
}
# Twins whose parameters differ, each with its reason.
OTHER_PARAMETERS = {
    "dropout.py:keep_mask": "a torch process draws the features that it has, JAX's compiler splits a whole mask",
    "loss.py:token_loss": "torch is told who has the rest of the vocabulary",
    "methods/__init__.py:attach": "torch is told who has the rest of a layer",
    "methods/low_rank.py:replace_targets": "torch's layers are PEFT's, so it is not told which",
    "methods/virtual_tokens.py:all_positions": "JAX's batches may have microbatches in front",
    "methods/virtual_tokens.py:all_labels": "JAX's batches may have microbatches in front",
    "model.py:build_model": "JAX is told how to constrain an activation, torch who has the rest of a layer",
    "weights.py:to_canonical": "JAX's arrays are global, torch's parts are gathered",
    "activations.py:by_point": "JAX has layers and microbatches in front, torch a recording for each microbatch",
    "optim.py:make_optimizer": "torch's optimizer holds the parameters it updates",
    "weights.py:from_canonical": "torch's arrays are allocated with the module and filled in place",
}


# Files outside of families/ that say a name of a weight, each with its reason.
KNOWS_NAMES = {
    "trainspec/methods/low_rank.py": "the default targets, those of examples, and an example in an error",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("**/*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"{path}: relative import")


@pytest.mark.parametrize("package", PACKAGES)
def test_import_rule(package: str):
    for path in modules(package):
        allowed = (names for pattern, names in MAY_IMPORT.items() if path.relative_to(ROOT).match(pattern))
        roots = {name.split(".")[0] for name in imports(path)}.difference(*allowed)
        assert not roots & FORBIDDEN[package], f"{path} imports {roots & FORBIDDEN[package]}"


def test_substitutes_are_imported_by_planted_modules_only():
    assert modules(SUBSTITUTES.replace(".", "/"))
    for package in PACKAGES:
        for path in modules(package):
            assert not [name for name in imports(path) if name.startswith(SUBSTITUTES)], path


def test_transformers_stays_in_the_process_that_tokenises():
    """What may import it is imported by the worker's modules alone, and the worker by nobody."""
    importers = {"encode": {"fill"}, "fill": {"worker"}, "worker": set()}
    for module, allowed in importers.items():
        found = {
            path.stem
            for package in PACKAGES
            for path in modules(package)
            if f"trainspec.text.{module}" in set(imports(path))
        }
        assert found == allowed, module


def test_the_neutral_half_asks_no_backend_for_its_name():
    """What differs between backends is in `trainspec/backends/`. `parity/faults` has edits of each one's source."""
    named = re.compile(r"""(?:==|!=|\bin\b|\bcase\b|BACKENDS\[)\s*\(?["'](?:jax|torch)(?:train)?["']""")
    found = {
        str(path.relative_to(ROOT))
        for package in ("trainspec", "parity")
        for path in modules(package)
        if path.parent.name not in ("backends", "faults") and named.search(path.read_text())
    }
    assert not found
    assert named.search('if backend == "torch":')  # control
    assert named.search('BACKENDS["jax"].cost')


def test_the_neutral_half_runs_without_a_framework():
    code = (
        "import sys\n"
        f"for name in {sorted(JAX_WORLD | TORCH_WORLD)!r}: sys.modules[name] = None\n"
        "import trainspec.cli, trainspec.runs.loop, trainspec.runs.export, trainspec.backends, parity.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("package", "other"), [("jaxtrain", "torch"), ("torchtrain", "jax")])
def test_a_backend_does_not_load_the_other_framework(package: str, other: str):
    """Not through a third package either: JAX and torch never share a process."""
    code = f"import sys, {package}.cli; sys.exit({other!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("package", ["jaxtrain", "torchtrain"])
def test_layers(package: str):
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in modules(package):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")  # a file, or a folder of files
        if room.startswith("__"):
            continue
        assert room in rank, f"{path}: give it a layer"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in rank:
                assert rank[parts[1]] >= rank[room], f"{path} imports {name}, which lies above it"


def public(path: Path) -> dict[str, tuple[str, ...]]:
    """Public top-level names in order; functions with their parameter names."""
    names: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name, args=args):
                names[name] = tuple(a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs))
            case ast.ClassDef(name=name):
                names[name] = ()
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names[name] = ()
            case _:
                continue
    return {name: parameters for name, parameters in names.items() if not name.startswith("_")}


def test_files_of_one_test_run_have_names_of_their_own():
    """pytest imports them by name: two of the same name in the directories of one run are an error."""
    files = set((ROOT / "tests").glob("**/test_*.py"))
    apart = {file for file in files if file.parent.name in ("backends", "torchtrain")}  # see the Makefile
    for run in (apart, files - apart):
        names = sorted(file.name for file in run)
        assert names == sorted(set(names))


def twins(package: str) -> set[str]:
    """The files of a backend that the other one must have too."""
    files = {str(path.relative_to(ROOT / package)) for path in modules(package)}
    return {file for file in files if f"{package}/{file}" not in ONE_SIDED_FILES}


def test_twins_have_the_same_files():
    assert all((ROOT / name).exists() for name in ONE_SIDED_FILES)
    assert twins("jaxtrain") == twins("torchtrain")


@pytest.mark.parametrize("file", sorted(twins("jaxtrain")))
def test_twins_have_the_same_public_names(file: str):
    left, right = public(ROOT / "jaxtrain" / file), public(ROOT / "torchtrain" / file)
    mine, theirs = (ONE_SIDED.get(f"{package}/{file}", {}) for package in ("jaxtrain", "torchtrain"))
    assert set(mine) <= set(left), f"no longer in jaxtrain/{file}: {set(mine) - set(left)}"
    assert set(theirs) <= set(right), f"no longer in torchtrain/{file}: {set(theirs) - set(right)}"
    left = {name: parameters for name, parameters in left.items() if name not in mine}
    right = {name: parameters for name, parameters in right.items() if name not in theirs}
    assert list(left) == list(right)
    for name in left:
        if f"{file}:{name}" not in OTHER_PARAMETERS:
            assert left[name] == right[name], f"{file}: {name}"


def test_every_family_has_its_twins():
    for name in FAMILIES:
        for package in ("trainspec", "jaxtrain", "torchtrain"):
            home = ROOT / package / "families"
            assert (home / f"{name}.py").is_file(), f"{package}: {name}"
            assert name.title() in (home / "__init__.py").read_text(), f"{package}: {name}"


def test_only_a_family_knows_its_names():
    """What a weight is, everybody else asks the table, the family, or the trace."""
    small = [replace(PRESETS["tiny"], family=name) for name in FAMILIES]
    parts = {part for spec in small for param in param_table(spec) for part in param.name.split(".")}
    # A prefix of every name, and words of English.
    names = parts - {"model", "layers", "0", "1", "weight", "bias", "mlp", "norm"}
    names |= {family.head.split(".")[0] for family in FAMILIES.values()}
    known = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if path.parent.name not in ("families", "faults", "substitutes") and known.search(path.read_text())
    }
    assert found == set(KNOWS_NAMES)


def test_readme_and_contributing_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_readme_names_make_targets_and_recipes_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in readme_commands():
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), command
        for word in words:
            if word.startswith(("configs/", "docs/", "scripts/")):
                assert (ROOT / word).exists(), command


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_readme_program_lines_parse():
    """Every `jaxtrain ...`, `torchtrain ...`, `parity ...` and `trainspec ...` line is one the parsers take."""
    lines = [c for c in readme_commands() if c.split()[0] in PACKAGES]
    assert lines
    code = (
        "import sys, shlex\n"
        "from trainspec.command import backend_parser\n"
        "import parity.cli, trainspec.cli\n"
        "parsers = {'jaxtrain': backend_parser('jaxtrain'), 'torchtrain': backend_parser('torchtrain'),\n"
        "           'parity': parity.cli.parser(), 'trainspec': trainspec.cli.parser()}\n"
        "for line in sys.stdin:\n"
        "    program, *argv = shlex.split(line, comments=True)\n"
        "    parsers[program].parse_args(argv)\n"
    )
    subprocess.run([sys.executable, "-c", code], input="\n".join(lines), text=True, check=True, cwd=ROOT)


def test_the_support_matrix_names_tests_that_exist():
    named = set(re.findall(r"`(tests/[^`]+)`", (ROOT / "docs/support-matrix.md").read_text()))
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_no_pickle_and_no_remote_code():
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text()
            for safe in ("allow_pickle=False", "trust_remote_code=False"):
                text = text.replace(safe, "")
            assert not re.search(r"\bpickle\b(?!=)|torch\.load\b|trust_remote_code", text), path
