"""Axolotl: a YAML with names of its own, from which it makes the Trainer's arguments."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from trainspec.imports import deepspeed
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
    CLIP_NORM,
    EXAMPLES,
    FILE,
    MEAN_OF_MEANS,
    NO_FP16,
    NO_MODEL,
    PRECISION,
    RECORDS,
    REMAT,
    SPECIAL_TOKEN,
    VALIDATION,
    WARMUP,
    WEIGHT_DECAY,
    ZERO,
    batch,
    betas,
    model,
    optimizer,
    plan,
    records,
    sampling,
    schedule,
    source,
    steps,
    summed_in,
    template,
    tf32,
)

SOURCE = "Axolotl 067b021 (utils/schemas/) and TrainingArguments, transformers 5.23.0"
_BUILDER, _TRAINER = "core/builders/base.py", "TrainingArguments"


def method(value: Any, case: Case) -> Outcome:
    """LoRA, DoRA with `peft_use_dora`; without an adapter every weight is trained."""
    if not value:
        return Translated({"method.kind": "full"})
    if value == "lora":
        return Translated({"method.kind": "dora" if case["peft_use_dora"] else "lora"})
    return Refused(f"the adapter {value}", "--their adapter=lora trains LoRA on the model as it is")


def is_lora(case: Case) -> bool:
    """Whether an adapter is trained."""
    return bool(case["adapter"])


def targets(value: Any, case: Case) -> Outcome:
    """The list, unless every linear layer but the head is adapted (`find_all_linear_names`)."""
    if case["lora_target_linear"]:
        return NoEffect("lora_target_linear has them all")
    return Translated({"method.targets": value})


def all_targets(value: Any, case: Case) -> Outcome:
    """Every linear layer but the head."""
    return Translated({"method.targets": "all-linear"}) if value else NoEffect("lora_target_modules says it")


def count_updates(case: Case, examples: int, global_examples: int) -> int:
    """Updates of a run (`calculate_total_num_steps`): packed, every epoch is rounded down; else the whole run up."""
    epochs = Fraction(str(case.number("num_epochs", least=0)))
    if case["sample_packing"]:
        return max(1, math.floor(max(1, examples // global_examples) * epochs))
    return math.ceil(examples * epochs / global_examples)


_EPOCHS, _MAX_STEPS = steps(
    epochs="num_epochs",
    max_steps="max_steps",
    count=count_updates,
    uneven="there they are an update of their own or are left over, here the next epoch fills it up",
)


def warmup_steps(value: Any, case: Case) -> Outcome:
    """The warm-up in updates, by default 3 % of them and 100 at most (`_configure_warmup_and_logging`)."""
    if value is not None:
        return _warmup(number(value, least=0, whole=True))
    if case["warmup_ratio"] is not None:
        return NoEffect("warmup_ratio says it")
    total = case.ours.get("run.steps")
    return _no_total(case) if total is None else _warmup(min(int(0.03 * total), 100))


def warmup_ratio(value: Any, case: Case) -> Outcome:
    """The warm-up as a share, rounded down."""
    if case["warmup_steps"] is not None:
        return NoEffect("warmup_steps says it")
    total = case.ours.get("run.steps")
    return _no_total(case) if total is None else _warmup(int(number(value, least=0, most=1) * total))


def _warmup(updates: int) -> Outcome:
    # A number of 1 would be read as a share by the Trainer.
    return Translated({"schedule.warmup_steps": 2 if updates == 1 else updates})


def _no_total(case: Case) -> Outcome:
    answer = "--set schedule.warmup_ratio=R" if case.chose("run.epochs") else EXAMPLES
    return Question(answer, "the warm-up is a share of the updates, whose number is not known")


def rates(value: Any, case: Case) -> Outcome:
    """The Trainer's schedules, and the cosine that ends at `cosine_min_lr_ratio`."""
    end = case["cosine_min_lr_ratio"]
    if value == "cosine" and end:
        return Translated({"schedule.kind": "cosine", "schedule.final_ratio": number(end)})
    outcome = schedule(value, case)
    return (
        Refused(outcome.reason, "--their lr_scheduler=cosine or linear")
        if isinstance(outcome, Refused)
        else outcome
    )


