"""DeepSpeed: its configuration, its engine, and the training state that it keeps split over the replicas.

What is known of DeepSpeed's inside (0.19.8) stands in this file, and nothing of its engine is read elsewhere, but by its pipeline in pipeline.py.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.engine import Inputs, Microbatches, Store, Stored
from torchtrain.optim import MOMENTS, start_moments
from torchtrain.tensor import Mesh, Peers, compute_device
from trainspec.model import ModelSpec
from trainspec.recipe import Recipe

_ZERO_STAGE = {"nothing": 0, "optimizer": 1, "gradients": 2, "params": 3}
# Elements that are reduced at once. DeepSpeed's 5e8 would hold 2 GB of float32 beside the gradients.
_BUCKET_ELEMENTS = 100_000_000


def import_deepspeed() -> Any:
    """DeepSpeed, on the accelerator there is."""
    # It picks its accelerator, and says so on stdout, while it is imported: the choice must come first.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It calls torch by names that torch 2.13 has others for; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    # This kernel leaves a 66 MiB file in /dev/shm per process and is used by inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """DeepSpeed's configuration: a pure function of recipe and model, so that a test can hold it fixed.

    Optimizer and learning rate are not in it: they are handed over as objects, alike for every engine.
    """
    batch, plan = recipe.batch, recipe.plan
    microbatches = batch.accumulation * plan.microbatches  # a pipeline makes one run of all of them
    config: dict[str, Any] = {
        "train_batch_size": batch.global_examples,
        "train_micro_batch_size_per_gpu": batch.global_examples // microbatches // plan.replicas,
        "gradient_accumulation_steps": microbatches,
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,  # 0 is DeepSpeed's word for no clipping
        "zero_optimization": _zero_config(_stage(recipe), spec),
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW is not on DeepSpeed's own list
    }
    if recipe.precision.policy == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": recipe.precision.reduce}
        config["communication_data_type"] = recipe.precision.reduce
    return config


def _stage(recipe: Recipe) -> int:
    stage = _ZERO_STAGE[recipe.plan.shards]
    # Stage 0 makes an update of zero gradients while it starts in bf16: Adam's count and the decay are one ahead.
    # In a pipeline its clip leaves the later stages out of the norm.
    # Stage 1 over one replica is the same arithmetic without either.
    return max(stage, 1) if recipe.precision.policy == "bf16" or recipe.plan.pipe > 1 else stage


def _zero_config(stage: int, spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        config |= {
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            # Else every gradient goes to every replica: 3 Psi on the wire instead of ZeRO's 2.
            "use_multi_rank_bucket_allreduce": False,
        }
    if stage == 3:
        config |= {
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            # Every weight is split, also a small one: gathered with its block it costs nothing.
            "stage3_param_persistence_threshold": 0,
            # A weight goes as soon as its layer is through, whatever the model's size; 1e9 elements would stay.
            "stage3_max_reuse_distance": 0,
            # What is fetched ahead of its layer: as much as a small matrix, as Hugging Face's integration has it.
            # What is fetched ahead stays, so a bucket as large as the model would undo the line above.
            "stage3_prefetch_bucket_size": spec.embed**2,
            # Puts another F.linear in torch's place, for the whole process and for good.
            "memory_efficient_linear": False,
        }
    return config


class Mpu:
    """What DeepSpeed asks about tensor parallelism, under the names it uses."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self) -> Any:
        """The tensor-parallel peers."""
        return self._mesh.tensor.group

    def get_model_parallel_rank(self) -> int:
        """This process's place among them."""
        return self._mesh.tensor.index

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.tensor.size

    def get_data_parallel_group(self) -> Any:
        """The replicas."""
        return self._mesh.replicas.group

    def get_data_parallel_rank(self) -> int:
        """This process's place among them."""
        return self._mesh.replicas.index

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.replicas.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class Partitioner:
    """Under `shards: params` splits a parameter as soon as it is filled: no process ever holds the whole model."""

    def __init__(self, recipe: Recipe, spec: ModelSpec, mesh: Mesh) -> None:
        self._init = None
        if _stage(recipe) == 3 and recipe.precision.policy != "fp64":
            self._init = import_deepspeed().zero.Init(
                data_parallel_group=mesh.replicas.group,
                config_dict_or_path=deepspeed_config(recipe, spec),
                mpu=Mpu(mesh),
            )

    def __call__(self, parameter: nn.Parameter) -> None:
        """Keep this process's part of `parameter` only."""
        if self._init is not None:
            # The public way, as a context around the model's constructor, would need whole modules in memory.
            self._init._convert_to_zero_parameters([parameter])


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Keeps off the console what DeepSpeed prints, asked or not: BF16_Optimizer the memory, a pipeline its topology."""
    return contextlib.redirect_stdout(io.StringIO())


def initialize(
    recipe: Recipe,
    spec: ModelSpec,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    *,
    mpu: Mpu | None = None,
) -> Any:
    """DeepSpeed's own engine. A pipeline's module brings its own `mpu`."""
    with quiet():
        return import_deepspeed().initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(recipe, spec),
            dist_init_required=False,
            mpu=mpu,
        )[0]


class DeepSpeedEngine:
    """DeepSpeed, told when the last microbatch comes and kept from dividing by their number."""

    def __init__(
        self,
        recipe: Recipe,
        spec: ModelSpec,
        model: PreTrainedModel,
        optimizer: torch.optim.AdamW,
        *,
        mesh: Mesh,
        whole: Store,
    ) -> None:
        """`whole` is the store of a state that is not split."""
        mpu = Mpu(mesh) if recipe.plan.devices > 1 else None
        self._engine = initialize(recipe, spec, model, optimizer, mpu=mpu)
        self._model = model
        # DeepSpeed takes the mean over the replicas, of gradients that are shares of one batch.
        self.loss_scale = float(recipe.plan.replicas)
        match _stage(recipe):
            case 0:
                start_moments(optimizer, _updated(optimizer))
                self.store = whole
            case 1 | 2:
                self.store = FlatStore(self._engine, optimizer)
            case _:
                self.store = _PartitionedStore(self._engine, optimizer, mesh.replicas)

    def accumulate(self, microbatches: Microbatches) -> None:
        """Gradients of each loss as it is: it is a share of the batch's loss already."""
        last = len(microbatches) - 1
        for index in range(last + 1):
            logits = self._engine(**microbatches.forward(index)).logits
            loss = microbatches.loss(index, logits)
            microbatches.backward(index)
            self._engine.set_gradient_accumulation_boundary(index == last)
            self._engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    def infer(self, parts: Sequence[Inputs]) -> list[Tensor]:
        """Logits [B, T, V] of each part."""
        return [self._model(**inputs).logits for inputs in parts]

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        self._engine.step()

    def close(self) -> None:
        """Take DeepSpeed's hooks off."""
        self._engine.destroy()


