"""What the settings of a training run mean that every one of these tools gives to Hugging Face's Trainer in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainspec.complaint import LARGEST
from trainspec.imports.settings import (
    By,
    Case,
    NoEffect,
    Outcome,
    Question,
    Read,
    Refused,
    Setting,
    Translated,
    number,
)

# Names of AdamW whose arithmetic is ours: other programs for the same update. Not adamw_hf, whose eps is not corrected.
ADAMW = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_apex_fused",
    "paged_adamw_32bit",
)
# What ZeRO's stages split (arXiv 1910.02054).
ZERO = {0: "nothing", 1: "optimizer", 2: "gradients", 3: "params"}

FILE = "--set data.train=FILE"
DEVICES = "--devices N"
EXAMPLES = "--examples N"


def source(name: str) -> str:
    """A model or a data set as a recipe names it: a path, or `hub:ORG/NAME`."""
    is_path = (
        name.startswith(("/", ".", "~", "hub:", "preset:"))
        or Path(name).exists()
        or Path(name).suffix in SUFFIXES
    )
    return name if is_path else f"hub:{name}"


SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".txt")


def model(value: Any, case: Case) -> Outcome:
    """`model.from`."""
    return Translated({"model.from": source(str(value))})


NO_MODEL = Question("--set model.from=MODEL", "the files name no model")
NO_RECORDS = Question(FILE, "the files name no records that can be read as they are")


def asked(name: str, question: Question) -> Setting:
    """A setting that the tool does not have: the user gives ours, with `--set`."""
    key = question.answer.removeprefix("--set ").partition("=")[0]
    return Setting(
        name, By(lambda value, case: question, f"asked for: `{question.answer}`", (key,)), question
    )


def records(value: Any, case: Case) -> Outcome:
    """A setting of their records: replaced by `--set data.train`, or asked for."""
    if case.chose("data.train"):
        return NoEffect("the records are those of --set data.train")
    return Question(FILE, "their records are prepared by the tool; give them in one of docs/data.md's forms")


# A setting of their records that has nothing to say once the user gives his own.
RECORDS = By(records, "no effect: give the records with `--set data.train=FILE`")


def validation(value: Any, case: Case) -> Outcome:
    """A share of the records that is held out, which is then not trained on."""
    if not number(value):
        return NoEffect("no records are held out")
    if case.chose("data.heldout"):
        return NoEffect("the held-out records are those of --set data.heldout")
    return Refused(
        "records held out by chance", "--set data.heldout=FILE after a split of your own, or --drop it"
    )


VALIDATION = By(validation, "accepted as 0, or with `--set data.heldout=FILE`; else refused")


def batch(*, per_device: str, accumulation: str) -> By:
    """The global batch, of examples per device, accumulation and `--devices`."""

    def decide(value: Any, case: Case) -> Outcome:
        devices = case.answers.devices
        if devices is None:
            return Question(DEVICES, f"{per_device}={value} counts the examples of one device")
        examples = number(value, least=1, whole=True)
        return Translated(
            {"batch.global_examples": examples * case.number(accumulation, least=1, whole=True) * devices}
        )

    return By(
        decide, f"`batch.global_examples`: × `{accumulation}` × `--devices`", ("batch.global_examples",)
    )


def steps(
    *, epochs: str, max_steps: str, count: Callable[[Case, int, int], int], uneven: str
) -> tuple[By, By]:
    """The rules of `epochs` and `max_steps`. `count(case, examples, global_examples)` is the tool's own number of updates.

    It multiplies in floating point, as the tools do: 1.1 epochs of 100 updates are 110.00000000000001, rounded up 111.
    `uneven` says what happens there to the examples that do not fill an update.
    """
    keys = ("run.steps", "run.epochs")

    def of_epochs(value: Any, case: Case) -> Outcome:
        if case[max_steps] is not None and case.number(max_steps) > 0:
            return NoEffect(f"{max_steps}={case[max_steps]} comes first")
        examples, batch_size = case.answers.examples, case.ours.get("batch.global_examples")
        if examples is None:
            return Question(
                EXAMPLES,
                f"the updates of {epochs}={value} depend on the examples of an epoch (packed ones, where it packs)",
            )
        if batch_size is None:
            return Question(DEVICES, f"the updates of {epochs}={value} depend on the global batch")
        batch_size = number(batch_size, least=1, whole=True)
        left = examples % batch_size
        note = f"differs: {left} of the {examples} examples do not fill an update; {uneven}" if left else ""
        if examples > LARGEST or number(value, least=0) * examples > LARGEST:
            return Refused(
                f"{epochs}={value}: more updates than can be counted", "less, or --set run.steps=N"
            )
        return Translated({"run.steps": count(case, examples, batch_size)}, note)

    def of_steps(value: Any, case: Case) -> Outcome:
        return (
            Translated({"run.steps": value}) if _is_positive(value) else NoEffect(f"{epochs} says the length")
        )

    return (
        By(of_epochs, "`run.steps`, with `--examples`", keys),
        By(of_steps, "`run.steps`", keys),
    )


def _is_positive(value: Any) -> bool:
    return value is not None and number(value) > 0


def warmup_steps(value: Any, case: Case) -> Outcome:
    """The Trainer's `warmup_steps`, of which a number below 1 is a share (`TrainingArguments.get_warmup_steps`)."""
    if case["lr_scheduler_type"] == "constant":
        return Translated({"schedule.warmup_steps": 0}, "constant has no warm-up there")
    if not value and case["warmup_ratio"]:
        return NoEffect("warmup_ratio says it")
    if number(value) < 1:
        return Translated({"schedule.warmup_ratio": float(value)} if value else {"schedule.warmup_steps": 0})
    return Translated({"schedule.warmup_steps": int(value)})


