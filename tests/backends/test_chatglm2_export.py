"""ChatGLM2 as published, through a whole run: an export has the files' own names, types and bits where nothing was learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chatglm2
import numpy as np
import pytest
from backend import main
from safetensors.numpy import load_file
from small import write_tokenizer

LORA = {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": "all-linear"}


def stored(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: a for file in sorted(directory.glob("*.safetensors")) for name, a in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("method", "words"),
    [(LORA, ["--merge"]), ({"kind": "full"}, ["--dtype", "float16"])],
    ids=["lora", "full"],
)
@pytest.mark.parametrize("rate", [1e-30, 1e-2])
def test_what_is_exported_is_the_published_layout(
    make_recipe, tmp_path: Path, method: dict[str, Any], words: list[str], rate: float
):
    """At a rate that moves no weight every bit, at another (the control) every name, shape and type."""
    base, out, file = tmp_path / "base", tmp_path / "run", tmp_path / "r.yaml"
    chatglm2.write_published(base, dtype="float16", shards=3)
    write_tokenizer(base)
    recipe = make_recipe(
        model={"from": str(base)},
        method=method,
        optimizer={"lr": rate, "weight_decay": 0.1},
        run={"steps": 1},
    )
    file.write_text(recipe.to_yaml())
    assert main(["train", str(file), "--out", str(out)]) == 0
    assert main(["export", str(file), "--out", str(out), *words]) == 0
    [exported] = [path.parent for path in out.glob("*/config.json")]
    before, after = stored(base), stored(exported)
    assert "transformer.rotary_pos_emb.inv_freq" in before
    assert after.keys() == before.keys()
    same = [name for name, array in before.items() if after[name].tobytes() == array.tobytes()]
    assert all((after[name].dtype, after[name].shape) == (a.dtype, a.shape) for name, a in before.items())
    assert len(same) == len(before) if rate < 1e-9 else len(same) < len(before)
    config = json.loads((exported / "config.json").read_text())
    assert config == chatglm2.CONFIG
