import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import VARIANTS

from trainspec.errors import ModelError, RecipeError
from trainspec.families import preset
from trainspec.files.hf import resolve_model
from trainspec.files.model_config import (
    config_notes,
    config_of,
    exported_config,
    model_spec_from_config,
    read_model_spec,
)
from trainspec.init import initial_value
from trainspec.methods import LoRA, adapter_table, target_modules
from trainspec.model import ModelSpec
from trainspec.params import Normal, Param, UniformFanIn, param_table
from trainspec.recipe import ModelSource
from trainspec.rope import DynamicScaling, inverse_frequencies

SPECS = VARIANTS | {"dynamic-rope": replace(VARIANTS["plain"], rope_scaling=DynamicScaling(2.0))}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_config_reads_back(spec: ModelSpec):
    assert model_spec_from_config(config_of(spec), name=spec.name, where="here") == spec


def test_older_rope_fields_are_read():
    config = config_of(VARIANTS["llama3-rope"])
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert model_spec_from_config(config, name="small", where="here") == VARIANTS["llama3-rope"]


def test_published_sizes():
    assert sum(p.size for p in param_table(preset("llama2-7b"))) == 6_738_415_616
    assert sum(p.size for p in param_table(preset("llama3-8b"))) == 8_030_261_248


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "supported: LlamaForCausalLM"),
        (
            {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
            "BloomForCausalLM.*'bloom'.* supported: Llama.*ChatGLMModel .model_type chatglm.$",
        ),
        ({"model_type": "mistral"}, "model_type 'mistral' are unsupported"),
        ({"architectures": None, "model_type": None}, "not given"),
        ({"architectures": 5}, "architectures 5"),
        ({"hidden_act": "gelu"}, "hidden_act: input should be 'silu'"),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config is unsupported: quantized",
        ),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config is unsupported"),
        ({"transformers_weights": "x.safetensors"}, "rename the file to model.safetensors"),
        ({"is_causal": False}, "is_causal"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_size": "x" * 10_000}, "hidden_size: input should be a valid integer, not 'x{119}[.]{3}$"),
        ({"hidden_size": "x"}, "hidden_size: input should be a valid integer, not 'x'"),
        ({"hidden_size": True}, "hidden_size: input should be a valid integer"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"num_key_value_heads": -2}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "abc"}}, "rope_parameters.rope_theta"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 with rope_type linear is unsupported",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "'linear', 'dynamic', 'llama3' or 'yarn', not 'proportional'",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "not 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type yarn needs factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type linear needs factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor: input should be greater than 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_scaling says rope_type linear \(2\), theta 10000, rope_parameters rope_type default, theta 500000",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "needs factor"),
    ],
)
def test_unsupported_configs_are_refused_in_one_line(tmp_path: Path, change: dict, message: str):
    (tmp_path / "config.json").write_text(json.dumps(config_of(VARIANTS["plain"]) | change))
    with pytest.raises(ModelError, match=message) as caught:
        read_model_spec(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "weights", "message"),
    [
        ("nowhere/at-all", "pretrained", "no directory nowhere/at-all"),
        ("preset:tiny", "pretrained", "model.weights=random"),
        ("preset:tony", "random", "did you mean 'tiny'"),
        ("preset:tony", "pretrained", "did you mean 'tiny'"),
    ],
)
def test_missing_models(source: str, weights: str, message: str):
    with pytest.raises(ModelError, match=message):
        resolve_model(ModelSource.model_validate({"from": source, "weights": weights}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_model_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_is_no_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter; set method.adapter to it"):
        read_model_spec(tmp_path)


CHANGES: list[tuple[dict, str]] = [
    ({"rope_theta": 1e3}, "rope_theta is 10000, as its rope settings say; the 1000 beside them is not used"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not used"),
    (
        {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}},
        "rope_parameters has 'factor', which rope_type default does",
    ),
    ({"auto_map": {"AutoModel": "x.Y"}}, "is not run"),
    ({"pad_token_id": 320}, "pad_token_id 320 is beyond the 320 rows"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_settings_that_say_two_things_are_noted(change: dict, message: str):
    config = config_of(VARIANTS["plain"])
    assert config_notes(config, where="here") == []
    assert model_spec_from_config(config | change, name="small", where="here") == VARIANTS["plain"]
    (note,) = config_notes(config | change, where="here")
    assert message in note
    assert "\n" not in note


@pytest.mark.parametrize("change", [change for change, _ in CHANGES])
def test_an_exported_config_says_one_thing(change: dict):
    written = exported_config(config_of(VARIANTS["plain"]) | change, VARIANTS["plain"])
    assert model_spec_from_config(written, name="small", where="here") == VARIANTS["plain"]
    assert not [note for note in config_notes(written, where="") if "rope_theta" in note or "pad" in note]


def test_an_exported_config_has_no_null_switches():
    nulls = dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "rope_theta"))
    written = exported_config(
        config_of(VARIANTS["plain"]) | nulls | {"architectures": None}, VARIANTS["plain"]
    )
    assert not [key for key in nulls if key in written and written[key] is None]
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    spec = VARIANTS["llama3-rope"]
    plain = inverse_frequencies(replace(spec, rope_scaling=None), np.float64)
    scaled = inverse_frequencies(spec, np.float64)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8.0
    assert ((scaled <= plain) & (scaled >= plain / 8.0)).all()


def test_table_names_are_unique_and_norms_and_biases_do_not_decay():
    for spec in VARIANTS.values():
        table = param_table(spec)
        assert len({p.name for p in table}) == len(table)
        assert {p.decay for p in table if p.role == "norm" or p.name.endswith("bias")} == {False}
        assert all(len(p.shape) == len(p.axes) for p in table)


def test_targets_by_name_tail_regex_and_all_linear():
    spec = VARIANTS["plain"]
    assert target_modules(spec, LoRA(targets=("q_proj",))) == tuple(
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    )
    assert target_modules(spec, LoRA(targets=r".*layers\.1\..*(k|v)_proj")) == (
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    )
    assert len(target_modules(spec, LoRA(targets="all-linear"))) == 14
    assert target_modules(spec, LoRA(targets=("lm_head",))) == ("lm_head",)


@pytest.mark.parametrize("targets", [("q_proj", "query"), "nothing.*", ("proj",), "(", "q_proj", (), ""])
def test_a_target_that_matches_nothing_lists_what_would(targets):
    with pytest.raises(
        RecipeError, match=r"would match|regular expression|nothing would be trained"
    ) as caught:
        target_modules(VARIANTS["plain"], LoRA(targets=targets))
    assert "\n" not in str(caught.value)


def test_adapter_rows_take_their_axes_from_the_base():
    rows = adapter_table(VARIANTS["plain"], LoRA(rank=4, targets=("q_proj",)))
    assert [(p.shape, p.axes) for p in rows[:2]] == [
        ((4, 32), ("rank", "embed")),
        ((48, 4), ("heads", "rank")),
    ]
    assert rows[0].name == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _row(init) -> Param:
    return Param("w.weight", (400, 300), ("a", "b"), init, True, "linear")


def test_initial_values_have_the_named_distribution_and_depend_on_seed_and_name():
    normal = initial_value(_row(Normal(0.02)), seed=3, dtype=np.float64)
    assert abs(normal.std() - 0.02) < 1e-4
    assert abs(normal.mean()) < 3e-4
    uniform = initial_value(_row(UniformFanIn(25)), seed=3, dtype=np.float64)
    assert np.abs(uniform).max() <= 0.2
    assert abs(uniform.std() - 0.2 / 3**0.5) < 1e-3
    assert not np.array_equal(normal, initial_value(_row(Normal(0.02)), seed=4, dtype=np.float64))
    other = initial_value(replace(_row(Normal(0.02)), name="v.weight"), seed=3, dtype=np.float64)
    assert not np.array_equal(normal, other)


def test_a_null_rope_type_beside_another_is_refused():
    rope = {"rope_type": None, "type": "linear", "factor": 2.0}
    with pytest.raises(ModelError, match="rope_type null and type 'linear'"):
        model_spec_from_config(
            config_of(VARIANTS["plain"]) | {"rope_parameters": None, "rope_scaling": rope},
            name="x",
            where="x",
        )
