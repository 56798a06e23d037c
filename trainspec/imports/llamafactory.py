"""LLaMA-Factory: its YAML holds settings of its own and all of the Trainer's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainspec.imports import trainer
from trainspec.imports.settings import (
    By,
    Case,
    Idle,
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
    replaced,
)
from trainspec.imports.tool import Tool
from trainspec.imports.trainer import NUMBERS, OTHERS
from trainspec.imports.training import FILE, PRECISION, RECORDS, VALIDATION, records

SOURCE = "LLaMA-Factory ff6d4d1 (hparams/) and TrainingArguments, transformers 5.23.0"


def method(value: Any, case: Case) -> Outcome:
    """LoRA, DoRA with `use_dora`, or every weight."""
    if value == "lora":
        return Translated({"method.kind": "dora" if case["use_dora"] else "lora"})
    if value == "full":
        return Translated({"method.kind": "full"})
    return Refused(f"finetuning_type={value}", "--their finetuning_type=lora or full")


def is_lora(case: Case) -> bool:
    """Whether an adapter is trained."""
    return case["finetuning_type"] == "lora"


def alpha(value: Any, case: Case) -> Outcome:
    """Twice the rank, unless it is given (`FinetuningArguments.__post_init__`)."""
    return Translated({"method.alpha": number(value) if value else 2 * case.number("lora_rank")})


def targets(value: Any, case: Case) -> Outcome:
    """A list in one text; `all` is every linear layer but the head (`find_all_linear_modules`)."""
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    return Translated({"method.targets": "all-linear" if names == ["all"] else names})


def stage(value: Any, case: Case) -> Outcome:
    """Supervised training, or plain text."""
    if value == "sft":
        return Translated(note="supervised, as here")
    if value == "pt":
        return Translated({"data.task": "text"})
    return Refused(f"stage={value}", "sft and pt are what there is")


def packing(value: Any, case: Case) -> Outcome:
    """Packing whose records do not see one another is `neat_packing`; plain text is packed by default."""
    neat, is_text = case["neat_packing"], case["stage"] == "pt"
    packs = case.choice("data.packing", bool(neat) or (is_text if value is None else bool(value)))
    if packs and not neat and not case.chose("data.packing"):
        way_out = "--their packing=false" if is_text else "--their neat_packing=true"
        return Refused("packing where records see the ones before them", way_out)
    return Translated({"data.packing": packs, "data.too_long": "cut"})


def cutoff(value: Any, case: Case) -> Outcome:
    """Tokens of an example; a packed one has one token less for records (`DataArguments.__post_init__`)."""
    note = "differs: there a long prompt is cut as well as its answer, here the end of the record"
    return Translated({"data.sequence_tokens": number(value, whole=True) - bool(case["neat_packing"])}, note)


def template(value: Any, case: Case) -> Outcome:
    """Its templates are programs; without one the tokenizer's own is used."""
    if value is None or case["stage"] == "pt":
        return Translated(note="the tokenizer's own chat template")
    return Question(
        "--set data.chat_template=FILE",
        f"template={value} is a program of LLaMA-Factory's; give one of jinja, or null for the tokenizer's own",
    )


def loss_on(value: Any, case: Case) -> Outcome:
    """On the answers, or on the prompt as well; of plain text on all."""
    return Translated({"data.loss_on": "all" if value or case["stage"] == "pt" else "completion"})


def remat(value: Any, case: Case) -> Outcome:
    """On, unless it is disabled (`model_utils/checkpointing.py`)."""
    return Translated({"plan.remat": "none" if value else "full"})


def random_weights(value: Any, case: Case) -> Outcome:
    """Whether training starts from random weights."""
    return Translated({"model.weights": "random" if value else "pretrained"})


def bf16(value: Any, case: Case) -> Outcome:
    """As the Trainer's. Without it and fp16 a frozen model keeps the type of its checkpoint (`model/patcher.py`)."""
    outcome = trainer.bf16(value, case)
    keeps_type = is_lora(case) and not value and not case.chose("precision.policy")
    if not keeps_type or not isinstance(outcome, Translated):
        return outcome
    note = "differs: there the frozen model has the checkpoint's type; --their bf16=true if that is bfloat16"
    return replace(outcome, note=note)


def heldout(value: Any, case: Case) -> Outcome:
    """Records to measure on, which have no effect on the training."""
    return NoEffect("the held-out loss is measured on data.heldout, where it is given")


_RENDERED = "the chat template says it"
_ONLY = "only a feature that is not in use has it"
_GENERATION = "nothing is generated in training"
_READING = "how records are read and cached"

