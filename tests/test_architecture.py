"""The shape of the code: who imports whom, twins that look like twins, a README that is true, clean linters."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trainspec.contract import CONTRACT
from trainspec.families import FAMILIES, PRESETS
from trainspec.methods import METHODS
from trainspec.params import param_table

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainspec", "jaxtrain", "torchtrain", "parity")
JAX_WORLD = {"jax", "jaxlib", "flax", "optax", "orbax"}
TORCH_WORLD = {"torch", "deepspeed", "peft", "transformers", "accelerate"}
# The process that tokenises runs the first (docs/decisions/0014). The others are imported by planted modules only, in
# the process of the backend that their name begins with (docs/decisions/0015).
MAY_IMPORT = {
    "trainspec/text/encode.py": {"transformers"},
    "trainspec/text/worker.py": {"transformers"},
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
# A module imports from its own line and the lines below it only. A family is a forward pass in JAX; in torch, whose
# forward passes are Hugging Face's, it says where in a module what is, and everybody asks it.
LAYERS = {
    "jaxtrain": (
        ("cli",),
        ("commands",),
        ("train", "cost"),
        ("step",),
        ("program",),
        ("native", "passes", "decoding"),
        ("pipeline", "methods", "model"),
        ("loss_chunks",),
        ("families", "decoder"),
        ("attention",),
        ("layers", "activations"),
        ("feed", "storage", "weight_ops"),
        ("sharding",),
        ("cluster", "mesh", "weights", "optim", "loss", "dropout"),
        ("precision", "rounding", "compilation", "_jax"),
    ),
    "torchtrain": (
        ("cli",),
        ("commands",),
        ("train", "cost", "convert"),
        ("step",),
        ("decoding", "inputs"),
        ("engines",),
        ("methods", "model"),
        ("weights",),
        ("layers", "activations", "attention", "tensor_parallel", "loss", "loss_chunks"),
        ("mesh",),
        ("cluster", "launch"),
        ("families", "dropout", "optim", "precision", "_deepspeed", "processes"),
    ),
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
        "import trainspec.commands, trainspec.training.loop, trainspec.checkpoints.export, trainspec.backends, parity.commands\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("package", "other"), [("jaxtrain", "torch"), ("torchtrain", "jax")])
def test_a_backend_does_not_load_the_other_framework(package: str, other: str):
    """Not through a third package either: JAX and torch never share a process."""
    code = f"import sys, {package}.commands, {package}.train; sys.exit({other!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("package", ["jaxtrain", "torchtrain"])
def test_layers(package: str):
    rank = {name: i for i, layer in enumerate(LAYERS[package]) for name in layer}
    for path in modules(package):
        room = room_of(path, ROOT / package)
        if room in ("__init__", "__main__"):
            continue
        assert room in rank, f"{path}: give it a layer"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in rank:
                assert rank[parts[1]] >= rank[room], f"{path} imports {name}, which lies above it"


def room_of(path: Path, package: Path) -> str:
    """The folder of a package that a module is in; a module outside the folders is a room of its own."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def rooms(package: Path) -> dict[str, set[str]]:
    """Each room, with the other rooms that its modules import."""
    paths = sorted(package.glob("**/*.py"))
    found: dict[str, set[str]] = {room_of(path, package): set() for path in paths}
    for path in paths:
        for name in imports(path):
            first, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if first == package.name and room in found:
                found[room_of(path, package)].add(room)
    return {room: needed - {room} for room, needed in found.items()}


def in_circles(needs: dict[str, set[str]]) -> set[str]:
    """The rooms that are left when those that need no other, or are needed by no other, are taken away again and again."""
    left = dict(needs)
    while free := [
        room
        for room, needed in left.items()
        if not needed & left.keys() or room not in set().union(*left.values())
    ]:
        for room in free:
            del left[room]
    return set(left)


@pytest.mark.parametrize("package", ["trainspec", "parity"])
def test_no_rooms_import_each_other(package: str):
    """Those of a backend have layers."""
    found = rooms(ROOT / package)
    assert {"trainspec": {"checkpoints", "training", "contract"}, "parity": {"comparison", "runs"}}[
        package
    ] <= found.keys()
    assert not in_circles(found)


def test_a_circle_of_rooms_is_seen(tmp_path: Path):
    home = tmp_path / "trainspec"
    for room, text in (
        ("runs", "from trainspec.checkpoints.store import Store\n"),
        ("checkpoints", "def begin():\n    from trainspec import errors, recipe\n"),
        ("files", "import trainspec.files.digests\n"),
        ("imports", "import trainspec.recipe\n"),
    ):
        (home / room).mkdir(parents=True)
        (home / room / "store.py").write_text(text)
    (home / "recipe.py").write_text("from trainspec.files import digests\n")
    (home / "errors.py").write_text("import trainspec.data\n")
    assert not in_circles(rooms(home))
    (home / "recipe.py").write_text("from trainspec.runs import store\n")
    assert in_circles(rooms(home)) == {"runs", "checkpoints", "recipe"}


def test_a_type_is_imported_as_everything_else_is():
    """An import that only a type checker sees would hide a circle of rooms."""
    hiding = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if "TYPE_CHECKING" in path.read_text()
    }
    assert hiding == {"parity/__init__.py"}  # it loads its names when they are asked for; and the control


