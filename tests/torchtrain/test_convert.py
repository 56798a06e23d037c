"""torchtrain convert: pickled weights become safetensors bit for bit, without running code; everything else is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import chatglm2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchtrain.cli import main
from torchtrain.convert import convert
from trainspec.errors import UserError, WeightsError
from trainspec.files.adapters import read_adapter, write_adapter
from trainspec.files.hf import read_model
from trainspec.files.model_config import read_model_spec
from trainspec.methods import PrefixTuning
from trainspec.params import param_table


class Runs:
    """An object that would make a file when it is read."""

    def __init__(self, at: Path) -> None:
        self._at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._at),)


def pickled(directory: Path, *, shards: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A published model with its weights in `.bin` files; returns them."""
    weights = chatglm2.write_published(directory)
    (directory / "model.safetensors").unlink()
    chatglm2.write_sentencepiece(directory)
    (directory / "modeling_chatglm.py").write_text("raise SystemExit('this was run')")
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in weights.items()}
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return tensors
    where = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        held = dict(list(tensors.items())[i::shards])
        torch.save(held, directory / name)
        where |= dict.fromkeys(held, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_published_model(tmp_path: Path, shards: int, dtype: torch.dtype, capsys: Any):
    before = pickled(tmp_path / "base", shards=shards, dtype=dtype)
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == shards
    assert after.keys() == before.keys()
    assert all(
        after[name].dtype == dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    kept = {file.name for file in (tmp_path / "out").iterdir()} - {file.name for file in files}
    index = {"model.safetensors.index.json"} if shards > 1 else set()
    assert kept == {"config.json", "tokenizer.model", "tokenizer_config.json", *index}
    spec = read_model_spec(tmp_path / "out")
    assert len(list(read_model(tmp_path / "out", spec, param_table(spec), dtype=None))) == len(
        param_table(spec)
    )


@pytest.mark.parametrize("projection", [False, True])
def test_a_published_prefix_there_and_back(tmp_path: Path, projection: bool):
    """From the training script's files to ours, as a starting adapter, and written again: the same bits and settings."""
    chatglm2.write_published(tmp_path / "base")
    spec, draw = read_model_spec(tmp_path / "base"), np.random.default_rng(3)
    shapes = {"embedding.weight": (5, 144)}
    if projection:
        shapes |= {"trans.0.weight": (20, 144), "trans.0.bias": (20,), "trans.2.weight": (144, 20), "trans.2.bias": (144,)}  # fmt: skip
    before = {
        f"transformer.prefix_encoder.{name}": torch.from_numpy(draw.standard_normal(shape).astype("float32"))
        for name, shape in shapes.items()
    }
    (tmp_path / "checkpoint").mkdir()
    torch.save(before, tmp_path / "checkpoint/pytorch_model.bin")
    settings = chatglm2.CONFIG | {"pre_seq_len": 5, "prefix_projection": projection}
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(settings))
    method = PrefixTuning(
        virtual_tokens=5, positions="from_zero", projection=projection, projected="all_layers" if projection else "layer"
    )  # fmt: skip
    table = method.table(spec)
    with pytest.raises(WeightsError, match=r"pytorch_model.bin: is not supported.*torchtrain convert"):
        read_adapter(tmp_path / "checkpoint", spec, method, table, dtype="float32")
    out = convert(tmp_path / "checkpoint", tmp_path / "out")
    weights = {p.name: w[...] for p, w in read_adapter(out, spec, method, table, dtype="float32")}
    made = method.encode(weights)
    published = chatglm2.prefix_of({name: tensor.double().numpy() for name, tensor in before.items()})
    np.testing.assert_allclose(made, published.reshape(5, -1), rtol=1e-12)
    write_adapter(tmp_path / "again", weights, model=spec, method=method, base="x")
    after = load_file(tmp_path / "again/model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert {key: settings[key] for key in written if key in settings} == {
        key: value for key, value in written.items() if key in settings
    }
    assert written["pre_seq_len"] == 5


def refused(tmp_path: Path, content: Any, name: str = "pytorch_model.bin") -> str:
    directory = tmp_path / "bad"
    directory.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        (directory / name).write_bytes(content)
    else:
        torch.save(content, directory / name)
    with pytest.raises(WeightsError) as error:
        convert(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_tensors_by_name_is_refused_and_not_run(tmp_path: Path):
    planted = tmp_path / "planted"
    assert "more than tensors" in refused(tmp_path, {"w": torch.ones(2), "x": Runs(planted)})
    assert not planted.exists()
    whole = tmp_path / "whole.bin"
    torch.save({"w": torch.ones(200)}, whole)
    assert "damaged" in refused(tmp_path, whole.read_bytes()[:300])
    assert "damaged" in refused(tmp_path, b"")
    assert "not a dictionary" in refused(tmp_path, [torch.ones(2)])
    assert "'model' is no tensor" in refused(tmp_path, {"model": {"w": torch.ones(2)}})
    assert "w is stored as int8" in refused(tmp_path, {"w": torch.ones(2, dtype=torch.int8)})
    assert "not finite" in refused(tmp_path, {"w": torch.tensor([1.0, float("nan")])})
    # Control: the planted object does run where it is read without care.
    torch.save(Runs(planted), tmp_path / "planted.bin")
    torch.load(tmp_path / "planted.bin", weights_only=False)
    assert planted.is_dir()


def test_directories_that_cannot_be_converted_are_named(tmp_path: Path, capsys: Any):
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "out")]) == 2
    assert "no such directory" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "out")]) == 2
    assert "no pickled weights" in capsys.readouterr().err
    with pytest.raises(UserError, match="another directory"):
        convert(tmp_path / "a", tmp_path / "a")
    index = {"weight_map": {"w": "../secret.bin"}}
    (tmp_path / "a/pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"names '\.\./secret\.bin'"):
        convert(tmp_path / "a", tmp_path / "out")


def test_a_prefix_that_does_not_fit_is_refused(tmp_path: Path):
    chatglm2.write_published(tmp_path / "base")
    spec = read_model_spec(tmp_path / "base")
    method = PrefixTuning(virtual_tokens=5, positions="from_zero")
    weights = {p.name: np.ones(p.shape, np.float32) for p in method.table(spec)}
    write_adapter(tmp_path / "a", weights, model=spec, method=method, base="x")

    def line(method: PrefixTuning, **settings: Any) -> str:
        file = tmp_path / "a/config.json"
        was = json.loads(file.read_text())
        file.write_text(json.dumps(was | settings))
        with pytest.raises(WeightsError) as error:
            list(read_adapter(tmp_path / "a", spec, method, method.table(spec), dtype="float32"))
        file.write_text(json.dumps(was))
        return str(error.value)

    longer = PrefixTuning(virtual_tokens=6, positions="from_zero")
    assert line(longer).endswith("pre_seq_len=5, the recipe says 6; set method.virtual_tokens=5")
    projected = PrefixTuning(virtual_tokens=5, positions="from_zero", projection=True, projected="all_layers")
    assert line(projected).endswith("set method.projection=false")
    assert "it is another model's" in line(method, num_layers=6, multi_query_group_num=1)
    assert "[5, 144], the configuration requires [6, 144]" in line(longer, pre_seq_len=6)
    assert "set method.positions=from_zero" in line(PrefixTuning(virtual_tokens=5))
    (tmp_path / "a/adapter_config.json").write_text("{}")
    (tmp_path / "a/config.json").rename(tmp_path / "a/other.json")
    with pytest.raises(WeightsError, match=r"config.json: missing.*set method.positions=after_prefix"):
        read_adapter(tmp_path / "a", spec, method, method.table(spec), dtype="float32")
