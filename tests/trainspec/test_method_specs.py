"""The methods' specs, rows, encoders, starts and files; against PEFT they are held in tests/test_interchange.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import SMALL
from whole_arrays import save_checkpoint

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.export import export
from trainspec.errors import RecipeError, WeightsError
from trainspec.families import PRESETS
from trainspec.files.adapters import read_adapter, write_adapter
from trainspec.from_text import keys_and_values
from trainspec.init import starting_weights
from trainspec.methods import (
    ADAPTER_FILE,
    ENCODER_FILE,
    EXAMPLES,
    METHODS,
    Adapter,
    DoRA,
    Full,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    adapter_table,
    full_table,
    leading_positions,
    trainable_table,
    virtual_tokens,
)
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.opening import describe
from trainspec.runs.run import resolve, run_of

Make = Callable[..., Recipe]
ADDED: tuple[Method, ...] = tuple(spec for spec in EXAMPLES.values() if not spec.trains_model)
WIDTH = SMALL.kv_heads * SMALL.head_dim


def label(method: Method) -> str:
    return "-".join([method.kind, *(str(getattr(method, k, "")) for k in ("encoder", "projection"))])


def drawn(method: Method, dtype: str = "float32", model: ModelSpec = SMALL) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {p.name: draws.normal(size=p.shape).astype(dtype) for p in adapter_table(model, method)}


def test_as_many_numbers_as_chatglm2_s_own_scripts_train():
    """1,835,008 of a prefix of 128 (its training script), 1,949,696 of LoRA of rank 8 on the fused projection (PEFT's count)."""
    spec = PRESETS["chatglm2-6b"]
    prefix = PrefixTuning(virtual_tokens=128, positions="from_zero", dropout=0.1)
    fused, three = (LoRA(targets=t) for t in (("query_key_value",), ("q_proj", "k_proj", "v_proj")))
    counts = [sum(p.size for p in method.table(spec)) for method in (prefix, fused, three)]
    assert counts == [1_835_008, 1_949_696, 1_949_696 + 2 * 28 * 8 * 4096]
    assert prefix.adapter_size(spec) == counts[0]
    projected = prefix.model_copy(update={"projection": True, "projected": "all_layers"})
    shapes = {p.name.removeprefix("prompt_encoder."): p.shape for p in projected.table(spec)}
    assert shapes["embedding.weight"] == (128, 14336)
    assert shapes["transform.0.weight"] == (4096, 14336)
    assert shapes["transform.2.weight"] == (14336, 4096)
    with pytest.raises(RecipeError, match=r"set method\.positions=after_prefix"):
        prefix.peft_config(spec)


@pytest.mark.parametrize("method", ADDED, ids=label)
def test_a_recipe_keeps_its_method_and_trains_only_its_rows(make_recipe: Make, method: Method):
    recipe = make_recipe(method=method.model_dump())
    assert recipe.method == method
    rows = adapter_table(SMALL, method)
    assert trainable_table(SMALL, method) == rows
    assert full_table(SMALL, method) == param_table(SMALL) + rows
    assert len({p.name for p in full_table(SMALL, method)}) == len(param_table(SMALL)) + len(rows)
    assert all(len(p.shape) == len(p.axes) and p.role == "adapter" for p in rows)
    assert all(p.decay == (len(p.shape) > 1) for p in rows)


def test_every_kind_is_a_method_of_its_own():
    assert list(METHODS) == ["full", "lora", "dora", "adapter", "prompt", "ptuning", "prefix"]
    assert adapter_table(SMALL, Full()) == ()
    assert (virtual_tokens(PrefixTuning()), leading_positions(PrefixTuning())) == (20, 0)
    assert (virtual_tokens(PTuning()), leading_positions(PTuning())) == (20, 20)
    assert virtual_tokens(LoRA()) == 0
    assert LoRA(rank=4, alpha=8.0).scale == 2.0
    assert LoRA(rank=4, alpha=8.0, rslora=True).scale == 4.0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"kind": "vera"},
            "unknown kind 'vera'; choose one of full, lora, dora, adapter, prompt, ptuning, prefix",
        ),
        ({"kind": "lora", "use_dora": True}, "method.use_dora: unknown key"),
        ({"kind": "prompt", "init": "text"}, "method.text is missing"),
        ({"kind": "prompt", "text": "words"}, "method.text: not used"),
        ({"kind": "prefix", "init": "zero", "adapter": "a"}, "leave it out, or set method.init=random"),
        ({"kind": "prefix", "init": "text", "text": "words", "projection": True}, "projection=false"),
        ({"kind": "prefix", "hidden": 8}, "set method.projection=true"),
        ({"kind": "prefix", "projected": "all_layers"}, "set method.projection=true"),
        ({"kind": "prefix", "positions": "from_zero", "projection": True}, "set method.projected=all_layers"),
        (
            {"kind": "prefix", "positions": "from_zero", "init": "text", "text": "words"},
            "set method.positions=after_prefix",
        ),
        (
            {
                "kind": "prefix",
                "positions": "from_zero",
                "projection": True,
                "projected": "all_layers",
                "hidden": 8,
            },
            "leave it out",
        ),
        ({"kind": "ptuning", "dropout": 0.1}, "set method.encoder=lstm"),
        ({"kind": "adapter", "bottleneck": 0}, "method.bottleneck"),
        ({"kind": "full", "adapter": "d"}, "method.adapter: unknown key"),
        ({"kind": "lora", "adapter": 3}, "method.adapter: must be text, not 3"),
        ({"kind": "ptuning", "encodr": "mlp"}, "did you mean 'encoder'"),
    ],
)
def test_a_method_that_cannot_be_is_one_line(tmp_path: Path, method: dict, message: str):
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"model": {"from": "x"}, "data": {"train": "x"}, "method": method}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ADDED, ids=label)
def test_an_adapter_is_a_start_and_its_files_are_checked(make_recipe: Make, tmp_path: Path, method: Method):
    weights, out = drawn(method), tmp_path / "a"
    write_adapter(out, weights, model=SMALL, method=method, base="x")
    size = sum(a.size for a in load_file(out / ADAPTER_FILE).values())
    assert size == method.adapter_size(SMALL)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    recipe = make_recipe(method=method.model_dump() | {"adapter": str(out)})
    started = {p.name: w[...] for p, w in starting_weights(resolve(recipe))}
    assert all(np.array_equal(started[name], array) for name, array in weights.items())
    name, first = next(iter(weights.items()))
    for damage, message in (
        ({name: np.empty((0, 0), np.float32)}, "should have shape"),
        ({name: first[:-1]}, "should have shape"),
        ({}, "is missing"),
        ({name: np.full_like(first, np.inf)}, "not finite"),
    ):
        broken = {other: array for other, array in weights.items() if other != name} | damage
        with pytest.raises(WeightsError, match=f"{message}.*nothing was written"):
            write_adapter(out, broken, model=SMALL, method=method, base="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_what_peft_drops_is_kept_beside_it_and_has_to_belong_to_it(make_recipe: Make, tmp_path: Path):
    method, out = PTuning(virtual_tokens=5, hidden=6), tmp_path / "a"
    weights = drawn(method)
    write_adapter(out, weights, model=SMALL, method=method, base="x")
    rows = adapter_table(SMALL, method)
    saved = load_file(out / ENCODER_FILE)
    save_file(saved | {"prompt_encoder.embedding.weight": saved["prompt_encoder.embedding.weight"] + 1}, out / ENCODER_FILE)  # fmt: skip
    with pytest.raises(WeightsError, match="does not make the prompt_embeddings"):
        read_adapter(out, SMALL, method, rows, dtype=np.float32)
    (out / ENCODER_FILE).unlink()
    with pytest.raises(WeightsError, match=r"set method\.kind=prompt to start from that"):
        read_adapter(out, SMALL, method, rows, dtype=np.float32)
    prompt = PromptTuning(virtual_tokens=5)
    ((_, given),) = read_adapter(out, SMALL, prompt, adapter_table(SMALL, prompt), dtype=np.float64)
    np.testing.assert_allclose(given[...], method.encode(weights), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "other", "message"),
    [
        (PrefixTuning(virtual_tokens=5), PrefixTuning(virtual_tokens=6), "set method.virtual_tokens=5"),
        (PrefixTuning(virtual_tokens=5), PromptTuning(virtual_tokens=5), "starts from PROMPT_TUNING or P_TUNING"),
        (PTuning(virtual_tokens=5), PTuning(virtual_tokens=5, encoder="lstm"), "set method.encoder=mlp"),
        (Adapter(bottleneck=3), Adapter(bottleneck=4), "set method.bottleneck=3"),
        (Adapter(bottleneck=3), Adapter(bottleneck=3, activation="silu"), "set method.activation=relu"),
        (LoRA(rslora=True), LoRA(), "set method.rslora=true"),
        (LoRA(), DoRA(), "use_dora is not set, so it is LoRA's; set method.kind=lora"),
        (DoRA(), LoRA(), "use_dora=True is unsupported"),
        (DoRA(rank=4), DoRA(), "set method.rank=4"),
    ],
)  # fmt: skip
def test_an_adapter_of_other_settings_is_refused(tmp_path: Path, method, other, message: str):
    write_adapter(tmp_path / "a", drawn(method), model=SMALL, method=method, base="x")
    with pytest.raises(WeightsError, match=message):
        read_adapter(tmp_path / "a", SMALL, other, adapter_table(SMALL, other), dtype=np.float32)


