"""DeepSpeed: its configuration, and its update against plain torch and against Hugging Face's own model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from torchtrain import optim
from torchtrain.cluster import finish, start
from torchtrain.engines import make_engine
from torchtrain.engines.deepspeed import deepspeed_config
from torchtrain.step import init_state, moments_of, train_step, weights_of
from trainspec.data import open_dataset
from trainspec.errors import PlanError
from trainspec.families import PRESETS
from trainspec.recipe import Precision, Recipe
from trainspec.runs.run import resolve

FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.2, "targets": "all-linear"}
PACKED = {"packing": True, "sequence_tokens": 320}
FP32_EPS = float(np.finfo(np.float32).eps)


@contextmanager
def prepared(recipe: Recipe) -> Iterator[tuple]:
    start(recipe)
    try:
        state = init_state(resolve(recipe))
        yield state, open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    finally:
        finish()


def test_deepspeed_config_is_this(make_recipe):
    spec = replace(PRESETS["tiny"], embed=48)
    recipe = make_recipe(batch={"global_examples": 12, "accumulation": 3}, optimizer={"clip_norm": 0.25})
    assert deepspeed_config(recipe, spec) == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.25,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
    }
    split = make_recipe(
        batch={"global_examples": 12, "accumulation": 3},
        plan={"data": 2, "fsdp": 2, "shards": "params"},
        precision={"policy": "bf16", "reduce": "fp32"},
    )
    assert deepspeed_config(split, spec) == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 100_000_000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 48**2,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    for shards, stage in (("optimizer", 1), ("gradients", 2)):
        config = deepspeed_config(make_recipe(plan={"fsdp": 2, "shards": shards}), spec)
        zero = config["zero_optimization"]
        assert zero == {
            "stage": stage,
            "reduce_bucket_size": 100_000_000,
            "use_multi_rank_bucket_allreduce": False,
        }
    # Stage 0 makes a hidden first update in bf16.
    bf16 = make_recipe(precision={"policy": "bf16", "reduce": "fp32"})
    assert deepspeed_config(bf16, spec)["zero_optimization"]["stage"] == 1
    # A pipeline makes one run of all microbatches, and has no stage 0 that clips by the whole norm.
    pipe = deepspeed_config(
        make_recipe(batch={"global_examples": 12, "accumulation": 3}, plan={"pipe": 2, "microbatches": 2}),
        spec,
    )
    assert pipe["train_micro_batch_size_per_gpu"] == 2
    assert pipe["gradient_accumulation_steps"] == 6
    assert pipe["zero_optimization"]["stage"] == 1
    unclipped = deepspeed_config(make_recipe(optimizer={"clip_norm": None}), spec)
    assert unclipped["gradient_clipping"] == 0.0


def test_a_launcher_of_too_many_processes_is_refused(make_recipe, monkeypatch):
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match="2 processes"):
        start(make_recipe())


def distance_from_plain_torch(recipe: Recipe, *, rates: tuple[float, ...]) -> float:
    """Worst entry of any weight or moment after updates on one batch, as a share of its tensor's largest."""
    runs = []
    for plain in (False, True):
        with prepared(recipe) as (state, batch):
            if plain:
                fp64 = recipe.model_copy(update={"precision": Precision(policy="fp64", reduce="fp64")})
                engine = make_engine(resolve(fp64), state.model, state.optimizer, mesh=state.mesh)
                state = replace(state, engine=engine)
            for lr in rates:
                state, _ = train_step(state, batch, lr=lr)
            runs.append((weights_of(state), *moments_of(state)))
    return max(
        np.abs(mine[name] - theirs[name]).max() / max(np.abs(theirs[name]).max(), 1e-30)
        for mine, theirs in zip(*runs, strict=True)
        for name in theirs
    )


METHODS = pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])


@METHODS
@pytest.mark.parametrize("accumulation", [1, 4])
def test_deepspeed_without_a_clip_is_plain_torch_bit_by_bit(make_recipe, method, accumulation):
    recipe = make_recipe(
        method=method, data=PACKED, batch={"accumulation": accumulation}, optimizer={"clip_norm": None}
    )
    assert distance_from_plain_torch(recipe, rates=(0.0, 1e-3, 1e-2)) == 0


@METHODS
def test_deepspeed_clips_as_plain_torch_does(make_recipe, method, monkeypatch):
    recipe = make_recipe(method=method, batch={"accumulation": 2}, optimizer={"clip_norm": 0.05})
    # Both sum the squares of the norm in another order: the factor, squared in the second moment, is off by a few
    # roundings. One update only: Adam turns a rounding of the weights into more at the next.
    assert distance_from_plain_torch(recipe, rates=(1e-3,)) <= 4 * FP32_EPS
    # Negative control: the 1e-6 of the clip is ten roundings of a norm of one, and is seen.
    monkeypatch.setattr(optim, "CLIP_EPS", 0.0)
    assert distance_from_plain_torch(recipe, rates=(1e-3,)) > 4 * FP32_EPS


def test_first_updates_are_those_of_hugging_face_and_torch(make_recipe):
    """The whole of it made otherwise: from_pretrained, eager attention, padding mask, torch's clip and AdamW."""
    recipe = make_recipe("bias", method=FULL, batch={"accumulation": 2}, optimizer={"clip_norm": 0.05})
    model = AutoModelForCausalLM.from_pretrained(recipe.model.from_, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    recipe = recipe.model_copy(
        update={"optimizer": recipe.optimizer.model_copy(update={"weight_decay": 0.0})}
    )
    with prepared(recipe) as (state, batch):
        ids, labels = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.labels).long()
        for lr in (1e-3, 1e-3):
            before = weights_of(state)
            state, metrics = train_step(state, batch, lr=lr, keep="gradients")
            theirs_before = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
            logits = model(input_ids=ids, attention_mask=torch.from_numpy(batch.segments)).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            assert metrics.loss_sum / metrics.tokens == pytest.approx(loss.item(), rel=1e-6)
            assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-5)
            for name, gradient in gradients.items():
                # Sums of some hundred products in another order, each to FP32_EPS.
                assert np.abs(metrics.gradients[name] - gradient).max() < 3e-5 * np.abs(gradient).max(), name
                # Adam's update of an entry that is only rounding noise is noise as well: those are left out.
                clear = np.abs(gradient) > 1e-2 * np.abs(gradient).max()
                update = model.get_parameter(name).detach().numpy() - theirs_before[name]
                mine = weights_of(state)[name] - before[name]
                assert np.abs(mine - update)[clear].max() < 1e-2 * lr, name


def test_nothing_frozen_is_in_the_optimizer_or_has_a_gradient(make_recipe):
    with prepared(make_recipe(method=LORA)) as (state, batch):
        trained = sum(p.requires_grad for p in state.model.parameters())
        state, metrics = train_step(state, batch, lr=1e-3, keep="gradients")
        assert sum(len(group["params"]) for group in state.optimizer.param_groups) == trained
        assert len(metrics.gradients) == trained == 28
        assert all(p.grad is None for p in state.model.parameters() if not p.requires_grad)


def test_remat_is_on_in_the_module(make_recipe):
    with prepared(make_recipe(plan={"remat": "full"})) as (state, _):
        assert state.model.is_activation_checkpointing
