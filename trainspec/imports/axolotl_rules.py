"""What becomes of Axolotl's settings that are not ours under another name. `axolotl.py` has its table."""

from __future__ import annotations

import math
from typing import Any

from trainspec.families import FAMILIES
from trainspec.imports import deepspeed
from trainspec.imports.settings import (
    By,
    Case,
    NoEffect,
    Outcome,
    Question,
    Refused,
    Translated,
    number,
)
from trainspec.imports.training import (
    EXAMPLES,
    FILE,
    ZERO,
    records,
    schedule,
    source,
    steps,
    summed_in,
)


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


# The embedding and the head of every family, as a target names them.
ENDS = {
    weight.removesuffix(".weight").rpartition(".")[2]
    for family in FAMILIES.values()
    for weight in (family.embedding, family.head)
}


def targets(value: Any, case: Case) -> Outcome:
    """The list; with `lora_target_linear` every linear layer but the head besides (`_build_peft_lora_config`)."""
    if not case["lora_target_linear"]:
        return Translated({"method.targets": value})
    names = {str(name).rpartition(".")[2] for name in (value if isinstance(value, list) else [value])}
    if names & ENDS:
        return Refused(
            "targets beside every linear layer",
            "name all of them in lora_target_modules, without lora_target_linear",
        )
    return NoEffect("lora_target_linear has them all")


def all_targets(value: Any, case: Case) -> Outcome:
    """Every linear layer but the head."""
    return Translated({"method.targets": "all-linear"}) if value else NoEffect("lora_target_modules says it")


def count_updates(case: Case, examples: int, global_examples: int) -> int:
    """Updates of a run (`calculate_total_num_steps`): packed, every epoch is rounded down; else the whole run up.

    Packed, `dataloader_drop_last` takes one more from every epoch.
    """
    epochs = case.number("num_epochs", least=0)
    if not case["sample_packing"]:
        return math.ceil(examples * epochs / global_examples)
    dropped = math.ceil(epochs) if case["dataloader_drop_last"] else 0
    return max(1, math.floor(max(1, examples // global_examples) * epochs) - dropped)


EPOCHS, MAX_STEPS = steps(
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
    """bf16, by default where the device has it; null is float32.

    The model is loaded in bfloat16, and what an adapter trains in float32.
    """
    if value not in (True, False, "auto", "full", None):
        return Refused(f"bf16={value}", "true, false or auto")
    policy = case.choice("precision.policy", "bf16" if value or case["bfloat16"] else "fp32")
    ours = {"precision.policy": policy, "precision.reduce": summed_in(policy, case, is_fsdp=is_fsdp(case))}
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


def estimate(value: Any, case: Case) -> Outcome:
    """How full packed examples are, from which the updates are then estimated (`calculate_total_num_steps`)."""
    has_length = case["max_steps"] is not None and case.number("max_steps") > 0
    if not value or not case["sample_packing"] or has_length or case.chose("run.steps", "run.epochs"):
        return NoEffect("no number of updates is estimated from it")
    return Refused(
        "a number of updates that is estimated", "--drop sample_packing_eff_est, and --set run.steps=N"
    )


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
    if named.startswith("hub:"):
        return Translated({"data.train": f"{named}:{split}" if split else named})
    return Translated({"data.train": named}) if split in (None, "train") else records(value, case)


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
    if value == "text":
        return NoEffect("the field is text, as here")
    return Translated({"data.columns": {"text": value}})


def chat_form(case: Case) -> str | None:
    """Our field for turns of theirs: OpenAI's messages, ShareGPT's conversations; None where they are neither."""
    mapped = "datasets.0.message_property_mappings."
    fields = {"role": "role", "content": "content"}
    fields |= {
        name.removeprefix(mapped): value
        for name, value in case.given.items()
        if name.startswith(mapped) and value is not None
    }
    pair = str(fields.pop("role")), str(fields.pop("content"))
    if any(name != value for name, value in fields.items()):
        return None
    return {("role", "content"): "messages", ("from", "value"): "conversations"}.get(pair)


def mapping(value: Any, case: Case) -> Outcome:
    """The fields of a turn. Without `field_messages` the turns are in the field `messages`, whatever their form."""
    form = chat_form(case)
    if form is None or case.chose("data.train"):
        return records(value, case)
    if form == "messages" or case.has("datasets.0.field_messages"):
        return Translated(note="read with datasets.*.field_messages")
    return Translated({"data.columns": {form: "messages"}})


def chat_field(value: Any, case: Case) -> Outcome:
    """The field of a chat: OpenAI's messages, or ShareGPT's conversations."""
    ours = chat_form(case)
    if ours is None:
        return records(value, case)
    if value == ours:
        return NoEffect(f"the field is {ours}, as here")
    return Translated({"data.columns": {ours: value}})


def roles(value: Any, case: Case) -> Outcome:
    """The turns that are trained on."""
    if all(role in ("assistant", "gpt") for role in (value if isinstance(value, list) else [value])):
        return NoEffect("the assistant's turns are trained, there as here")
    return Refused("a loss on turns that are not the assistant's", "--drop it")


def pretraining(value: Any, case: Case) -> Outcome:
    """Plain text that is streamed."""
    return Translated({"data.task": "text"})


def loss_on(value: Any, case: Case) -> Outcome:
    """On the answers, or on the prompt as well; of plain text on all."""
    return Translated({"data.loss_on": "all" if value or is_text(case) else "completion"})


def per_epoch(key: str) -> By:
    """How often in an epoch, as updates from one time to the next."""

    def decide(value: Any, case: Case) -> Outcome:
        total = case.ours.get("run.steps")
        times = number(value) * case.number("num_epochs")
        if not total or times <= 0:
            return NoEffect(f"{key} says how often")
        return Translated({key: max(1, math.ceil(total / times))})

    return By(decide, f"`{key}`, in updates", (key,))


def plugins(value: Any, case: Case) -> Outcome:
    """Programs for the same arithmetic are passed over, any other plugin is refused."""
    for name in value if isinstance(value, list) else [value]:
        if not any(known in str(name).lower() for known in ("liger", "cut_cross_entropy")):
            return Refused(f"the plugin {name}")
    return NoEffect("another program for the same arithmetic")