def bf16(value: Any, case: Case) -> Outcome:
    """bf16, by default where the device has it. The model is loaded in bfloat16, and what an adapter trains in float32."""
    if value not in (True, False, "auto", "full"):
        return Refused(f"bf16={value}", "true, false or auto")
    policy = "bf16" if value or case["bfloat16"] else "fp32"
    ours = {"precision.policy": policy, "precision.reduce": summed_in(policy, case)}
    no_masters = policy == "bf16" and not case["adapter"] and not case.has("deepspeed") and not is_fsdp(case)
    if no_masters:
        ours["precision.reduce"] = "bf16"
        return Translated(
            ours, "differs: there bfloat16 weights are updated as they are; here they have float32 masters"
        )
    return Translated(ours)


def is_fsdp(case: Case) -> bool:
    """Whether FSDP shards the run."""
    return bool(case["fsdp"]) or case.has("fsdp_config")


def sharding(case: Case) -> str:
    """What ZeRO or FSDP shards, in our words."""
    stage = deepspeed.stage(case)
    if stage is not None:
        return ZERO[stage]
    words = f"{case['fsdp']} {case['fsdp_config.fsdp_sharding_strategy']} {case['fsdp_config.sharding_strategy']}".lower()
    keeps = "shard_grad_op" in words or case["fsdp_config.reshard_after_forward"] is False
    return ("gradients" if keeps else "params") if is_fsdp(case) else "nothing"


def strategy(value: Any, case: Case) -> Outcome:
    """FSDP's strategy."""
    if any(word in str(value).lower() for word in ("hybrid", "no_shard")):
        return Refused(f"FSDP's {value}", "--set plan.data=N --set plan.fsdp=M")
    return Translated(note="with (devices)")


def too_long(value: Any, case: Case) -> Outcome:
    """What happens to a record longer than an example."""
    words = {"drop": "skip", "truncate": "cut"}
    if str(value).lower() in words:
        return Translated({"data.too_long": words[str(value).lower()]})
    return Refused(f"excess_length_strategy={value}", "drop or truncate")


def packing(value: Any, case: Case) -> Outcome:
    """Packing whose records do not see one another."""
    return Translated({"data.packing": bool(value)})


# Kinds of data sets whose records are ours without a prompt of Axolotl's around them.
_CHAT, _TEXT = "chat_template", "completion"


def kinds(case: Case) -> set[str]:
    """The types of the data sets."""
    found = {
        str(value)
        for name, value in case.given.items()
        if name.startswith("datasets.") and name.endswith(".type")
    }
    return {"pretrain"} if case.has("pretraining_dataset") else found


def is_text(case: Case) -> bool:
    """Whether plain text is trained."""
    return bool(kinds(case)) and kinds(case) <= {_TEXT, "pretrain"}


def data_set(value: Any, case: Case) -> Outcome:
    """One data set of chats or of text is read as it is; several, or instructions in a prompt of Axolotl's, are asked for."""
    prefixes = {name.split(".")[1] for name in case.given if name.startswith("datasets.")}
    plain = kinds(case) <= {_CHAT, _TEXT} and len(prefixes) == 1
    if not plain or case.has("datasets.0.data_files") or case.has("datasets.0.name"):
        return records(value, case)
    named, split = source(str(value)), case["datasets.0.split"]
    return Translated({"data.train": f"{named}:{split}" if named.startswith("hub:") and split else named})


def data_type(value: Any, case: Case) -> Outcome:
    """What a record is, and the prompt around it."""
    if value == _TEXT:
        return Translated({"data.task": "text"})
    if value == _CHAT:
        return Translated(note="chats, as here")
    if case.chose("data.train"):
        return NoEffect("the records are those of --set data.train")
    return Question(
        FILE,
        f"type={value} puts a prompt of Axolotl's around each record; give prompt and completion as texts",
    )


def text_field(value: Any, case: Case) -> Outcome:
    """The field of plain text."""
    return (
        NoEffect("the field is text, as here")
        if value == "text"
        else Translated({"data.columns": {"text": value}})
    )


def chat_field(value: Any, case: Case) -> Outcome:
    """The field of a chat: OpenAI's messages, or ShareGPT's conversations."""
    ours = "conversations" if case["datasets.0.message_property_mappings.role"] == "from" else "messages"
    return (
        NoEffect(f"the field is {ours}, as here")
        if value == ours
        else Translated({"data.columns": {ours: value}})
    )


def roles(value: Any, case: Case) -> Outcome:
    """The turns that are trained on."""
    if set(value) <= {"assistant", "gpt"}:
        return NoEffect("the assistant's turns are trained, there as here")
    return Refused("a loss on turns that are not the assistant's", "--drop it")


