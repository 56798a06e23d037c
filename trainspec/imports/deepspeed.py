"""DeepSpeed's JSON, as a file beside a Trainer's arguments. Its `auto` means what those say."""

from __future__ import annotations

from typing import Any

from trainspec.imports.settings import (
    By,
    Case,
    NoEffect,
    Only,
    Outcome,
    Read,
    Refused,
    Setting,
    Translated,
    idle,
    number,
    only_off,
    within,
)
from trainspec.imports.training import ZERO

SOURCE = "DeepSpeed 0.19.8, runtime/config.py and zero/config.py"
MARKS = (
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_clipping",
    "zero_allow_untested_optimizer",
)


def stage(case: Case) -> int | None:
    """ZeRO's stage, where there is a DeepSpeed file; its default is 0."""
    value = case["deepspeed.zero_optimization.stage"]
    return (value if value in tuple(ZERO) else 0) if case.has("deepspeed") else None


def is_used(case: Case) -> bool:
    """Whether there is a DeepSpeed file: what it leaves out is then not what the training arguments say."""
    return any(name.startswith("deepspeed.") for name in case.given)


def agrees(key: str, *, element: int | None = None) -> By:
    """`auto`, or the value that the Trainer's own setting has given `key`: with another one the Trainer does not start."""

    def decide(value: Any, case: Case) -> Outcome:
        ours = case.ours.get(key)
        if element is not None and isinstance(ours, list):
            ours = ours[element]
        same = value == "auto" or case.chose(key) or value == ours or (not value and ours is None)
        if same:
            return Translated(note=f"with {key}")
        return Refused(
            f"{value}, where the training arguments make {key}={ours}", "say auto, or the same in both"
        )

    return By(decide, f"as `{key}`; `auto`, or the same")


def micro_batch(value: Any, case: Case) -> Outcome:
    """Examples of one device and pass."""
    devices = case.answers.devices
    if value == "auto" or devices is None or case.chose("batch.global_examples", "batch.accumulation"):
        return Translated(note="with batch.global_examples")
    whole, parts = case.ours.get("batch.global_examples", 0), case.ours.get("batch.accumulation", 1) * devices
    if number(value) * parts == whole:
        return Translated(note="with batch.global_examples")
    return Refused(
        f"{value}, where the training arguments make {whole // parts}", "say auto, or the same in both"
    )


def bf16(value: Any, case: Case) -> Outcome:
    """bf16's switch, which has to be the Trainer's."""
    ours = case.ours.get("precision.policy") == "bf16"
    if value == "auto" or case.chose("precision.policy") or bool(value) == ours:
        return Translated(note="with precision.policy")
    return Refused(f"{value}, where the training arguments make bf16 {ours}", "say auto, or the same in both")


def fp16(value: Any, case: Case) -> Outcome:
    """fp16's switch: `auto` is refused with the Trainer's fp16, if at all."""
    if value in ("auto", False):
        return NoEffect("float16: off")
    return Refused("float16 with a scaled loss", "--their deepspeed.fp16.enabled=false --their bf16=true")


def accumulation_type(value: Any, case: Case) -> Outcome:
    """The type in which gradients are summed, which `precision.reduce` has from here."""
    if value in ("fp32", "float32", "bf16", "bfloat16"):
        return Translated(note="with precision.reduce")
    return Refused(f"gradients summed in {value}", "fp32 or bf16")


def communication_type(value: Any, case: Case) -> Outcome:
    """The type in which gradients travel; here it is that of their sum."""
    ours = case.ours.get("precision.reduce")
    if {"fp32": "fp32", "bf16": "bf16"}.get(str(value)) == ours:
        return Translated(note="with precision.reduce")
    return Translated(
        note=f"differs: there gradients travel in {value}, here in the type of their sum, {ours}"
    )


def shards(value: Any, case: Case) -> Outcome:
    """ZeRO's stage."""
    if value in tuple(ZERO):
        return Translated(note=f"with plan.shards: {ZERO[value]}")
    return Refused(f"ZeRO's stage {value}", "0, 1, 2 or 3")


