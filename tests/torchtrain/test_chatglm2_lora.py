"""LoRA on ChatGLM2's fused projection, as PEFT's own layers train it on a model of the published names: one A for q, k and v.

The judge is a torch module that is written from the published facts, with PEFT's LoRA of `query_key_value` and torch's AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chatglm2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chatglm2 import CONFIG, GROUPS, HEADS, WIDTH
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.numpy import load_file
from safetensors.torch import save_file
from small import write_tokenizer
from torch import Tensor, nn

from torchtrain.cluster import start
from torchtrain.dropout import CounterDropout, DropoutPoint
from torchtrain.step import init_state, train_step, weights_of
from trainspec.data import IGNORED, open_dataset
from trainspec.errors import RecipeError, WeightsError
from trainspec.families import FAMILIES
from trainspec.files.adapters import read_adapter, write_adapter
from trainspec.files.model_config import read_model_spec
from trainspec.imports.peft import DEFAULT_TARGETS
from trainspec.methods import DoRA, LoRA
from trainspec.params import param_table
from trainspec.runs.run import resolve

ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
STEPS, ROUNDING = 4, 1e-11
OPTIMIZER = {"lr": 3e-2, "weight_decay": 0.1, "clip_norm": 0.05}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONFIG["hidden_size"]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["layernorm_epsilon"])


def turned(x_BSHD: Tensor) -> Tensor:
    """Pairs of neighbours in the first half of each head."""
    half = WIDTH // 2
    first, second = x_BSHD[..., 0:half:2], x_BSHD[..., 1:half:2]
    angles = torch.outer(
        torch.arange(x_BSHD.shape[1], dtype=torch.float64),
        10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half),
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return torch.cat([pairs, x_BSHD[..., half:]], -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        embed = CONFIG["hidden_size"]
        self.query_key_value = nn.Linear(embed, (HEADS + 2 * GROUPS) * WIDTH)
        self.dense = nn.Linear(HEADS * WIDTH, embed, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        heads = self.query_key_value(x_BSE).unflatten(-1, (-1, WIDTH))
        q, k, v = heads.split([HEADS, GROUPS, GROUPS], 2)
        q, k = turned(q), turned(k)
        k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        embed, inner = CONFIG["hidden_size"], CONFIG["ffn_hidden_size"]
        self.dense_h_to_4h = nn.Linear(embed, 2 * inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, embed, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(F.silu(first) * second)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Published(nn.Module):
    """The modules by their published names."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        sizes = CONFIG["padded_vocab_size"], CONFIG["hidden_size"]
        layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_layers"]))
        embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(*sizes)})
        encoder = nn.ModuleDict({"layers": layers, "final_layernorm": Norm()})
        head = nn.Linear(sizes[1], sizes[0], bias=False)
        self.transformer = nn.ModuleDict({"embedding": embedding, "encoder": encoder, "output_layer": head})
        self.double()
        given = {name: torch.from_numpy(w).double() for name, w in weights.items() if "inv_freq" not in name}
        self.load_state_dict(given)

    def forward(self, ids: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts["embedding"]["word_embeddings"](ids)
        for layer in parts["encoder"]["layers"]:
            x = layer(x)
        return parts["output_layer"](parts["encoder"]["final_layernorm"](x))


def pefts(
    weights: dict[str, np.ndarray], targets: tuple[str, ...], *, dropout: float
) -> tuple[Any, DropoutPoint]:
    """The published model with PEFT's LoRA, drawn so that B is not zero; dropout is the shared generator's."""
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=list(targets))
    model, point = inject_adapter_in_model(config, Published(weights)), DropoutPoint()
    draw = np.random.default_rng(5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = torch.from_numpy(0.3 * draw.standard_normal(parameter.shape))
    ours = {"query_key_value": "self_attn.q_proj", "dense": "self_attn.o_proj",
            "dense_h_to_4h": "mlp.gate_up_proj", "dense_4h_to_h": "mlp.down_proj"}  # fmt: skip
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout") and dropout:
            layer, leaf = name.split(".")[3], name.rpartition(".")[2]
            module.lora_dropout["default"] = CounterDropout(
                f"model.layers.{layer}.{ours[leaf]}", seed=0, rate=dropout, point=point
            )
    return model, point


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights by the names of PEFT's file."""
    return {
        f"base_model.model.{name.replace('.default', '')}": p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


def write_pefts(
    directory: Path, tensors: dict[str, Tensor], targets: tuple[str, ...], *, dropout: float = 0.0
) -> None:
    """PEFT's adapter directory, its settings written by PEFT."""
    directory.mkdir()
    LoraConfig(
        r=3, lora_alpha=5, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    ).save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("targets", "dropout"),
    [(("query_key_value",), 0.0), pytest.param(ALL, 0.25, marks=pytest.mark.full)],
)
def test_updates_are_those_of_pefts_fused_layer(
    make_recipe: Callable[..., Any], tmp_path: Path, targets: tuple[str, ...], dropout: float
):
    """From PEFT's files, a few clipped and decayed updates, and back into files of PEFT's names."""
    weights = chatglm2.write_published(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    model, point = pefts(weights, targets, dropout=dropout)
    write_pefts(tmp_path / "a", adapter_of(model), targets, dropout=dropout)
    method = LoRA(rank=3, alpha=5.0, dropout=dropout, targets=targets, adapter=str(tmp_path / "a"))
    recipe = make_recipe(
        model={"from": str(tmp_path / "model")},
        method=method.model_dump(),
        precision={"policy": "fp64", "reduce": "fp64"},
        data={"sequence_tokens": 60, "too_long": "cut"},
        optimizer=OPTIMIZER,
        batch={"global_examples": 4, "accumulation": 2},
    )
    run = resolve(recipe)
    data, state = open_dataset(run, "train"), init_state(start(recipe))
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=OPTIMIZER["lr"], weight_decay=OPTIMIZER["weight_decay"])
    start_of = adapter_of(model)
    for step in range(STEPS):
        batch = data.batch(step, 4)
        point.step, point.rows = step, torch.arange(4, dtype=torch.int32)
        logits = model(torch.from_numpy(batch.input_ids).long())
        labels = torch.from_numpy(batch.labels).long()
        summed = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        adamw.zero_grad()
        (summed / batch.target_tokens).backward()
        norm = nn.utils.clip_grad_norm_(trained, OPTIMIZER["clip_norm"])
        adamw.step()
        state, metrics = train_step(state, batch, lr=OPTIMIZER["lr"])
        assert metrics.loss_sum == pytest.approx(summed.item(), rel=ROUNDING)
        # One A is counted once.
        assert metrics.grad_norm == pytest.approx(norm.item(), rel=ROUNDING)
        assert norm > OPTIMIZER["clip_norm"]
    write_adapter(tmp_path / "b", weights_of(state), model=run.spec, method=method, base="x")
    mine = load_file(tmp_path / "b/adapter_model.safetensors")
    theirs = adapter_of(model)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        moved = (tensor - start_of[name]).numpy()
        assert np.abs(moved).max() > 1e-3, name
        assert np.abs(mine[name] - tensor.numpy()).max() <= ROUNDING * np.abs(moved).max() * STEPS, name


def test_files_there_and_back_bit_for_bit_and_merged(tmp_path: Path):
    weights = chatglm2.write_published(tmp_path / "model")
    spec = read_model_spec(tmp_path / "model")
    model, _ = pefts(weights, ALL, dropout=0.0)
    before = {name: tensor.float() for name, tensor in adapter_of(model).items()}
    write_pefts(tmp_path / "a", before, ALL)
    method = LoRA(rank=3, alpha=5.0, targets=ALL)
    table = method.table(spec)
    read = {p.name: w[...] for p, w in read_adapter(tmp_path / "a", spec, method, table, dtype="float32")}
    write_adapter(tmp_path / "b", read, model=spec, method=method, base="x")
    after = load_file(tmp_path / "b/adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], tensor.numpy()) for name, tensor in before.items())
    # PEFT takes the directory that is written.
    config = LoraConfig.from_pretrained(str(tmp_path / "b"))
    assert set(config.target_modules or ()) == set(ALL)
    # Merged into the table's matrices, they are the rows of PEFT's merged matrix.
    name = "transformer.encoder.layers.1.self_attention.query_key_value"
    a, b = (before[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    whole = weights[f"{name}.weight"].astype(np.float64) + 5 / 3 * (b @ a).numpy()
    first = 0
    entries = {p.name: p for p in param_table(spec)}
    for part in "qkv":
        param = entries[f"model.layers.1.self_attn.{part}_proj.weight"]
        rows = slice(first, first + param.shape[0])
        merged = method.merged(param, weights[f"{name}.weight"][rows], read)
        np.testing.assert_allclose(merged, whole[rows], rtol=1e-12, atol=1e-14)
        first = rows.stop


def test_what_cannot_be_is_refused_by_name(tmp_path: Path):
    weights = chatglm2.write_published(tmp_path / "model")
    spec = read_model_spec(tmp_path / "model")
    model, _ = pefts(weights, ("query_key_value",), dropout=0.0)
    write_pefts(tmp_path / "a", adapter_of(model), ("query_key_value",))
    three = LoRA(rank=3, alpha=5.0, targets=("q_proj", "k_proj", "v_proj"))
    with pytest.raises(WeightsError, match=r"set method.targets=\[query_key_value\]"):
        read_adapter(tmp_path / "a", spec, three, three.table(spec), dtype="float32")
    with pytest.raises(RecipeError, match="'o_proj' beside names of the published code"):
        LoRA(targets=("query_key_value", "o_proj")).table(spec)
    with pytest.raises(RecipeError, match="'query_key_value' matches no linear layer"):
        DoRA(targets=("query_key_value",)).table(spec)
    # As many numbers as PEFT trains, and fewer than three pairs.
    assert sum(p.size for p in LoRA(rank=3, targets=("query_key_value",)).table(spec)) == sum(
        t.numel() for t in adapter_of(model).values()
    )


def test_an_import_takes_the_targets_that_peft_takes():
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {family.model_type: family.peft_targets for family in FAMILIES.values()}
    assert ours == {kind: theirs.get(kind) and tuple(theirs[kind]) for kind in ours}
    assert theirs["llama"] == DEFAULT_TARGETS
    assert None in ours.values()
