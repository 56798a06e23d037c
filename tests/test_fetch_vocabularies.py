"""Vocabularies are taken out of wheels alone, and one that is missing is named."""

from __future__ import annotations

import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from small import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts/fetch_vocabularies.py"))
WHEELS = {"dashscope-2.0.2-py3-none-any.whl": b"qwen", "llama_models-0.3.0-py3-none-any.whl": b"llama"}


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The script with a pip that writes the wheels of packages whose name begins so."""

    def run(prefix: str) -> Path:
        def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            assert "--only-binary :all:" in " ".join(command)
            directory = Path(command[command.index("--dest") + 1])
            for name in (each for each in WHEELS if each.startswith(prefix)):
                package = name.partition("-")[0]
                with zipfile.ZipFile(directory / name, "w") as wheel:
                    wheel.writestr(SCRIPT["FILES"][package][0], WHEELS[name])
                    wheel.writestr(f"{package}.dist-info/licenses/LICENSE", "free")
            (directory / "dashscope-2.0.2.tar.gz").touch()
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(subprocess, "run", pip)
        monkeypatch.setattr(sys, "argv", ["fetch_vocabularies.py", str(tmp_path / "out")])
        SCRIPT["main"]()
        return tmp_path / "out"

    return run


def test_what_pip_did_not_fetch_is_named_and_fetched_later(fetch: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(SystemExit, match=r"no wheel with qwen\.tiktoken, llama3\.tiktoken$"):
        fetch("none")
    with pytest.raises(SystemExit, match=r"no wheel with qwen\.tiktoken$"):
        fetch("llama")
    assert (tmp_path / "out/llama3.tiktoken").read_bytes() == b"llama"
    out = fetch("")
    assert (out / "qwen.tiktoken").read_bytes() == b"qwen"
    assert (out / "qwen.tiktoken.LICENSE").read_text() == "free"