def pretraining(value: Any, case: Case) -> Outcome:
    """Plain text that is streamed."""
    return Translated({"data.task": "text"})


def loss_on(value: Any, case: Case) -> Outcome:
    """On the answers, or on the prompt as well; of plain text on all."""
    return Translated({"data.loss_on": "all" if value or is_text(case) else "completion"})


def every(key: str, per_epoch: str) -> By:
    """How often per epoch, as updates from one time to the next."""

    def decide(value: Any, case: Case) -> Outcome:
        total = case.ours.get("run.steps")
        times = number(value) * case.number("num_epochs")
        if not total or times <= 0:
            return NoEffect(f"{key} says how often")
        return Translated({key: max(1, math.ceil(total / times))})

    return By(decide, f"`{key}`, in updates", (key,))


def every_steps(key: str) -> By:
    """How often in updates, of which a number below 1 is a share."""

    def decide(value: Any, case: Case) -> Outcome:
        total = case.ours.get("run.steps")
        if number(value) >= 1:
            return Translated({key: int(value)})
        return (
            Translated({key: max(1, math.ceil(total * value))})
            if total and value > 0
            else NoEffect(f"{key} says how often")
        )

    return By(decide, f"`{key}`", (key,))


def plugins(value: Any, case: Case) -> Outcome:
    """Programs for the same arithmetic are passed over, any other plugin is refused."""
    names = value if isinstance(value, list) else [value]
    others = [
        name
        for name in names
        if not any(known in str(name).lower() for known in ("liger", "cut_cross_entropy"))
    ]
    return (
        Refused(f"the plugin {others[0]}") if others else NoEffect("another program for the same arithmetic")
    )


_BETAS, _BETA2 = betas("adam_beta1", "adam_beta2")
_SPEED = "another program for the same arithmetic"
_LOGS = "what is printed, logged and reported"
_READING = "how records are read and cached"
_PACKS = "how records are put together, not what they are"
_CONFIG = "the checkpoint's own files say it"
_ONLY = "only a feature that is not in use has it"
_START = "how processes are started"

METHOD = (
    Setting("adapter", By(method, "`method.kind`: lora, dora, or full without it; qlora is refused", ("method.kind",)), None),
    Setting("peft_use_dora", Read("adapter")),
    Setting("lora_r", Same("method.rank"), Question("--set method.rank=N", "an adapter without lora_r"), applies=is_lora),
    Setting("lora_alpha", Same("method.alpha"), Question("--set method.alpha=N", "an adapter without lora_alpha"), applies=is_lora),
    Setting("lora_dropout", Same("method.dropout"), 0.0, applies=is_lora),
    Setting("peft_use_rslora", Same("method.rslora"), False, "LoraConfig, PEFT 0.21.2", is_lora),
    Setting("lora_target_linear", By(all_targets, "`method.targets`: all-linear", ("method.targets",)), applies=is_lora),
    Setting("lora_target_modules", By(targets, "`method.targets`", ("method.targets",)), applies=is_lora),
    Setting("lora_model_dir", Same("method.adapter"), applies=is_lora),
    Setting("peft_autocast_adapter_dtype", Only("an adapter in bfloat16", (True,))),
    *only_off("weights trained whole beside the adapter", "lora_modules_to_save"),
    *only_off("single tokens trained", "peft_trainable_token_indices"),
    *only_off("adapted tensors that are no linear layer", "lora_target_parameters"),
    *only_off("ranks of their own for some targets", "lora_rank_pattern", "lora_alpha_pattern"),
    *only_off("layers that are chosen by number", "peft_layers_to_transform", "peft_layers_pattern", way_out="a regular expression as lora_target_modules"),
    *only_off("layers repeated", "peft_layer_replication"),
    *only_off("weights stored the other way round", "lora_fan_in_fan_out"),
    Setting("peft_init_lora_weights", Only("another start of LoRA", (True,))),
    *only_off("another start of LoRA", "peft.loftq_config.loftq_bits", "loftq_config"),
    *only_off("LoRA+, another rate for B", "loraplus_lr_ratio"),
    *only_off("LoRA that is merged and started again", "relora", "relora_steps", "relora_warmup_steps"),
    *only_off("layers that are trained in turns", "lisa_n_layers", "lisa_step_interval"),
    *only_off("weights that are chosen by name", "unfrozen_parameters"),
    *idle(_ONLY, "loraplus_lr_embedding", "relora_prune_ratio", "relora_prune_method", "relora_cpu_offload", "lisa_layers_attribute"),
    *idle(_SPEED, "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "lora_on_cpu",
          "qlora_sharded_model_loading", "peft_ensure_weight_tying"),
    *idle("merging is `export --merge`", "merge_lora", "merge_method"),
)  # fmt: skip