METHOD = (
    Setting("finetuning_type", By(method, "`method.kind`: lora, dora, full; any other is refused", ("method.kind",)), "lora"),
    Setting("use_dora", Read("finetuning_type")),
    Setting("lora_rank", Same("method.rank"), 8, applies=is_lora),
    Setting("lora_alpha", By(alpha, "`method.alpha`; by default twice the rank", ("method.alpha",)), None, applies=is_lora),
    Setting("lora_dropout", Same("method.dropout"), 0.0, applies=is_lora),
    Setting("use_rslora", Same("method.rslora"), False, applies=is_lora),
    Setting("lora_target", By(targets, "`method.targets`; all becomes all-linear", ("method.targets",)), "all", applies=is_lora),
    Setting("adapter_name_or_path", Same("method.adapter"), applies=is_lora),
    *only_off("weights trained whole beside the adapter", "additional_target"),
    *only_off("a second adapter", "create_new_adapter", "adapter_folder"),
    *only_off("LoRA+, another rate for B", "loraplus_lr_ratio"),
    *only_off("LoRA started by PiSSA", "pissa_init"),
    *idle(_ONLY, "loraplus_lr_embedding", "pissa_iter", "pissa_convert", "freeze_trainable_layers", "freeze_trainable_modules",
          "freeze_extra_modules", "module_dropout", "oft_rank", "oft_block_size", "oft_target"),
)  # fmt: skip

RECORDS_AND_LOSS = (
    Setting("stage", By(stage, "`data.task`: text for pt; sft is what there is otherwise", ("data.task",)), "sft"),
    Setting("dataset", RECORDS, Question(FILE, "the file names no records")),
    *(Setting(name, By(records, "no effect: give the records with `--set data.train=FILE`")) for name in (
        "max_samples", "mix_strategy", "interleave_probs",
    )),
    Setting("eval_dataset", By(heldout, "no effect; `--set data.heldout=FILE`")),
    Setting("val_size", VALIDATION),
    Setting("template", By(template, "asked for: `--set data.chat_template=FILE`", ("data.chat_template",)), None),
    Setting("default_system", Same("data.system")),
    Setting("cutoff_len", By(cutoff, "`data.sequence_tokens`; one less with `neat_packing`", ("data.sequence_tokens",)), 2048),
    Setting("packing", By(packing, "`data.packing`, `data.too_long`; refused without `neat_packing`", ("data.packing", "data.too_long")), None),
    Setting("neat_packing", Read("packing")),
    Setting("train_on_prompt", By(loss_on, "`data.loss_on`: all or completion", ("data.loss_on",)), False),
    *only_off("the loss of the last turn alone", "mask_history", way_out="--drop mask_history, and `train: false` on turns of the records"),
    *only_off("examples in the order of the file", "disable_shuffling"),
    *only_off("records that are streamed", "streaming"),
    Setting("ignore_pad_token_for_loss", Only("a loss on padding", (True,))),
    *idle(_RENDERED, "tool_format", "enable_thinking", "preserve_thinking"),
    *idle(_READING, "dataset_dir", "media_dir", "overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers",
          "buffer_size", "tokenized_path", "data_shared_file_system", "eval_on_each_dataset"),
)  # fmt: skip

MODEL = (
    Setting("disable_gradient_checkpointing", By(remat, "`plan.remat`: full unless it is disabled", ("plan.remat",)), False),
    Setting("train_from_scratch", By(random_weights, "`model.weights`", ("model.weights",))),
    Setting("model_revision", Only("another revision of the model", ("main",), "--set model.from=DIRECTORY with that revision, and --drop model_revision")),
    *only_off("a model in fewer bits", "quantization_bit", way_out="--drop quantization_bit, and what goes with it: the model is trained as it is"),
    *idle("only a quantised model has it", "quantization_method", "quantization_type", "double_quantization", "quantization_device_map"),
    *only_off("weights updated in bfloat16", "pure_bf16", way_out="--drop pure_bf16 --their bf16=true has float32 masters"),
    *only_off("float8", "fp8", "fp8_enable_fsdp_float8_all_gather"),
    *idle(_ONLY, "fp8_backend"),
    *only_off("norms computed otherwise", "upcast_layernorm"),
    *only_off("another rotation than the model's own config says", "rope_scaling", way_out="a directory with that config.json"),
    *only_off("shifted sparse attention", "shift_attn"),
    *only_off("a mixture of depths", "mixture_of_depths"),
    *only_off("tokens that the vocabulary does not have", "resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"),
    *only_off("text that is not read as special tokens", "split_special_tokens"),
    *only_off("a loss of mixtures of experts", "moe_aux_loss_coef"),
    *idle("no code of a repository is run", "trust_remote_code"),
    *idle("another program for the same arithmetic", "flash_attn", "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_v1_kernels",
          "use_reentrant_gc", "upcast_lmhead_output", "use_kv_cache"),
    *idle("how the model is fetched and loaded", "cache_dir", "use_fast_tokenizer", "low_cpu_mem_usage", "offload_folder", "hf_hub_token",
          "ms_hub_token", "om_hub_token", "device_map", "init_special_tokens", "print_param_status", "infer_backend", "infer_dtype"),
)  # fmt: skip

