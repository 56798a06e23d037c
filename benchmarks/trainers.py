"""One trainer on one recipe, in turns that `turns.py` gives it: ours and those that it is compared with.

    python benchmarks/trainers.py jaxtrain|torchtrain|eager|compiled|trainer|trainer-liger RECIPE
    python benchmarks/trainers.py model SIZES DIR       a checkpoint of that size, with random weights

All read the same recipe and train on the same rows in the same order. `eager` is a loop written by hand around Hugging
Face's model, `compiled` the same with `torch.compile`, `trainer` their Trainer with PEFT's LoRA, `trainer-liger` the same with Liger's kernels. In bf16 both do what
their users do: autocast, over a base in bfloat16 where it is frozen and in float32 where it is trained. Their causal
attention knows no documents: the benchmark's rows hold one each, so all compute the same loss.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from trainspec.data import open_dataset
from trainspec.methods import LoRA
from trainspec.recipe import Recipe, load_recipe
from trainspec.runs.run import resolve

# How many updates' rows the Trainer's dataset holds: more than any benchmark makes.
UPDATES = 120


class Turns:
    """Waits for its turn after every update that ends one, and says how long the turn took."""

    def __init__(self, answers: TextIO) -> None:
        self._answers, self._left, self._updates = answers, 1, 1
        self._began, self._used = time.perf_counter(), time.process_time()

    def updated(self, loss: float | Any, peak_bytes: int | None) -> None:
        """Called when an update is complete. Raises SystemExit at the end."""
        self._left -= 1
        if self._left:
            return
        seconds, used = time.perf_counter() - self._began, time.process_time() - self._used
        self._say(seconds=seconds, core_seconds=used)
        line = sys.stdin.readline().strip()
        if not line.isdecimal():
            process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self._say(loss=float(loss), peak_bytes=peak_bytes or process, updates=self._updates)
            raise SystemExit
        self._left = int(line)
        self._updates += self._left
        self._began, self._used = time.perf_counter(), time.process_time()

    def _say(self, **words: float) -> None:
        print(json.dumps(words), file=self._answers, flush=True)


def main() -> None:
    """Train as the arguments say."""
    kind, *rest = sys.argv[1:]
    if kind == "model":
        make_model(json.loads(rest[0]), Path(rest[1]))
        return
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turns, recipe = Turns(answers), load_recipe(Path(rest[0]), [])
    match kind:
        case "jaxtrain" | "torchtrain":
            train_ours(kind, recipe, turns)
        case "eager" | "compiled":
            train_eager(recipe, turns, is_compiled=kind == "compiled")
        case "trainer" | "trainer-liger":
            train_with_trainer(recipe, turns, with_liger=kind == "trainer-liger")
        case _:
            raise SystemExit(f"{kind}: unknown; see the first lines of {__file__}")


def make_model(sizes: dict[str, Any], directory: Path) -> None:
    """Write a Llama of these sizes with random weights: float32, or bfloat16 where it is too large to be trained whole."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, sizes.pop("dtype", "float32"))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(directory, max_shard_size="2GB")


def train_ours(package: str, recipe: Recipe, turns: Turns) -> None:
    """Train with this project's own loop, without checkpoints and reports."""
    from trainspec.training import loop
    from trainspec.training.observers import Observer, Update
    from trainspec.training.run_data import open_data

    cluster: Any = importlib.import_module(f"{package}.cluster")
    step: Any = importlib.import_module(f"{package}.step")

    class InTurns(Observer[Any]):
        def updated(self, state: Any, update: Update) -> Update:
            turns.updated(update.metrics.loss_sum / update.metrics.tokens, ours_peak(package, state))
            return update

    run, data = open_data(cluster.start(recipe))
    loop.follow(step, run, data, step.init_state(run), [InTurns()])