# What DeepSpeed's Adam takes where `optimizer.params` leaves it out, whatever the training arguments say (ops/adam).
OWN_DEFAULTS = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}


def optimizer(value: Any, case: Case) -> Outcome:
    """AdamW under its two names; DeepSpeed's `Adam` decays as AdamW does unless `adam_w_mode` is false."""
    if str(value).lower() not in ("adam", "adamw"):
        return Refused(f"the optimizer {value}", "--drop deepspeed.optimizer trains with AdamW")
    for name, default in OWN_DEFAULTS.items():
        ours = case.ours.get(f"optimizer.{name}")
        if not case.has(f"deepspeed.optimizer.params.{name}") and ours != default:
            return Refused(
                f"no params.{name}: DeepSpeed takes {default} then, where the training arguments make {ours}",
                f"--their deepspeed.optimizer.params.{name}=auto, or {default} in both",
            )
    return Translated(note="AdamW, as here")


_SCHEDULER = "--drop deepspeed.scheduler follows the training arguments' schedule"


def scheduler(value: Any, case: Case) -> Outcome:
    """DeepSpeed's schedulers count and warm up otherwise: logarithmically, unless they are told."""
    return Refused(f"DeepSpeed's scheduler {value}, whose rates are not the Trainer's", _SCHEDULER)


_OFFLOAD = "state stays on the devices here; the numbers are the same"
_BUFFERS = "how gradients and weights travel, not what they are"
_LOSS_SCALE = "only float16 scales the loss"
_PRINTS = "what is measured and printed"