def warmup_ratio(value: Any, case: Case) -> Outcome:
    """Its older name for the share."""
    if case["lr_scheduler_type"] == "constant" or case["warmup_steps"]:
        return NoEffect("warmup_steps comes first")
    return Translated({"schedule.warmup_ratio": number(value)})


WARMUP = ("schedule.warmup_steps", "schedule.warmup_ratio")


def schedule(value: Any, case: Case) -> Outcome:
    """The Trainer's `lr_scheduler_type`, with what its `lr_scheduler_kwargs` say of the end."""
    if value in ("linear", "cosine"):
        return Translated({"schedule.kind": value, "schedule.final_ratio": 0.0})
    if value in ("constant", "constant_with_warmup"):
        return Translated({"schedule.kind": "constant"})
    if value == "cosine_with_min_lr":
        share, rate = case["lr_scheduler_kwargs.min_lr_rate"], case["lr_scheduler_kwargs.min_lr"]
        if share is None and rate is None:
            return Refused(
                "cosine_with_min_lr without min_lr or min_lr_rate", "say lr_scheduler_kwargs.min_lr_rate"
            )
        return Translated(
            {
                "schedule.kind": "cosine",
                "schedule.final_ratio": float(
                    share if share is not None else number(rate) / case.number("learning_rate")
                ),
            }
        )
    return Refused(
        f"the schedule {value}", "--their lr_scheduler_type=cosine, linear or constant_with_warmup"
    )


def end_of_schedule(value: Any, case: Case) -> Outcome:
    """The rate at the end, an argument of one schedule alone."""
    if case["lr_scheduler_type"] == "cosine_with_min_lr":
        return Translated(note="read with lr_scheduler_type")
    return Refused("min_lr without cosine_with_min_lr", "--their lr_scheduler_type=cosine_with_min_lr")


END_OF_SCHEDULE = By(
    end_of_schedule,
    "read with `lr_scheduler_type=cosine_with_min_lr`; else refused",
    ("schedule.final_ratio",),
)


def betas(first: str, second: str) -> tuple[By, By]:
    """The rules of the two decay rates of the moments."""

    def decide(value: Any, case: Case) -> Outcome:
        return Translated({"optimizer.betas": [case.number(first), case.number(second)]})

    def other(value: Any, case: Case) -> Outcome:
        return Translated(note=f"read with {first}")

    return By(decide, f"`optimizer.betas`, with `{second}`", ("optimizer.betas",)), By(
        other, f"read with `{first}`"
    )