def ours_peak(package: str, state: Any) -> int | None:
    """Waits until the device has finished; the most memory it had in use, None where that is the process's."""
    if package == "torchtrain":
        return torch_peak()
    import jax

    jax.block_until_ready((state.trainable, state.master, state.moments))
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def torch_peak() -> int | None:
    """Waits until the device has finished; the most memory it had in use, None where that is the process's."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def hugging_face_model(recipe: Recipe) -> Any:
    """The recipe's model as Hugging Face and PEFT make it."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    method, is_bf16 = recipe.method, recipe.precision.policy == "bf16"
    dtype = torch.bfloat16 if is_bf16 and isinstance(method, LoRA) else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        recipe.model.from_, dtype=dtype, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if isinstance(method, LoRA):
        adapter = LoraConfig(
            r=method.rank, lora_alpha=int(method.alpha), lora_dropout=method.dropout,
            target_modules="all-linear", task_type=TaskType.CAUSAL_LM,
        )  # fmt: skip
        model = get_peft_model(model, adapter)
        if recipe.plan.remat == "full":
            model.enable_input_require_grads()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def microbatches(recipe: Recipe, updates: range) -> Iterator[list[tuple[Any, Any]]]:
    """Of each update the parts that are accumulated: token ids and labels as int64 arrays [B, S]."""
    data = open_dataset(resolve(recipe), "train")
    for number in updates:
        parts = data.batch(number, recipe.batch.global_examples).split(recipe.batch.accumulation)
        yield [(part.input_ids.astype("int64"), part.labels.astype("int64")) for part in parts]


def train_eager(recipe: Recipe, turns: Turns, *, is_compiled: bool) -> None:
    """A loop written by hand: forward and backward pass, clip, fused AdamW; the model as it is or compiled."""
    import torch

    model, settings = hugging_face_model(recipe), recipe.optimizer
    if recipe.plan.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True,
    )  # fmt: skip
    autocast = torch.autocast(
        model.device.type, dtype=torch.bfloat16, enabled=recipe.precision.policy == "bf16"
    )
    forward = torch.compile(model) if is_compiled else model
    for parts in microbatches(recipe, range(UPDATES)):
        loss_sum = torch.zeros((), device=model.device)
        for part in parts:
            ids, labels = (torch.from_numpy(array).to(model.device) for array in part)
            with autocast:
                loss = forward(input_ids=ids, labels=labels).loss / len(parts)
            loss.backward()
            loss_sum += loss.detach()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.updated(loss_sum, torch_peak())


def train_with_trainer(recipe: Recipe, turns: Turns, *, with_liger: bool) -> None:
    """Hugging Face's Trainer, with its own defaults where the recipe has no word."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments

    settings, batch = recipe.optimizer, recipe.batch
    rows: Any = [
        {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        for parts in microbatches(recipe, range(UPDATES))
        for part in parts
        for ids, labels in zip(*part, strict=True)
    ]

    class InOrder(Trainer):
        losses: tuple[Any, ...] = ()

        def get_train_dataloader(self) -> DataLoader:
            collate = self.data_collator
            return DataLoader(rows, batch_size=self._train_batch_size, collate_fn=collate)

        def training_step(self, *args: Any, **named: Any) -> Any:
            loss = super().training_step(*args, **named)
            self.losses = (*self.losses, loss)[-batch.accumulation :]
            return loss

    class InTurns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.updated(sum(trainer.losses), torch_peak())

    has_gpu, has_remat = torch.cuda.is_available(), recipe.plan.remat == "full"
    arguments = TrainingArguments(
        output_dir="build/bench/trainer", max_steps=UPDATES,
        per_device_train_batch_size=batch.global_examples // batch.accumulation,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=settings.lr, adam_beta1=settings.betas[0], adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps, weight_decay=settings.weight_decay, max_grad_norm=settings.clip_norm or 0.0,
        lr_scheduler_type="constant", optim="adamw_torch_fused",
        bf16=recipe.precision.policy == "bf16", use_cpu=not has_gpu,
        gradient_checkpointing=has_remat, gradient_checkpointing_kwargs={"use_reentrant": False} if has_remat else None,
        use_liger_kernel=with_liger, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(
        model=hugging_face_model(recipe), args=arguments, train_dataset=rows, callbacks=[InTurns()]
    )  # pyright: ignore[reportArgumentType]
    trainer.train()


if __name__ == "__main__":
    main()
