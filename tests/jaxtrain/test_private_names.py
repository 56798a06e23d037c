"""What jaxtrain uses of JAX beside its documented names is in one file, with the version it was written for."""

import ast
import re
import tomllib
from collections.abc import Iterator

from small import ROOT

HOME = ROOT / "jaxtrain/_jax.py"


def private_names(source: str) -> Iterator[str]:
    """Dotted names of JAX that have a private part, imported or used, and settings that are read."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                dotted = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                dotted = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute():
                dotted = [ast.unparse(node)]
            case _:
                continue
        for name in dotted:
            if re.match(r"jax\b.*\._(?!_)|jax\.config\.(?!update$)", name):
                yield name


def test_private_names_of_jax_are_in_one_file():
    files = [path for path in (ROOT / "jaxtrain").glob("**/*.py") if path != HOME]
    assert len(files) > 20
    found = {str(path.relative_to(ROOT)): list(private_names(path.read_text())) for path in files}
    assert not {path: names for path, names in found.items() if names}


def test_a_private_name_would_be_found():
    assert list(private_names(HOME.read_text()))
    for line in (
        "import jax._src.core",
        "from jax._src import xla_bridge",
        "jax.a._b()",
        "jax.config.jax_platforms",
    ):
        assert list(private_names(line)), line
    assert not list(private_names("jax.config.update('x', 1)\njax.__version__\nself._jax"))


def test_the_version_is_the_pinned_one():
    [written_for] = re.findall(r'^WRITTEN_FOR = "(.+)"$', HOME.read_text(), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"jax=={written_for}" in extras["jax"]