NUMBERS = (
    Setting("base_model", By(model, "`model.from`", ("model.from",)), NO_MODEL),
    Setting("micro_batch_size", batch(per_device="micro_batch_size", accumulation="gradient_accumulation_steps"), 1),
    Setting("gradient_accumulation_steps", Same("batch.accumulation"), 1),
    *only_off("the batch of a device in one number", "batch_size", way_out="--drop batch_size --their gradient_accumulation_steps=N"),
    Setting("max_steps", _MAX_STEPS),
    Setting("num_epochs", _EPOCHS, 1.0),
    Setting("bf16", By(bf16, "`precision.policy`, `precision.reduce`", PRECISION), "auto"),
    Setting("bfloat16", Read("bf16")),
    *only_off(NO_FP16, "fp16", "float16", way_out="--their fp16=false --their float16=false --their bf16=true"),
    *only_off("float8", "fp8", "fp8_enable_fsdp_float8_all_gather"),
    *idle("bf16 says it", "float32"),
    Setting("tf32", By(tf32, "no effect, but for float32: a difference is named")),
    plan(sharding),
    Setting("learning_rate", Same("optimizer.lr"), Question("--set optimizer.lr=X", "the file has no learning_rate")),
    Setting("adam_beta1", _BETAS, 0.9, _TRAINER),
    Setting("adam_beta2", _BETA2, 0.999, _TRAINER),
    Setting("adam_epsilon", Same("optimizer.eps"), 1e-8, _TRAINER),
    Setting("weight_decay", WEIGHT_DECAY, 0.0),
    Setting("max_grad_norm", CLIP_NORM, 1.0, _TRAINER),
    Setting("optimizer", optimizer("optimizer"), "adamw_torch_fused"),
    *only_off("arguments of another optimizer", "optim_args", "optim_target_modules", "adam_beta3", "adam_epsilon2", "torchdistx_path"),
    *only_off("rates of their own for some weights", "embedding_lr", "embedding_lr_scale", "lr_groups"),
    Setting("lr_scheduler", By(rates, "`schedule.kind`, `schedule.final_ratio`: cosine, linear, constant", ("schedule.kind", "schedule.final_ratio")), "cosine"),
    Setting("cosine_min_lr_ratio", Read("lr_scheduler")),
    *only_off("another warm-up or end of the cosine", "cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_div_factor"),
    *only_off("a schedule that starts again", "jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps"),
    Setting("lr_scheduler_kwargs", Only("arguments of the schedule")),
    Setting("lr_scheduler_kwargs.*", Only("arguments of the schedule")),
    Setting("warmup_steps", By(warmup_steps, "`schedule.warmup_steps`; by default 3 %, 100 at most", WARMUP), None, _BUILDER),
    Setting("warmup_ratio", By(warmup_ratio, "`schedule.warmup_steps`, rounded down", WARMUP)),
    Setting("(average_tokens_across_devices)", MEAN_OF_MEANS, False, _BUILDER),
    Setting("gradient_checkpointing", REMAT, False),
    Setting("seed", Same("run.seed", "random numbers are ours, not torch's"), 42, _TRAINER),
    Setting("group_by_length", By(sampling, "no effect; where true a difference is named")),
    Setting("save_steps", every_steps("checkpoint.every_steps")),
    Setting("saves_per_epoch", every("checkpoint.every_steps", "saves_per_epoch")),
    Setting("save_total_limit", Same("checkpoint.keep"), 4, _BUILDER),
    Setting("eval_steps", every_steps("run.eval_every_steps")),
    Setting("evals_per_epoch", every("run.eval_every_steps", "evals_per_epoch")),
)  # fmt: skip