# Optimizers, losses and engines of its own: a switch that has to be off, and what only it reads.
FEATURES = (
    *only_off("GaLore", "use_galore"),
    *idle(_ONLY, "galore_target", "galore_rank", "galore_update_interval", "galore_scale", "galore_proj_type", "galore_layerwise"),
    *only_off("APOLLO", "use_apollo"),
    *idle(_ONLY, "apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type",
          "apollo_scale_type", "apollo_layerwise", "apollo_scale_front"),
    *only_off("BAdam", "use_badam"),
    *idle(_ONLY, "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_update_ratio",
          "badam_mask_mode", "badam_verbose"),
    *only_off("the optimizer Adam-mini", "use_adam_mini"),
    *only_off("the optimizer Muon", "use_muon"),
    *only_off("another loss", "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
    *idle(_ONLY, "asft_alpha", "eaft_alpha"),
    *only_off("layers that are added", "use_llama_pro"),
    *only_off("another engine", "use_mca", "use_megatron_bridge", "use_hyper_parallel", "use_kt"),
    *idle(_ONLY, "megatron_bridge_args", "hyper_parallel_args", "hyper_parallel_cp_size"),
    *only_off("a run that ends at a loss", "early_stopping_steps"),
    *idle("only a stage that is not here has it", "pref_beta", "pref_ftx", "pref_bco_weight", "pref_loss", "dpo_label_smoothing",
          "kto_chosen_weight", "kto_rejected_weight", "simpo_gamma", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target",
          "ppo_whiten_rewards", "ref_model", "ref_model_adapters", "ref_model_quantization_bit", "reward_model",
          "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type", "ld_alpha"),
    *idle("only models of images and sounds have it", "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
          "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
          "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video", "audio_sampling_rate"),
    *idle("what is printed, measured and drawn", "plot_loss", "compute_accuracy", "include_effective_tokens_per_second",
          "use_swanlab", "swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode", "swanlab_api_key",
          "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret", "enable_torch_profiler"),
    *idle(_GENERATION, "predict_with_generate", "sortish_sampler", "generation_max_length", "generation_num_beams",
          "generation_config", "eval_num_beams", "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length",
          "max_new_tokens", "repetition_penalty", "length_penalty", "skip_special_tokens"),
    *idle("how processes are started", "ray_run_name", "ray_storage_path", "ray_num_workers", "ray_init_kwargs.*", "ray_init_kwargs",
          "resources_per_worker.*", "placement_strategy", "master_addr", "master_port"),
    *idle("exporting is a command", "export_dir", "export_size", "export_device", "export_legacy_format", "export_hub_model_id"),
    *idle(_GENERATION, "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config", "sglang_maxlen",
          "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend"),
    *idle(_ONLY, "kt_cpu_activation", "kt_weight_path", "kt_non_expert_weight_path", "kt_expert_checkpoint_path",
          "kt_use_lora_experts", "kt_lora_expert_num", "kt_lora_expert_intermediate_size"),
    *idle("what is printed, measured and drawn", "profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps",
          "profiler_active_steps", "profiler_repeat", "profiler_record_shapes", "profiler_profile_memory", "profiler_with_stack",
          "profile_modules"),
    *idle("exporting is a command", "export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples",
          "export_quantization_maxlen"),
)  # fmt: skip

_REPLACED = (
    Setting("bf16", By(bf16, "`precision.policy`, `precision.reduce`; LoRA without it and fp16: a difference is named", PRECISION), False),
    Setting("gradient_checkpointing", Idle("disable_gradient_checkpointing says it")),
    Setting("activation_checkpointing", Idle("disable_gradient_checkpointing says it")),
)  # fmt: skip

LLAMAFACTORY = Tool(
    name="LLaMA-Factory",
    marks=("finetuning_type", "stage", "cutoff_len", "template", "lora_target", "dataset_dir"),
    settings=(*METHOD, *replaced(NUMBERS, *_REPLACED), *RECORDS_AND_LOSS, *MODEL, *FEATURES, *OTHERS),
    source=SOURCE,
    beside=("deepspeed",),
)