@pytest.mark.parametrize(
    "other", [{"layers": 2 * SMALL.layers, "head_dim": SMALL.head_dim // 2}, {"kv_heads": 4, "head_dim": 6}]
)
def test_a_prefix_of_another_model_is_refused_where_its_size_is_the_same(
    tmp_path: Path, other: dict[str, int]
):
    method, model = PrefixTuning(virtual_tokens=5), replace(SMALL, **other)
    weights = drawn(method, model=model)
    assert [a.shape for a in weights.values()] == [a.shape for a in drawn(method).values()]
    write_adapter(tmp_path / "a", weights, model=model, method=method, base="x")
    with pytest.raises(WeightsError, match="it is another model's"):
        read_adapter(tmp_path / "a", SMALL, method, adapter_table(SMALL, method), dtype=np.float32)


def test_a_text_is_a_start(make_recipe: Make):
    text = {"init": "text", "text": "what is the answer", "virtual_tokens": 9}
    recipe = make_recipe(method={"kind": "prompt"} | text)
    started = {p.name: w[...] for p, w in starting_weights(resolve(recipe))}
    rows, table = started["prompt_encoder.embedding.weight"], started["model.embed_tokens.weight"]
    found = [np.flatnonzero((table == row).all(-1)).tolist() for row in rows]
    assert all(len(ids) == 1 for ids in found)
    prefix = make_recipe(method={"kind": "prefix"} | text)
    started = {p.name: w for p, w in starting_weights(resolve(prefix))}
    given = started["prompt_encoder.embedding.weight"][...].reshape(9, 2 * SMALL.layers, SMALL.kv_heads, -1)
    expected = keys_and_values(SMALL, started, [ids[0] for ids in found])
    np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-6)


def test_only_lora_is_merged(make_recipe: Make, tmp_path: Path):
    for method in (m for m in ADDED if m.not_merged):
        recipe, weights = make_recipe(method=method.model_dump()), drawn(method)
        save_checkpoint(tmp_path, Checkpoint(1, weights, weights, weights), recipe=recipe)
        with pytest.raises(RecipeError, match=f"method.kind={method.kind} cannot be merged"):
            export(recipe, out=tmp_path, merge=True)
        export(recipe, out=tmp_path, merge=False)
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert config["token_dim"] == (WIDTH if isinstance(method, PrefixTuning) else SMALL.embed)


def test_what_is_trained_and_saved_is_said(make_recipe: Make):
    def said(method: Method) -> str:
        return describe(run_of(make_recipe(method=method.model_dump()), SMALL, None))

    line = said(PTuning(virtual_tokens=8, hidden=6))
    trained = sum(p.size for p in adapter_table(SMALL, PTuning(virtual_tokens=8, hidden=6)))
    assert f"ptuning trains {trained:,}" in line
    rows, encoder = (size * 4 / 2**20 for size in (8 * SMALL.embed, trained))
    assert line.endswith(f"its adapter has {rows:.2f} MiB, its encoder {encoder:.2f}")
    prompt = said(PromptTuning(virtual_tokens=8))
    assert prompt.endswith(f"its adapter has {rows:.2f} MiB")
    assert "adapter has" not in said(Full())
