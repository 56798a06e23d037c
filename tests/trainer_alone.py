"""Updates of Hugging Face's Trainer, with PEFT and DeepSpeed, set up from a configuration as its tool does. Nothing of ours.

    python tests/trainer_alone.py TOOL MODEL TRACE OUT.json FILE [FILE ...]

The batches and an adapter's starting weights are those of a trace; OUT.json gets the loss of every update.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)}


def of_trainer(settings):
    """What a file says in the Trainer's own words."""
    return {name: value for name, value in settings.items() if name in ARGUMENTS}


def trl(settings, beside):
    """SFTConfig is TrainingArguments with other defaults; the adapter has a file of its own."""
    defaults = {"learning_rate": 2e-5, "gradient_checkpointing": True, "bf16": True}
    lora = {name: value for name, value in beside["adapter_config"].items() if name != "peft_type"}
    return defaults | of_trainer(settings), lora


def llamafactory(settings, beside):
    """LoRA on every linear layer but the head, with twice the rank as its alpha; activations are computed again."""
    rank = settings["lora_rank"]
    assert settings["lora_target"] == "all"
    lora = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    given = of_trainer(settings)
    # transformers has lost the older name of a share.
    share = settings.get("warmup_ratio", 0.0)
    return given | {"gradient_checkpointing": True, "warmup_steps": share}, lora


def axolotl(settings, beside):
    """Its own names as its builder maps them, the warm-up rounded down."""
    steps = settings["max_steps"]
    updates = int(settings["warmup_ratio"] * steps)
    given = {
        "per_device_train_batch_size": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "learning_rate": settings["learning_rate"],
        "optim": settings["optimizer"],
        "lr_scheduler_type": settings["lr_scheduler"],
        "weight_decay": settings["weight_decay"],
        "warmup_steps": 2 if updates == 1 else updates,
        "max_steps": steps,
        "bf16": bool(settings["bf16"]),
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "average_tokens_across_devices": False,
    }
    return given, None


class Recording(Trainer):
    """A Trainer that keeps the loss of every microbatch."""

    losses = ()

    def compute_loss(self, *args, **kwargs):
        found = super().compute_loss(*args, **kwargs)
        self.losses = (*self.losses, float(found[0] if isinstance(found, tuple) else found))
        return found


def rows(trace):
    """The examples of every update, in order."""
    examples = []
    for path in sorted(trace.glob("step-*.safetensors")):
        batch = load_file(path)
        for ids, labels, segments in zip(
            batch["batch/input_ids"], batch["batch/labels"], batch["batch/segments"], strict=True
        ):
            mask = (segments > 0).long()
            examples.append({"input_ids": ids.long(), "labels": labels.long(), "attention_mask": mask})
    return examples


def main():
    tool, model_directory, trace, out, main_file, *others = sys.argv[1:]
    settings = yaml.safe_load(Path(main_file).read_text())
    beside = {}
    for path in others:
        tree = json.loads(Path(path).read_text())
        beside["adapter_config" if "peft_type" in tree else "deepspeed"] = tree
    given, lora = {"trl": trl, "llamafactory": llamafactory, "axolotl": axolotl}[tool](settings, beside)
    given |= {
        "output_dir": str(Path(out).parent / "trainer"),
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    given |= {
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    given |= {"remove_unused_columns": False, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if "deepspeed" in beside:
        # accelerate starts DeepSpeed only where it was not told to use a CPU; without another device it does.
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": os.environ["PORT"],
        }
        given |= {"deepspeed": beside["deepspeed"], "use_cpu": False}
    arguments = TrainingArguments(**given)  # first: under ZeRO 3 it decides how the model is made
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(**lora))
        start = load_file(Path(trace) / "initial.safetensors")
        adapter = {name.removeprefix("weight/"): value for name, value in start.items() if ".lora_" in name}
        assert adapter
        set_peft_model_state_dict(model, adapter)
    trainer = Recording(
        model=model, args=arguments, train_dataset=rows(Path(trace)), data_collator=default_data_collator
    )
    trainer.train()
    parts = arguments.gradient_accumulation_steps
    assert len(trainer.losses) == parts * arguments.max_steps
    losses = [math.fsum(trainer.losses[i : i + parts]) for i in range(0, len(trainer.losses), parts)]
    Path(out).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
