"""Hugging Face's Trainer: the dict of its TrainingArguments, as `to_json_string` or a command line writes it."""

from __future__ import annotations

import math
from typing import Any

from trainspec.imports import deepspeed, peft
from trainspec.imports.settings import (
    By,
    Case,
    NoEffect,
    Only,
    Outcome,
    Question,
    Read,
    Refused,
    Same,
    Setting,
    Translated,
    idle,
    number,
    only_off,
)
from trainspec.imports.tool import Tool
from trainspec.imports.training import (
    BEST,
    BEST_BY,
    CLIP_NORM,
    END_OF_SCHEDULE,
    MEAN_OF_MEANS,
    NO_FP16,
    NO_MODEL,
    NO_RECORDS,
    PRECISION,
    REMAT,
    WARMUP,
    WEIGHT_DECAY,
    asked,
    batch,
    betas,
    every,
    model,
    optimizer,
    plan,
    precision,
    sampling,
    schedule,
    steps,
    tf32,
    warmup_ratio,
    warmup_steps,
)

SOURCE = "TrainingArguments, transformers 5.23.0"


def sharding(case: Case) -> str:
    """What ZeRO or FSDP shards, in our words."""
    stage = deepspeed.stage(case)
    if stage is not None:
        return deepspeed.ZERO[stage]
    words = str(case["fsdp"] or "")
    if "shard_grad_op" in words:
        return "gradients"
    return "params" if case["fsdp"] and "no_shard" not in words else "nothing"


def fsdp(value: Any, case: Case) -> Outcome:
    """FSDP's switch: `true`, or its older words."""
    words = " ".join(value) if isinstance(value, list) else str(value)
    if "hybrid" in words:
        return Refused(f"FSDP's {words}", "--their fsdp=full_shard, or --set plan.data=N --set plan.fsdp=M")
    return Translated(note="with (devices)") if value else NoEffect("FSDP: off")


def method(value: Any, case: Case) -> Outcome:
    """Every weight is trained unless there is an adapter's file."""
    return (
        NoEffect("the adapter's file says it")
        if case.has("adapter_config")
        else Translated({"method.kind": "full"})
    )


def bf16(value: Any, case: Case) -> Outcome:
    """bf16 by autocast over float32 weights, or DeepSpeed's."""
    if case["fp16"]:
        return NoEffect("fp16 comes first")
    return precision(value, case)


def save_limit(value: Any, case: Case) -> Outcome:
    """How many checkpoints are kept; no limit is not to be had."""
    if not value:
        return NoEffect("the newest checkpoints are kept: checkpoint.keep")
    return Translated({"checkpoint.keep": number(value, least=1, whole=True)})


def dtype_of(name: str) -> By:
    """The type that the model is loaded in."""

    def decide(value: Any, case: Case) -> Outcome:
        whole = value in ("float32", "fp32", None)
        if whole or case.has("deepspeed") or case["fsdp"]:
            return NoEffect("what is trained has float32 masters, there as here")
        if case.ours.get("precision.policy") != "bf16" and value != "auto":
            return Refused(
                f"a model in {value} without bf16", f"--their bf16=true, or --their {name}=float32"
            )
        if case.ours.get("method.kind") != "full":
            return NoEffect("frozen weights are bfloat16 under precision.policy=bf16, there as here")
        return Translated(
            note="differs: there bfloat16 weights are updated as they are; here they have float32 masters"
        )

    return By(decide, "no effect, but for a full model updated in bfloat16: a difference is named")