RECORDS_AND_LOSS = (
    Setting("datasets.*.path", By(data_set, "`data.train`, of one data set of chats or text; else asked for", ("data.train",)), Question(FILE, "the file names no records"), applies=lambda case: not case.has("pretraining_dataset")),
    Setting("datasets.*.type", By(data_type, "`data.task`: text for completion; chat_template is read as it is, others are asked for", ("data.task",))),
    Setting("datasets.*.type.*", RECORDS),
    Setting("datasets.*.split", Read("datasets.*.path")),
    Setting("datasets.*.data_files", Read("datasets.*.path")),
    Setting("datasets.*.name", Read("datasets.*.path")),
    Setting("datasets.*.field", By(text_field, "`data.columns`", ("data.columns",))),
    Setting("datasets.*.field_messages", By(chat_field, "`data.columns`", ("data.columns",))),
    Setting("datasets.*.message_property_mappings.*", Read("datasets.*.field_messages")),
    Setting("datasets.*.roles_to_train", By(roles, "accepted for the assistant; else refused")),
    Setting("datasets.*.train_on_eos", Only("another end token trained", ("turn",))),
    Setting("datasets.*.chat_template", By(template, "as `chat_template`", ("data.chat_template",))),
    Setting("datasets.*", RECORDS),
    *idle("the held-out loss is measured on data.heldout, where it is given", "test_datasets.*"),
    Setting("pretraining_dataset.*.type", By(pretraining, "`data.task`: text", ("data.task",)), "pretrain", applies=lambda case: case.has("pretraining_dataset")),
    Setting("pretraining_dataset.*.path", RECORDS),
    Setting("pretraining_dataset.*", RECORDS),
    Setting("pretraining_dataset", RECORDS),
    Setting("val_set_size", VALIDATION, 0.0),
    Setting("chat_template", By(template, "asked for: `--set data.chat_template=FILE`; tokenizer_default is the tokenizer's own", ("data.chat_template",))),
    Setting("chat_template_jinja", By(template, "as `chat_template`", ("data.chat_template",))),
    Setting("default_system_message", Same("data.system")),
    Setting("tokenizer_config", SPECIAL_TOKEN),
    *(Setting(f"special_tokens.{name}", SPECIAL_TOKEN) for name in ("bos_token", "eos_token", "unk_token", "additional_special_tokens")),
    *idle("padding has no effect on numbers", "special_tokens.pad_token", "pad_to_sequence_len", "pad_to_multiple_of"),
    *idle("empty, as if it were not there", "special_tokens"),
    *only_off("tokens that the vocabulary does not have", "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x", "shrink_embeddings", "eot_tokens"),
    Setting("sequence_len", Same("data.sequence_tokens"), 512),
    Setting("excess_length_strategy", By(too_long, "`data.too_long`: skip or cut", ("data.too_long",)), "drop", "utils/data/utils.py"),
    Setting("sample_packing", By(packing, "`data.packing`", ("data.packing",)), False),
    Setting("train_on_inputs", By(loss_on, "`data.loss_on`: all or completion", ("data.loss_on",)), False),
    *only_off("records that are left out for being short", "min_sample_len", "max_prompt_len"),
    *only_off("examples in the order of the file", "curriculum_sampling", "sample_packing_sequentially"),
    Setting("shuffle_merged_datasets", Only("examples in the order of the file", (True,))),
    *(Setting(name, RECORDS) for name in ("dataset_exact_deduplication", "dataset_shard_num", "dataset_shard_idx", "shuffle_before_merging_datasets", "skip_prepare_dataset")),
    *only_off("positions that skip", "use_pose"),
    *only_off("noise on the embeddings", "neftune_noise_alpha", "noisy_embedding_alpha"),
    *only_off("another loss", "use_eaft", "center_rewards_coefficient"),
    *idle(_ONLY, "eaft_alpha", "eaft_k", "pose_split_on_token_ids", "pose_max_context_len", "pose_num_chunks"),
    *idle(_PACKS, "sample_packing_group_size", "sample_packing_bin_size", "sample_packing_mp_start_method", "sample_packing_eff_est",
          "eval_sample_packing", "multipack_real_batches", "batch_flattening", "pretrain_multipack_buffer_size", "pretrain_multipack_attn",
          "streaming_multipack_buffer_size", "eval_sequence_len"),
    *idle(_READING, "dataset_prepared_path", "num_dataset_shards_to_save", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory",
          "dataloader_pin_memory", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_drop_last", "remove_unused_columns",
          "push_dataset_to_hub", "hf_use_auth_token", "is_preprocess", "preprocess_iterable", "total_num_tokens", "total_supervised_tokens",
          "streaming", "chat_template_kwargs.*"),
)  # fmt: skip