def test_the_page_of_checkpoints_names_every_module():
    files = modules("trainspec/checkpoints")
    page = next(path for path in files if path.stem == "__init__").read_text()
    named = re.findall(r"`(\w+)`", page)
    assert {path.stem for path in files} - {"__init__"} <= set(named)


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


def contract(protocol: type) -> dict[str, tuple[str, ...] | None]:
    """What a Protocol and those that it extends name: functions with their parameters, and None for other names."""
    functions = {
        name: tuple(inspect.signature(value).parameters)[1:]
        for name, value in inspect.getmembers(protocol, inspect.isfunction)
        if not name.startswith("_")
    }
    return functions | dict.fromkeys(protocol.__annotations__)


def broken(path: Path, protocol: type) -> list[str]:
    """The names of the contract that a module has not, or has with other parameters.

    Keyword-only parameters of its own may follow those of the contract.
    """
    mine = public(path)
    return [
        name
        for name, parameters in contract(protocol).items()
        if name not in mine or (parameters is not None and mine[name][: len(parameters)] != parameters)
    ]


def module_file(package: str, module: str) -> Path:
    path = ROOT / package / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("package", ["jaxtrain", "torchtrain"])
@pytest.mark.parametrize("module", sorted(CONTRACT))
def test_a_backend_keeps_the_contract(package: str, module: str):
    assert contract(CONTRACT[module])
    assert not broken(module_file(package, module), CONTRACT[module])


def test_a_broken_contract_is_seen(tmp_path: Path):
    (tmp_path / "loss.py").write_text("def token_loss(labels, logits): ...\n")
    assert broken(tmp_path / "loss.py", CONTRACT["loss"]) == ["token_loss"]
    (tmp_path / "loss.py").write_text("def token_loss(logits, labels, *, tensor): ...\n")
    assert not broken(tmp_path / "loss.py", CONTRACT["loss"])
    assert "CLIP_EPS" in broken(tmp_path / "loss.py", CONTRACT["optim"])
    (tmp_path / "step.py").write_text("def train_step(state, batch, *, lr, keep): ...\n")
    missing = broken(tmp_path / "step.py", CONTRACT["step"])
    assert {"eval_step", "restore"} <= set(missing)  # its own, and that of the Protocol it extends
    assert "train_step" not in missing


def test_every_method_is_in_the_contract():
    """A kind has a file of the same name in both packages, and no backend has one that no recipe can ask for."""
    files = {module.partition(".")[2] for module in CONTRACT if module.startswith("methods.")}
    assert len(files) == len(METHODS)
    for package in ("jaxtrain", "torchtrain"):
        attaching = {
            path.stem
            for path in (ROOT / package / "methods").glob("*.py")
            if path.stem != "__init__" and "attach" in public(path)
        }
        assert attaching == files


def test_every_family_has_its_twins():
    for name in FAMILIES:
        for package in ("trainspec", "jaxtrain", "torchtrain"):
            home = ROOT / package / "families"
            registry = (home / "__init__.py").read_text()
            if package == "trainspec":
                assert (home / f"{name}.py").is_file(), name
                continue
            (module,) = re.findall(rf'"{name}": (\w+)', registry)
            assert (home / f"{module.lower()}.py").is_file(), f"{package}: {name}"


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


READMES = ("README.md", "README.zh.md")


def readme_commands(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", READMES)
def test_readme_names_make_targets_and_recipes_that_exist(page: str):
    makefile = (ROOT / "Makefile").read_text()
    for command in readme_commands(page):
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), command
        for word in words:
            if word.startswith(("configs/", "docs/", "scripts/")):
                assert (ROOT / word).exists(), command


def test_links_lead_somewhere():
    pages = (*(ROOT / name for name in READMES), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_chinese_readme_has_every_task_on_both_backends():
    said = [" ".join(command.split()[:3]) for command in readme_commands("README.zh.md")]
    recipes = ("translation", "summarisation", "reading-comprehension", "question-answering")
    for program in ("jaxtrain", "torchtrain"):
        for command in ("train", "eval", "generate"):
            for recipe in recipes:
                assert f"{program} {command} configs/{recipe}.yaml" in said


@pytest.mark.parametrize("page", READMES)
def test_readme_program_lines_parse(page: str):
    """Every `jaxtrain ...`, `torchtrain ...`, `parity ...` and `trainspec ...` line is one the parsers take."""
    lines = [c for c in readme_commands(page) if c.split()[0] in PACKAGES]
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


# An importer knows a setting of other tools by that name, and passes it over.
NO_REMOTE_CODE = 'idle("no code of a repository is run", "trust_remote_code")'
# The only pickle that is read, and how.
READS_A_PICKLE = {"torchtrain/convert.py": 'torch.load(path, map_location="cpu", weights_only=True)'}


def test_no_pickle_and_no_remote_code():
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text()
            for safe in ("allow_pickle=False", "trust_remote_code=False", NO_REMOTE_CODE):
                text = text.replace(safe, "")
            text = text.replace(READS_A_PICKLE.get(str(path.relative_to(ROOT)), "\0"), "")
            assert not re.search(r"\bpickle\b(?!=)|torch\.load\b|trust_remote_code", text), path


def test_parity_is_rooms_and_few_modules_beside_them():
    assert len(list((ROOT / "parity").glob("*.py"))) <= 9