def weight_decay(value: Any, case: Case) -> Outcome:
    """Decay of every trained weight but biases and norms (`Trainer.get_decay_parameter_names`), as ours but for DoRA."""
    note = ""
    if value and case.ours.get("method.kind") == "dora":
        note = "differs: there DoRA's magnitudes decay as well"
    if value and case.has("deepspeed.optimizer") and case.ours.get("method.kind") == "full":
        note = "differs: with an optimizer of DeepSpeed's own, norms and biases decay there as well"
    return Translated({"optimizer.weight_decay": number(value)}, note)


WEIGHT_DECAY = By(
    weight_decay,
    "`optimizer.weight_decay`; norms and biases do not decay, there as here",
    ("optimizer.weight_decay",),
)


def clip_norm(value: Any, case: Case) -> Outcome:
    """The largest gradient norm; 0 is no clipping."""
    return Translated({"optimizer.clip_norm": number(value) or None})


CLIP_NORM = By(clip_norm, "`optimizer.clip_norm`; 0 becomes null", ("optimizer.clip_norm",))


def optimizer(name: str) -> By:
    """AdamW under any of its names; other optimizers and 8-bit moments are refused."""

    def decide(value: Any, case: Case) -> Outcome:
        if value == "paged_adamw_32bit" and case["weight_decay"]:
            return Translated(note="differs: bitsandbytes decays the weights after the update, not before it")
        if value in ADAMW:
            return Translated(note="AdamW, as here")
        what = "8-bit moments" if "8bit" in str(value) else f"the optimizer {value}"
        return Refused(what, f"--their {name}=adamw_torch trains with AdamW and moments in full")

    return By(decide, f"AdamW ({', '.join(ADAMW)}) is what there is; any other is refused")


def precision(value: Any, case: Case) -> Outcome:
    """bf16, or float32. Under DeepSpeed gradients are summed in bfloat16 unless it says otherwise.

    The Trainer reads `fsdp_config` only where `fsdp` is on.
    """
    policy = case.choice("precision.policy", "bf16" if value in (True, "auto", "full") else "fp32")
    reduce = summed_in(policy, case, is_fsdp=bool(case["fsdp"]))
    return Translated({"precision.policy": policy, "precision.reduce": reduce})


def summed_in(policy: str, case: Case, *, is_fsdp: bool) -> str:
    """The type in which gradients are summed over microbatches and devices.

    Under autocast that is the weights', float32. DeepSpeed takes the type of the computation unless `data_types` says
    otherwise (`DeepSpeedEngine.get_data_types`), and accelerate has FSDP reduce in it
    (`FullyShardedDataParallelPlugin.set_mixed_precision`).
    """
    if policy == "fp64":
        return policy
    in_fp32 = case["deepspeed.data_types.grad_accum_dtype"] in ("fp32", "float32")
    is_engine = case.has("deepspeed") or is_fsdp
    return "bf16" if policy == "bf16" and is_engine and not in_fp32 else "fp32"


PRECISION = ("precision.policy", "precision.reduce")
NO_FP16 = "float16 with a scaled loss"


# The axes of a plan: it needs as many devices as their product.
AXES = ("plan.data", "plan.fsdp", "plan.tensor", "plan.pipe")