def count_updates(case: Case, examples: int, global_examples: int) -> int:
    """Updates of a run (`Trainer.set_initial_training_values`): every epoch is rounded up to whole updates.

    `dataloader_drop_last` drops what does not fill a pass over the devices, not what does not fill an update.
    """
    accumulation = number(case.ours.get("batch.accumulation", 1), least=1, whole=True)
    pass_examples = max(1, global_examples // accumulation)
    dropped = examples % pass_examples if case["dataloader_drop_last"] else 0
    passes = -(-(examples - dropped) // pass_examples)
    return math.ceil(case.number("num_train_epochs", least=0) * max(1, -(-passes // accumulation)))


_BETAS, _BETA2 = betas("adam_beta1", "adam_beta2")
_EPOCHS, _MAX_STEPS = steps(
    epochs="num_train_epochs",
    max_steps="max_steps",
    count=count_updates,
    uneven="there they are an update of their own or are dropped, here the next epoch fills it up",
)
_LOGS = "what is printed, logged and reported"
_HUB = "nothing is uploaded"
_LOADER = "how batches are loaded, not what is in them"
_SPEED = "another program for the same arithmetic"
_DDP = "how devices talk to each other"
_EVALUATION = "the held-out loss is measured every run.eval_every_steps"
_CHECKPOINT = "checkpoints are written every checkpoint.every_steps"
_OLD = "no longer read by transformers"

BESIDE = ("deepspeed", "adapter_config")
# What decides numbers, in the order in which one needs the other.
NUMBERS = (
    Setting("model_name_or_path", By(model, "`model.from`", ("model.from",)), NO_MODEL),
    Setting("per_device_train_batch_size", batch(per_device="per_device_train_batch_size", accumulation="gradient_accumulation_steps"), 8),
    Setting("gradient_accumulation_steps", Same("batch.accumulation"), 1),
    Setting("max_steps", _MAX_STEPS),
    Setting("num_train_epochs", _EPOCHS, 3.0),
    Setting("dataloader_drop_last", Read("num_train_epochs")),
    Setting("bf16", By(bf16, "`precision.policy`, `precision.reduce`", PRECISION), False),
    Setting("fp16", Only(NO_FP16, way_out="--their fp16=false --their bf16=true")),
    Setting("tf32", By(tf32, "no effect, but for float32: a difference is named")),
    Setting("torch_dtype", dtype_of("torch_dtype")),
    Setting("dtype", dtype_of("dtype")),
    plan(sharding),
    Setting("learning_rate", Same("optimizer.lr"), 5e-5),
    Setting("adam_beta1", _BETAS, 0.9),
    Setting("adam_beta2", _BETA2, 0.999),
    Setting("adam_epsilon", Same("optimizer.eps"), 1e-8),
    Setting("weight_decay", WEIGHT_DECAY, 0.0),
    Setting("max_grad_norm", CLIP_NORM, 1.0),
    Setting("optim", optimizer("optim"), "adamw_torch_fused"),
    *only_off("arguments of another optimizer", "optim_args", "optim_target_modules"),
    Setting("lr_scheduler_type", By(schedule, "`schedule.kind`, `schedule.final_ratio`: linear, cosine, cosine_with_min_lr, constant, constant_with_warmup", ("schedule.kind", "schedule.final_ratio")), "linear"),
    Setting("lr_scheduler_kwargs.min_lr_rate", END_OF_SCHEDULE),
    Setting("lr_scheduler_kwargs.min_lr", END_OF_SCHEDULE),
    Setting("lr_scheduler_kwargs.num_cycles", Only("another number of waves of the cosine", (0.5,))),
    Setting("lr_scheduler_kwargs", Only("arguments of the schedule")),
    Setting("warmup_steps", By(warmup_steps, "`schedule.warmup_steps`, or below 1 `schedule.warmup_ratio`", WARMUP), 0),
    Setting("warmup_ratio", By(warmup_ratio, "`schedule.warmup_ratio`", WARMUP)),
    Setting("average_tokens_across_devices", MEAN_OF_MEANS, True),
    Setting("gradient_checkpointing", REMAT, False),
    Setting("activation_checkpointing", REMAT),
    Setting("seed", Same("run.seed", "random numbers are ours, not torch's"), 42),
    Setting("train_sampling_strategy", By(sampling, "no effect; where examples are grouped by length a difference is named")),
    Setting("group_by_length", By(sampling, "no effect; where true a difference is named")),
    Setting("save_steps", every("checkpoint.every_steps", strategy="save_strategy", otherwise=_CHECKPOINT), 500),
    Setting("save_total_limit", By(save_limit, "`checkpoint.keep`", ("checkpoint.keep",))),
    Setting("eval_steps", every("run.eval_every_steps", strategy="eval_strategy", otherwise=_EVALUATION)),
)  # fmt: skip

# What is not here, or does not matter here.
OTHERS = (
    *only_off("a smoothed loss", "label_smoothing_factor"),
    *only_off("noise on the embeddings", "neftune_noise_alpha"),
    *only_off("a batch that shrinks until it fits", "auto_find_batch_size"),
    BEST,
    *BEST_BY,
    *only_off("parallelism of accelerate's", "parallelism_config"),
    *only_off("apex or SageMaker", "fp16_opt_level", "mp_parameters", "sharded_ddp", way_out="--drop it"),
    Setting("accelerator_config.split_batches", Only("a global batch given as a device's")),
    Setting("split_batches", Only("a global batch given as a device's")),
    Setting("fsdp", By(fsdp, "`plan.shards`: params, or gradients for shard_grad_op", ("plan.data", "plan.fsdp"))),
    *idle("how FSDP wraps, loads and moves; the numbers are the same", "fsdp_config.*", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
    Setting("deepspeed", Read("deepspeed.*")),
    *deepspeed.SETTINGS,
    *idle("run.seed decides the order of the examples", "data_seed"),
    *idle("every run is deterministic", "full_determinism"),
    *idle("the held-out loss is measured in the run's own precision", "bf16_full_eval", "fp16_full_eval"),
    *idle(_SPEED, "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config.*",
          "liger_kernel_config", "use_cache", "torch_empty_cache_steps", "jit_mode_eval", "use_ipex", "torchdynamo",
          "gradient_checkpointing_kwargs.*", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs.*",
          "activation_checkpointing_kwargs", "half_precision_backend", "fp16_backend", "attn_implementation"),
    *idle(_LOGS, "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
          "include_num_input_tokens_seen", "include_tokens_per_second", "log_level", "log_level_replica", "disable_tqdm",
          "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_dir",
          "skip_memory_metrics", "debug"),
    *idle(_HUB, "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
          "hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
    *idle(_LOADER, "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
          "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns",
          "label_names", "length_column_name", "accelerator_config.*", "accelerator_config", "dispatch_batches"),
    *idle(_DDP, "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
          "ddp_timeout", "local_rank", "xpu_backend", "ray_scope", "use_cpu", "no_cuda", "use_mps_device", "tpu_num_cores",
          "tpu_metrics_debug", "world_size"),
    *idle(_EVALUATION, "eval_strategy", "evaluation_strategy", "eval_delay", "per_device_eval_batch_size",
          "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
          "eval_accumulation_steps", "include_for_metrics", "include_inputs_for_metrics", "batch_eval_metrics",
          "do_eval", "do_predict", "evaluate_during_training"),
    *idle(_CHECKPOINT, "save_strategy", "save_only_model", "save_on_each_node", "save_safetensors", "enable_jit_checkpoint"),
    *idle("a run resumes with `train --resume`", "resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *idle("`--out` says it", "output_dir", "overwrite_output_dir"),
    *idle("training is a command", "do_train"),
    *idle(_OLD, "per_gpu_train_batch_size", "per_gpu_eval_batch_size", "past_index", "use_legacy_prediction_loop"),
)  # fmt: skip

_METHOD = Setting(
    "(method)",
    By(method, "`method.kind`: full, unless there is an `adapter_config.json`", ("method.kind",)),
    "full",
    "no adapter_config.json",
)
# The Trainer is given batches by a script of the user's: no setting of its own says what is in them.
_SCRIPT = (
    asked("(records)", NO_RECORDS),
    asked(
        "(sequence length)",
        Question("--set data.sequence_tokens=N", "no setting of the Trainer's says how long an example is"),
    ),
    asked(
        "(loss on)",
        Question(
            "--set data.loss_on=all",
            "no setting of the Trainer's says where the loss is taken; or completion",
        ),
    ),
    asked(
        "(packing)",
        Question(
            "--set data.packing=false",
            "no setting of the Trainer's says whether examples are packed; or true",
        ),
    ),
)

TRAINER = Tool(
    name="Hugging Face's Trainer",
    marks=(
        "per_device_train_batch_size",
        "num_train_epochs",
        "lr_scheduler_type",
        "output_dir",
        "learning_rate",
    ),
    settings=(_METHOD, *peft.SETTINGS, *NUMBERS, *_SCRIPT, *OTHERS),
    source=SOURCE,
    beside=BESIDE,
)