class FlatStore:
    """Stages 1 and 2: flat float32 master weights, moments and gradients, each replica with one stretch of them.

    Two optimizers of DeepSpeed's: BF16_Optimizer for stage 1 in bf16 with gradients in float32, else ZeRO's own.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.AdamW) -> None:
        self._engine, self._zero, self._optimizer = engine, engine.optimizer, optimizer
        self._is_bf16_optimizer = type(self._zero).__name__ == "BF16_Optimizer"
        if self._is_bf16_optimizer:
            _allow_no_share(self._zero)
        start_moments(optimizer, _updated(optimizer))
        # DeepSpeed does so at the first update; moments have to be there to be restored before.
        self._zero._lazy_init_hp_params_optimizer_state()

    def norm(self) -> float:
        """DeepSpeed's own, which it clips by."""
        if self._is_bf16_optimizer:
            from deepspeed.runtime.utils import get_global_norm_of_tensors

            gradients, _ = self._zero.get_grads_for_norm()
            return _number(get_global_norm_of_tensors(gradients, mpu=self._zero.mpu))
        return _number(self._zero.scaled_global_norm())

    def read(self, what: Stored, parameter: nn.Parameter) -> Tensor:
        """Summed from each replica's stretch."""
        has_master = parameter.requires_grad and parameter.dtype != torch.float32
        return parameter if what == "weight" and not has_master else _read_whole(what, parameter)

    @torch.no_grad()
    def write(self, what: Stored, parameter: nn.Parameter, value: Tensor) -> None:
        """Into this replica's stretch, and weights into the copy that is computed with."""
        utils = import_deepspeed().utils
        match what:
            case "weight":
                utils.safe_set_full_fp32_param(parameter, value)
                parameter.copy_(value)
            case "gradient":
                raise AssertionError("gradients are made by a backward pass")
            case "moment1" | "moment2":
                utils.safe_set_full_optimizer_state(parameter, value, MOMENTS[what])

    def held(self) -> dict[str, list[Tensor]]:
        """Flat buffers, with DeepSpeed's padding."""
        parameters = list(self._engine.module.parameters())
        masters = _updated(self._optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._is_bf16_optimizer:
            gradients += self._zero.fp32_groups_gradients_flat
        else:
            gradients += [t for part in self._zero.averaged_gradients.values() for t in part or ()]
        return by_part(parameters, gradients, masters, self._optimizer)


def _allow_no_share(zero: Any) -> None:
    """Let a process have no gradient of its own in the norm, where DeepSpeed's optimizer for bf16 fails.

    What all tensor peers or all stages have is counted by the first of them, and the others may have nothing else.
    """
    own = zero.get_grads_for_norm

    def gradients(for_clipping: bool = False) -> Any:
        found = own(for_clipping=for_clipping)
        if for_clipping:
            return found
        dense, of_experts = found
        return dense or [torch.zeros(1, device=compute_device())], of_experts

    zero.get_grads_for_norm = gradients


class _PartitionedStore:
    """Stage 3: every parameter by itself is cut into as many parts as there are replicas, the last one padded."""

    def __init__(self, engine: Any, optimizer: torch.optim.AdamW, replicas: Peers) -> None:
        self._engine, self._zero, self._optimizer = engine, engine.optimizer, optimizer
        self._replicas = replicas
        start_moments(optimizer, self._zero.fp32_partitioned_groups_flat)

    def norm(self) -> float:
        """DeepSpeed's own, which it clips by."""
        norms = [float(norm) for norm in self._zero._get_norm_groups()]
        return math.nan if min(norms) < 0 else math.hypot(*norms)

    def read(self, what: Stored, parameter: nn.Parameter) -> Tensor:
        """Gathered from the replicas' parts."""
        if what == "weight" and not parameter.requires_grad:
            with import_deepspeed().zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return _read_whole(what, parameter)

    @torch.no_grad()
    def write(self, what: Stored, parameter: nn.Parameter, value: Tensor) -> None:
        """This replica's part. DeepSpeed's setters of whole tensors fail where the last part is padded."""
        utils = import_deepspeed().utils
        kept: Tensor = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        padded = value.new_zeros(kept.numel() * self._replicas.size)
        padded[: value.numel()] = value.flatten()
        part = padded.chunk(self._replicas.size)[self._replicas.index].to(kept.device)
        match what:
            case "weight":
                utils.safe_set_local_fp32_param(parameter, part)
                kept.copy_(part)
            case "gradient":
                raise AssertionError("gradients are made by a backward pass")
            case "moment1" | "moment2":
                utils.safe_set_local_optimizer_state(parameter, part, MOMENTS[what])

    def held(self) -> dict[str, list[Tensor]]:
        """Parts, with DeepSpeed's padding."""
        parameters = list(self._engine.module.parameters())
        kept = [p.ds_tensor for p in parameters]  # pyright: ignore[reportAttributeAccessIssue]
        gradients = [self._zero.grad_partitions_flat_buffer]
        gradients += [p.grad for p in parameters if p.grad is not None]
        return by_part(
            [*parameters, *kept], gradients, self._zero.fp32_partitioned_groups_flat, self._optimizer
        )


def _read_whole(what: Stored, parameter: nn.Parameter) -> Tensor:
    """A master weight, a gradient or a moment, by DeepSpeed's own getters: all replicas have to ask."""
    utils = import_deepspeed().utils
    match what:
        case "weight":
            return utils.safe_get_full_fp32_param(parameter)
        case "gradient":
            return utils.safe_get_full_grad(parameter)
        case "moment1" | "moment2":
            return utils.safe_get_full_optimizer_state(parameter, MOMENTS[what])


def _updated(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """What the optimizer updates: parameters, or the flat parts that DeepSpeed has made of them."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def by_part(
    weights: Iterable[Tensor],
    gradients: Iterable[Tensor],
    master: Iterable[Tensor],
    optimizer: torch.optim.AdamW,
) -> dict[str, list[Tensor]]:
    """What a store's `held` gives."""
    moments = [state[key] for state in optimizer.state.values() for key in MOMENTS.values()]
    return {
        "weights": list(weights),
        "gradients": list(gradients),
        "master": list(master),
        "moments": moments,
    }


def _number(norm: Any) -> float:
    """DeepSpeed writes -1 for a norm that is not finite."""
    return math.nan if float(norm) < 0 else float(norm)