def plan(shards_of: Callable[[Case], str]) -> Setting:
    """The entry that spreads the run over `--devices`; `shards_of(case)` is what the tool shards.

    Where the user chooses an axis of the plan, the others have the devices that are left.
    """

    def decide(value: Any, case: Case) -> Outcome:
        devices, shards, note = case.answers.devices, case.choice("plan.shards", shards_of(case)), ""
        assert devices is not None  # else the default asks
        is_bf16 = case.ours.get("precision.policy") == "bf16"
        if shards == "nothing" and is_bf16 and not case.chose("plan.shards"):
            shards = "optimizer"
            note = "replicas, whose optimizer is sharded as DeepSpeed's bf16 needs it: the same updates"
        sizes = {axis: number(case.choice(axis, 1), least=1, whole=True) for axis in AXES}
        order = ("plan.data", "plan.fsdp") if shards == "nothing" else ("plan.fsdp", "plan.data")
        if free := [axis for axis in order if not case.chose(axis)]:
            sizes[free[0]] = max(1, devices // math.prod(sizes.values()))
        if sizes["plan.fsdp"] == 1:
            shards, note = "nothing", ""
        spread = {"plan.data": sizes["plan.data"], "plan.fsdp": sizes["plan.fsdp"]}
        return Translated({**spread, "plan.shards": shards}, note)

    keys = ("plan.data", "plan.fsdp", "plan.shards")
    page = "`plan.data`, or `plan.fsdp` and `plan.shards` where ZeRO or FSDP shards"
    return Setting(
        "(devices)", By(decide, page, keys), Question(DEVICES, "the plan depends on the number of devices")
    )


def remat(value: Any, case: Case) -> Outcome:
    """Whether activations are computed again in the backward pass."""
    return Translated({"plan.remat": "full" if value else "none"})


REMAT = By(remat, "`plan.remat`: full or none", ("plan.remat",))


def every(key: str, *, strategy: str, otherwise: str) -> By:
    """How often something is done, in updates; a number below 1 is a share of the run."""

    def decide(value: Any, case: Case) -> Outcome:
        if (case[strategy] or "steps") != "steps":
            return NoEffect(otherwise)
        if number(value) >= 1:
            return Translated({key: int(value)})
        total = case.ours.get("run.steps")
        return Translated({key: math.ceil(total * value)}) if total and value > 0 else NoEffect(otherwise)

    return By(decide, f"`{key}`", (key,))


def tf32(value: Any, case: Case) -> Outcome:
    """Products of float32 numbers in fewer bits."""
    if not value or case.ours.get("precision.policy") == "bf16":
        return NoEffect("no float32 products to speed up")
    return Translated(
        note="differs: there products of float32 numbers are rounded to TF32; here they are float32"
    )


def sampling(value: Any, case: Case) -> Outcome:
    """The order of the examples."""
    if value in ("random", False, None):
        return NoEffect("examples come in random order; ours is a function of run.seed, not torch's")
    return Translated(
        note="differs: there examples of similar length share a batch; here the order is random"
    )


def template(value: Any, case: Case) -> Outcome:
    """A chat template: a recipe names a file of jinja."""
    if value == "tokenizer_default":
        return Translated({"data.chat_template": None})
    if str(value).endswith((".jinja", ".jinja2")):
        return Translated({"data.chat_template": value})
    return Question(
        "--set data.chat_template=FILE",
        "the template has to be a file of jinja; or null for the tokenizer's own",
    )


def special_token(value: Any, case: Case) -> Outcome:
    """A token that is given another meaning: a recipe names a tokenizer that has it."""
    return Question(
        "--set data.tokenizer=DIRECTORY",
        "a tokenizer in which it is so; or null where the model's own has it",
    )


SPECIAL_TOKEN = By(special_token, "asked for: `--set data.tokenizer=DIRECTORY`", ("data.tokenizer",))


def mean_of_means(value: Any, case: Case) -> Outcome:
    """Whether the loss is divided by the count of all devices, as here."""
    if value or case.answers.devices == 1:
        return NoEffect("the loss is divided once, by the count of all devices")
    return Translated(
        note="differs: there each device divides by its own count; here the loss is divided by the global one"
    )


MEAN_OF_MEANS = By(
    mean_of_means, "no effect where true; where false and on several devices a difference is named"
)


def best(value: Any, case: Case) -> Outcome:
    """The weights of the lowest held-out loss instead of the last: kept here as well, but beside the last."""
    name, metric = "load_best_model_at_end", case["metric_for_best_model"]
    last = f"--drop {name} keeps the last"
    if not value:
        return NoEffect("the newest checkpoints are kept: checkpoint.keep")
    if metric not in (None, "loss", "eval_loss") or case["greater_is_better"]:
        return Refused(
            f"the best by {metric or 'the largest loss'}", f"{last}; here it is the lowest held-out loss"
        )
    if not case.ours.get("data.heldout"):
        return Refused("the best checkpoint without held-out records", f"--set data.heldout=FILE, or {last}")
    note = "differs: there the run ends with these weights; here they are kept besides the last, as checkpoints/best"
    return Translated({"checkpoint.keep_best": 1}, note)


BEST = Setting(
    "load_best_model_at_end",
    By(best, "`checkpoint.keep_best`: 1, by the held-out loss and with `data.heldout`; else refused", ("checkpoint.keep_best",)),
)  # fmt: skip
BEST_BY = (
    Setting("metric_for_best_model", Read("load_best_model_at_end")),
    Setting("greater_is_better", Read("load_best_model_at_end")),
)