SETTINGS = within(
    "deepspeed",
    (
        Setting("train_batch_size", agrees("batch.global_examples")),
        Setting(
            "train_micro_batch_size_per_gpu", By(micro_batch, "as the global batch; `auto`, or the same")
        ),
        Setting(
            "gradient_accumulation_steps",
            agrees("batch.accumulation"),
            1,
            "DeepSpeedPlugin, accelerate",
            is_used,
        ),
        Setting(
            "gradient_clipping", agrees("optimizer.clip_norm"), 1.0, "GRADIENT_CLIPPING_DEFAULT", is_used
        ),
        Setting("bf16.enabled", By(bf16, "as `precision.policy`; `auto`, or the same")),
        Setting("bfloat16.enabled", By(bf16, "as `precision.policy`; `auto`, or the same")),
        Setting(
            "fp16.enabled", By(fp16, "accepted as `auto` or off; else refused: float16 with a scaled loss")
        ),
        *idle(
            _LOSS_SCALE,
            *(
                f"fp16.{name}"
                for name in (
                    "auto_cast",
                    "loss_scale",
                    "initial_scale_power",
                    "loss_scale_window",
                    "hysteresis",
                    "consecutive_hysteresis",
                    "min_loss_scale",
                )
            ),
        ),
        *only_off(
            "state in half precision",
            "fp16.fp16_master_weights_and_grads",
            "bf16.bf16_master_weights_and_grads",
            "bf16.bf16_optimizer_states",
        ),
        *idle(
            "when a gradient is added to its sum", "bf16.immediate_grad_update", "bf16.check_grad_overflow"
        ),
        Setting(
            "data_types.grad_accum_dtype",
            By(accumulation_type, "`precision.reduce`; without it bf16 under bf16"),
        ),
        Setting(
            "communication_data_type",
            By(communication_type, "as `precision.reduce`; another type is named as a difference"),
        ),
        Setting("torch_autocast.enabled", Only("autocast inside DeepSpeed")),
        Setting(
            "zero_optimization.stage", By(shards, "`plan.shards`: nothing, optimizer, gradients, params")
        ),
        *idle(
            _OFFLOAD,
            "zero_optimization.offload_optimizer.*",
            "zero_optimization.offload_param.*",
            "zero_optimization.cpu_offload",
            "zero_optimization.cpu_offload_param",
            "zero_optimization.cpu_offload_use_pin_memory",
            "zero_force_ds_cpu_optimizer",
        ),
        *idle(
            _BUFFERS,
            *(
                f"zero_optimization.{name}"
                for name in (
                    "allgather_partitions",
                    "allgather_bucket_size",
                    "overlap_comm",
                    "reduce_scatter",
                    "reduce_bucket_size",
                    "contiguous_gradients",
                    "round_robin_gradients",
                    "sub_group_size",
                    "use_multi_rank_bucket_allreduce",
                    "prefetch_bucket_size",
                    "stage3_prefetch_bucket_size",
                    "param_persistence_threshold",
                    "stage3_param_persistence_threshold",
                    "model_persistence_threshold",
                    "stage3_model_persistence_threshold",
                    "max_live_parameters",
                    "stage3_max_live_parameters",
                    "max_reuse_distance",
                    "stage3_max_reuse_distance",
                    "stage3_module_granularity_threshold",
                    "module_granularity_threshold",
                    "use_all_reduce_for_fetch_params",
                    "allgather_sequential",
                    "stage3_use_all_reduce_for_fetch_params",
                    "stage3_allgather_sequential",
                    "memory_efficient_linear",
                    "parameter_alignment",
                    "zero_hpz_partition_size",
                    "override_module_apply",
                    "log_trace_cache_warnings",
                    "enable_sanity_checks",
                    "ignore_unused_parameters",
                    "legacy_stage1",
                )
            ),
        ),
        *idle(
            "a checkpoint's files are our own",
            "zero_optimization.gather_16bit_weights_on_model_save",
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "zero_optimization.stage3_gather_fp16_weights_on_model_save",
            "zero_optimization.elastic_checkpoint",
            "zero_optimization.load_from_fp32_weights",
            "zero_optimization.pipeline_loading_checkpoint",
            "checkpoint.*",
        ),
        *only_off(
            "weights and gradients in fewer bits",
            "zero_optimization.zero_quantized_weights",
            "zero_optimization.zero_quantized_nontrainable_weights",
            "zero_optimization.zero_quantized_gradients",
        ),
        Setting("zero_optimization.compute_grad_norm", Only("updates without the gradient's norm", (True,))),
        *idle("AdamW is what there is", "zero_allow_untested_optimizer"),
        Setting("optimizer.type", By(optimizer, "AdamW; any other is refused")),
        Setting("optimizer.params.lr", agrees("optimizer.lr")),
        Setting("optimizer.params.betas", agrees("optimizer.betas")),
        Setting("optimizer.params.eps", agrees("optimizer.eps")),
        Setting("optimizer.params.weight_decay", agrees("optimizer.weight_decay")),
        Setting("optimizer.params.adam_w_mode", Only("decay within the gradient", (True,))),
        *idle("another program for the same update", "optimizer.params.torch_adam"),
        Setting("scheduler.type", By(scheduler, "refused: its rates are not the Trainer's")),
        Setting("scheduler.params.*", Read("deepspeed.scheduler.type")),
        Setting("prescale_gradients", Only("gradients scaled before they are summed")),
        Setting("gradient_predivide_factor", Only("gradients scaled before they are summed", (1, 1.0))),
        Setting("gradient_allreduce_op", Only("a sum of gradients instead of their mean", ("mean",))),
        Setting("amp.enabled", Only("apex amp")),
        Setting("sparse_gradients", Only("sparse gradients")),
        Setting(
            "tensor_parallel.autotp_size",
            Only("DeepSpeed's tensor parallelism", (0, 1), "--set plan.tensor=N splits layers here"),
        ),
        Setting("sequence_parallel_size", Only("sequence parallelism", (1,))),
        *idle(
            _PRINTS,
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "log_level",
            "flops_profiler.*",
            "tensorboard.*",
            "wandb.*",
            "csv_monitor.*",
            "comms_logger.*",
            "comms_config.*",
            "monitor_config.*",
        ),
        *idle("plan.remat says it", "activation_checkpointing.*"),
        *idle(
            "how the engine loads and compiles",
            "aio.*",
            "compile.*",
            "disable_python_gc",
            "disable_allgather",
            "dataloader_drop_last",
            "elasticity.enabled",
            "autotuning.*",
        ),
    ),
)