SHARDING = (
    Setting("fsdp", By(strategy, "`plan.shards`: params, or gradients for shard_grad_op")),
    Setting("fsdp_config.fsdp_sharding_strategy", By(strategy, "`plan.shards`")),
    Setting("fsdp_config.sharding_strategy", By(strategy, "`plan.shards`")),
    Setting("fsdp_config.reshard_after_forward", Read("(devices)")),
    *idle("how FSDP wraps, loads and moves; the numbers are the same", "fsdp_config.*", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type"),
    Setting("deepspeed", Read("deepspeed.*")),
    *deepspeed.SETTINGS,
    *(Setting(name, Only("a mesh of its own", (0, 1), "--drop it, and --set plan.data, plan.fsdp, plan.tensor")) for name in (
        "dp_shard_size", "dp_replicate_size", "tensor_parallel_size",
    )),
    *(Setting(name, Only("sequence parallelism", (0, 1))) for name in ("context_parallel_size", "sequence_parallel_degree")),
    *idle(_START, "world_size", "local_rank", "ddp", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters",
          "device", "device_map", "max_memory", "gpu_memory_limit", "use_ray", "ray_run_name", "ray_num_workers", "resources_per_worker.*",
          "accelerator_config.*", "accelerator_config", "heads_k_stride", "ring_attn_func", "deepcompile"),
)  # fmt: skip

OTHERS = (
    *only_off("a model in fewer bits", "load_in_8bit", "load_in_4bit", "gptq", "qat", "quantization", "gptq_groupsize", "gptq_model_v1",
              "model_quantization_config", "use_onebitllms", way_out="--drop it: the model is trained as it is"),
    *idle("only a quantised model has it", "bnb_config_kwargs.*", "model_quantization_config_kwargs.*", "embeddings_skip_upcast"),
    *only_off("training by preferences or rewards", "rl", "reward_model", "process_reward_model", "dpo_beta", "rl_beta", "ebft"),
    *idle(_ONLY, "trl.*", "vllm.*", "num_labels", "orpo_alpha", "simpo_gamma", "cpo_alpha", "kto_desirable_weight", "kto_undesirable_weight",
          "dpo_use_weighting", "dpo_label_smoothing", "precompute_ref_log_probs"),
    *only_off("another settings of the model than its config", "overrides_of_model_config", "overrides_of_model_kwargs", "rope_scaling",
              way_out="a directory with that config.json"),
    Setting("overrides_of_model_config.*", Only("another setting of the model than its config", (), "a directory with that config.json")),
    *only_off("another revision of the model", "revision_of_model", way_out="--set model.from=DIRECTORY with that revision, and --drop it"),
    *only_off("a batch that shrinks until it fits", "auto_find_batch_size"),
    *only_off("the best checkpoint instead of the last", "load_best_model_at_end", "early_stopping_patience"),
    *only_off("norms computed otherwise", "fp32_norms"),
    *only_off("scaled attention", "scaling_softmax"),
    *only_off("weights that start at random", "reinit_weights", way_out="--drop reinit_weights --set model.weights=random"),
    *only_off("a trainer of your own", "trainer_cls"),
    *only_off("shifted sparse attention", "s2_attention"),
    Setting("plugins", By(plugins, "no effect for Liger and cut cross-entropy; any other is refused")),
    *idle(_SPEED, "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm", "liger_cross_entropy", "liger_swiglu",
          "liger_fused_linear_cross_entropy", "cut_cross_entropy", "attn_implementation", "flash_attention", "flash_attn_cross_entropy",
          "flash_attn_rms_norm", "flash_attn_fuse_mlp", "flash_attn_fuse_qkv", "flash_optimum", "xformers_attention", "sdp_attention",
          "flex_attention", "sage_attention", "eager_attention", "fused_attn_kernel", "chunked_cross_entropy",
          "chunked_cross_entropy_num_chunks", "tiled_mlp", "tiled_mlp_num_shards", "tiled_mlp_use_original_mlp", "torch_compile",
          "torch_compile_backend", "torch_compile_mode", "torch_compile_options", "use_kernels", "low_cpu_mem_usage", "gc_steps",
          "gc_collect_steps", "torch_empty_cache_steps", "gradient_checkpointing_kwargs.*", "selective_checkpointing.*",
          "unsloth_cross_entropy_loss", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o"),
    *idle("where activations are kept", "activation_offloading", "layer_offloading"),
    *idle("no code of a repository is run", "trust_remote_code"),
    *idle(_CONFIG, "model_type", "type_of_model", "base_model_config", "cls_model_config", "tokenizer_type", "tokenizer_use_fast",
          "tokenizer_legacy", "tokenizer_use_mistral_common", "processor_type", "is_falcon_derived_model", "is_llama_derived_model",
          "is_mistral_derived_model", "is_qwen_derived_model", "fix_untrained_tokens", "mean_resizing_embeddings"),
    *idle("ours stops at a loss that is not finite", "loss_watchdog_threshold", "loss_watchdog_patience"),
    *idle(_LOGS, "logging_steps", "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_mode",
          "wandb_log_model", "use_wandb", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name",
          "hf_mlflow_log_artifacts", "use_comet", "comet_project_name", "comet_workspace", "comet_mode", "use_tensorboard", "use_trackio",
          "trackio_project_name", "trackio_run_name", "trackio_space_id", "use_otel_metrics", "otel_metrics_host", "otel_metrics_port",
          "profiler_steps", "profiler_steps_start", "include_tokens_per_second", "include_tkps", "debug"),
    *idle("nothing is uploaded", "hub_model_id", "hub_strategy", "hub_revision"),
    *idle("the held-out loss is measured every run.eval_every_steps", "eval_strategy", "evaluation_strategy", "eval_batch_size",
          "eval_table_size", "eval_max_new_tokens", "do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval", "bench_dataset",
          "bench_split", "metric_for_best_model", "greater_is_better", "eval_table_max_new_tokens", "generate_samples"),
    *idle("checkpoints are written every checkpoint.every_steps", "save_strategy", "save_only_model", "save_first_step", "save_safetensors",
          "dynamic_checkpoint.*"),
    *idle("a run resumes with `train --resume`", "resume_from_checkpoint", "auto_resume_from_checkpoints"),
    *idle("`--out` says it", "output_dir"),
    *idle("settings of the program, not of the training", "strict", "axolotl_config_path", "tokenizer_save_jinja_files",
          "experimental_skip_move_to_device"),
    *only_off("experts", "quantize_moe_experts", "llama4_linearized_experts"),
    *only_off("packed text whose records see one another", "pretraining_sample_concatenation", "max_packed_sequence_len"),
    *only_off("the loss of another stage", "dpo_loss_type", "rpo_alpha", "dpo_norm_loss"),
    *idle(_ONLY, "dpo_use_liger_kernel", "dpo_padding_free", "dpo_loss_weights", "dpo_use_logits_to_keep", "dpo_generate_during_eval",
          "scaling_softmax_factor", "scaling_softmax_bias", "fp32_norm_classes", "experts_implementation", "gemma4_hybrid_attn_impl",
          "dion_lr", "dion_momentum", "dion_rank_fraction", "dion_rank_multiple_of", "qgalore_rank", "qgalore_update_proj_gap",
          "qgalore_scale", "qgalore_proj_type", "qgalore_proj_quant", "qgalore_proj_bits", "qgalore_proj_group_size",
          "qgalore_cos_threshold", "qgalore_gamma_proj", "qgalore_queue_size", "peft"),
    *idle(_SPEED, "flex_attn_compile_kwargs", "large_head_attention", "flash_attn_d512", "sdpa_varlen"),
    *idle("only models of images have it", "freeze_mm_modules", "processor_kwargs", "image_size", "image_resize_algorithm", "role_boundaries"),
    *idle("nothing is generated in training", "num_generation_samples", "generation_max_new_tokens", "generation_temperature",
          "generation_top_p", "generation_top_k", "generation_prompt_ratio", "generation_do_sample", "gradio_title", "gradio_share",
          "gradio_server_name", "gradio_server_port", "gradio_max_new_tokens", "gradio_temperature"),
    *idle(_LOGS, "comet_api_key", "comet_experiment_key", "comet_online", "comet_experiment_config.*", "comet_experiment_config"),
)  # fmt: skip

AXOLOTL = Tool(
    name="Axolotl",
    marks=("base_model", "micro_batch_size", "sequence_len", "num_epochs", "sample_packing"),
    settings=(*METHOD, *NUMBERS, *RECORDS_AND_LOSS, *SHARDING, *OTHERS),
    source=SOURCE,
    beside=("deepspeed",),
)
