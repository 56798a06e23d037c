"""The process around a run: environment, process group, and the engine that makes an update.

DeepSpeed stays in this file. No attribute of its engine is read elsewhere.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from transformers import LlamaForCausalLM

from torchtrain.optim import clip, global_norm
from trainspec.errors import PlanError
from trainspec.plan import check_supported
from trainspec.recipe import Recipe

# What a launcher would set; without RANK DeepSpeed looks for MPI. Port 0 lets the system choose a free one.
_ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
_ZERO_STAGE = {"nothing": 0, "optimizer": 1, "gradients": 2, "params": 3}


class Engine(Protocol):
    """What makes one update of a model: a forward and a backward per microbatch, then one step."""

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`, a microbatch's share of the batch's loss, to what is there."""
        ...

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        ...


def start(recipe: Recipe) -> None:
    """Set up this process: matmul precision and, for DeepSpeed, accelerator and process group.

    Raises PlanError for an unsupported plan, or where a launcher started another number of processes than it takes.
    """
    check_supported(recipe.plan, recipe.precision.policy, "torch")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != recipe.plan.devices:
        raise PlanError(
            f"the launcher started {processes} processes, the plan takes {recipe.plan.devices}; "
            f"start {recipe.plan.devices}"
        )
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 means fp32
    if not _runs_on_deepspeed(recipe):
        return
    deepspeed = _import_deepspeed()
    # This kernel leaves a 66 MiB file in /dev/shm per process and is used by inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in _ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    deepspeed.init_distributed(verbose=False)


def finish() -> None:
    """Undo `start`: leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        # DeepSpeed's, not torch's: it also drops the groups that DeepSpeed remembers.
        _import_deepspeed().comm.destroy_process_group()


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration: a pure function of the recipe, so that a test can hold it fixed.

    Optimizer and learning rate are not in it: they are handed over as objects, alike for every engine.
    """
    batch, plan = recipe.batch, recipe.plan
    ranks = plan.data * plan.fsdp
    return {
        "train_batch_size": batch.global_examples,
        "train_micro_batch_size_per_gpu": batch.global_examples // batch.accumulation // ranks,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,  # 0 is DeepSpeed's word for no clipping
        "zero_optimization": {"stage": _ZERO_STAGE[plan.shards]},
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW is not on DeepSpeed's own list
    }


def make_engine(recipe: Recipe, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> Engine:
    """DeepSpeed's engine; for fp64, which DeepSpeed has not, plain torch with the same arithmetic."""
    if _runs_on_deepspeed(recipe):
        return _DeepSpeedEngine(recipe, model, optimizer)
    return _PlainEngine(model, optimizer, clip_norm=recipe.optimizer.clip_norm)


class _DeepSpeedEngine:
    """DeepSpeed, told when the last microbatch comes and kept from dividing by their number."""

    def __init__(self, recipe: Recipe, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> None:
        self._engine = _import_deepspeed().initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(recipe), dist_init_required=False
        )[0]

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        return self._engine(**inputs).logits

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Gradients of `loss` as it is: it is a share of the batch's loss already."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        self._engine.step()


class _PlainEngine:
    """The same update in plain torch, in the type of the weights."""

    def __init__(
        self, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, *, clip_norm: float | None
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._clip_norm = clip_norm

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        return self._model(**inputs).logits

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Gradients of `loss`; the last microbatch is like every other."""
        loss.backward()

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        if self._clip_norm is not None:
            gradients = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
            clip(gradients, global_norm(gradients), max_norm=self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _runs_on_deepspeed(recipe: Recipe) -> bool:
    return recipe.precision.policy != "fp64"


def _import_deepspeed() -> Any:
    # DeepSpeed picks its accelerator, and says so on stdout, while it is imported: the choice must come first.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return deepspeed
