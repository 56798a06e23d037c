"""DeepSpeed: its configuration, its engine, and the stores of a training state that its replicas share out."""

# B examples, T positions of a layer, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain import _deepspeed
from torchtrain._deepspeed import import_deepspeed, runs_on_deepspeed, starting
from torchtrain.engines.engine import Inputs, Microbatches, Saved, Store, Stored, Stretch, by_kind
from torchtrain.engines.plain import WholeStore
from torchtrain.families import anatomy_of
from torchtrain.mesh import Mesh, Peers, compute_device
from torchtrain.optim import MOMENTS, start_moments
from torchtrain.weights import Elements
from trainspec.model import ModelSpec
from trainspec.recipe import Recipe
from trainspec.runs.run import Run

_ZERO_STAGE = {"nothing": 0, "optimizer": 1, "gradients": 2, "params": 3}
# Elements that are reduced at once. DeepSpeed's 5e8 would hold 2 GB of float32 beside the gradients.
_BUCKET_ELEMENTS = 100_000_000


def deepspeed_config(recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """DeepSpeed's configuration: a pure function of recipe and model, so that a test can hold it fixed.

    Optimizer and learning rate are not in it: they are given as objects, as for every engine.
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
            # Small weights are split, too: gathered with their block they cost nothing.
            "stage3_param_persistence_threshold": 0,
            # A weight is released as soon as its layer is done, whatever the model's size; 1e9 elements would stay.
            "stage3_max_reuse_distance": 0,
            # Elements fetched ahead of their layer: a small matrix, as in Hugging Face's integration. They stay, so a
            # bucket as large as the model would undo the line above.
            "stage3_prefetch_bucket_size": spec.embed**2,
            # Would replace torch's F.linear, for the whole process and for good.
            "memory_efficient_linear": False,
        }
    return config


class Mpu:
    """What DeepSpeed asks about tensor parallelism, under Megatron-LM's names."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self) -> Any:
        """The tensor peers."""
        return self._mesh.tensor.group

    def get_model_parallel_rank(self) -> int:
        """This process's position among them."""
        return self._mesh.tensor.index

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.tensor.size

    def get_data_parallel_group(self) -> Any:
        """The replicas."""
        return self._mesh.replicas.group

    def get_data_parallel_rank(self) -> int:
        """This process's position among them."""
        return self._mesh.replicas.index

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.replicas.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class Partitioner:
    """Under `shards: params` shards a parameter as soon as it is filled: no process ever holds the whole model."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        self._init = None
        if _stage(run.recipe) == 3 and runs_on_deepspeed(run.recipe):
            self._init = import_deepspeed().zero.Init(
                data_parallel_group=mesh.replicas.group,
                config_dict_or_path=deepspeed_config(run.recipe, run.spec),
                mpu=Mpu(mesh),
            )

    def __call__(self, parameter: nn.Parameter) -> None:
        """Keep this process's shard of `parameter` only."""
        if self._init is not None:
            _deepspeed.shard_parameter(self._init, parameter)


def initialize(run: Run, module: nn.Module, optimizer: torch.optim.AdamW, *, mpu: Mpu | None = None) -> Any:
    """DeepSpeed's own engine. A pipeline's module brings its own `mpu`."""
    with starting():
        return import_deepspeed().initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(run.recipe, run.spec),
            dist_init_required=False,
            mpu=mpu,
        )[0]


class DeepSpeedEngine:
    """DeepSpeed, told when the last microbatch comes and kept from dividing by their number."""

    def __init__(self, run: Run, model: PreTrainedModel, optimizer: torch.optim.AdamW, *, mesh: Mesh) -> None:
        plan = run.recipe.plan
        mpu = Mpu(mesh) if plan.devices > 1 else None
        head = anatomy_of(model).head(model)
        if _stage(run.recipe) == 3 and [*head.children()]:
            _deepspeed.gather_whole(head)
        self._engine = initialize(run, model, optimizer, mpu=mpu)
        self._model = model
        # DeepSpeed takes the mean over the replicas, of gradients that are shares of one batch.
        self.loss_scale = float(plan.replicas)
        self.store: Store
        match _stage(run.recipe):
            case 0:
                start_moments(optimizer, _updated(optimizer))
                self.store = WholeStore(run, model, optimizer, mesh)
            case 1 | 2:
                self.store = FlatStore(self._engine, optimizer)
            case _:
                self.store = ShardedStore(self._engine, optimizer, mesh.replicas)

    def accumulate(self, microbatches: Microbatches) -> None:
        """Each loss is a share of the batch's: its gradient is added as it is."""
        last = len(microbatches) - 1
        for index in range(last + 1):
            output = self._engine(**microbatches.forward(index)).logits
            loss = microbatches.loss(index, output)
            microbatches.backward(index)
            self._engine.set_gradient_accumulation_boundary(index == last)
            self._engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    def infer(self, count: int, inputs: Callable[[int], Inputs]) -> list[Tensor]:
        """The head's output of each microbatch."""
        return [self._model(**inputs(index)).logits for index in range(count)]

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        self._engine.step()

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        _deepspeed.release(self._engine)


class FlatStore:
    """Stages 1 and 2: flat buffers of float32 master weights, gradients and moments; each replica holds a stretch."""

    def __init__(self, engine: Any, optimizer: torch.optim.AdamW) -> None:
        self._engine, self._zero, self._optimizer = engine, engine.optimizer, optimizer
        _deepspeed.allow_no_gradients(self._zero, compute_device())
        start_moments(optimizer, _updated(optimizer))
        _deepspeed.start_flat_state(self._zero)

    def norm(self) -> float:
        """DeepSpeed's own, which it clips by."""
        return _deepspeed.flat_norm(self._zero)

    def read(self, kind: Stored, parameter: nn.Parameter) -> Tensor:
        """Summed over the replicas, each with its stretch and zeros elsewhere."""
        has_master = parameter.requires_grad and parameter.dtype != torch.float32
        return parameter if kind == "weight" and not has_master else _read_whole(kind, parameter)

    def own(self, kind: Saved, parameter: nn.Parameter) -> Stretch:
        """This replica's stretch of the master weight or the moment, as far as it is of `parameter`."""
        return Stretch(*_deepspeed.flat_stretch(parameter, MOMENTS.get(kind)))

    @torch.no_grad()
    def write(self, kind: Saved, parameter: nn.Parameter, elements: Elements) -> None:
        """This replica's stretch only; but all of a weight, as every replica computes with it."""
        first, mine = self.own(kind, parameter)
        if kind != "weight":
            mine.copy_(elements(first, first + len(mine)))
            return
        whole = elements(0, parameter.numel())
        mine.copy_(whole[first : first + len(mine)])
        parameter.copy_(whole.view_as(parameter))

    def tensors(self) -> dict[str, list[Tensor]]:
        """Flat buffers, with DeepSpeed's padding."""
        parameters = list(self._engine.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradients += _deepspeed.flat_gradients(self._zero)
        return by_kind(parameters, gradients, _updated(self._optimizer), self._optimizer)


class ShardedStore:
    """Stage 3: each parameter is cut into as many shards as there are replicas, the last one padded."""

    def __init__(self, engine: Any, optimizer: torch.optim.AdamW, replicas: Peers) -> None:
        self._engine, self._zero, self._optimizer = engine, engine.optimizer, optimizer
        self._replicas = replicas
        start_moments(optimizer, _deepspeed.master_shards(self._zero))

    def norm(self) -> float:
        """DeepSpeed's own, which it clips by."""
        return math.hypot(*_deepspeed.group_norms(self._zero))

    def read(self, kind: Stored, parameter: nn.Parameter) -> Tensor:
        """Gathered from the replicas' shards."""
        if kind == "weight" and not parameter.requires_grad:
            with import_deepspeed().zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return _read_whole(kind, parameter)

    def own(self, kind: Saved, parameter: nn.Parameter) -> Stretch:
        """This replica's shard without its padding."""
        utils = import_deepspeed().utils
        first, count = self._range(parameter)
        if kind == "weight":
            return Stretch(first, utils.safe_get_local_fp32_param(parameter)[:count])
        return Stretch(first, utils.safe_get_local_optimizer_state(parameter, MOMENTS[kind])[:count])

    @torch.no_grad()
    def write(self, kind: Saved, parameter: nn.Parameter, elements: Elements) -> None:
        """This replica's shard. DeepSpeed's setters of whole tensors fail where the last shard is padded."""
        utils = import_deepspeed().utils
        first, count = self._range(parameter)
        weight = _deepspeed.weight_shard(parameter)
        mine = elements(first, first + count).to(weight.device)
        shard = torch.cat([mine, mine.new_zeros(weight.numel() - count)])
        match kind:
            case "weight":
                utils.safe_set_local_fp32_param(parameter, shard)
                weight.copy_(shard)
            case "moment1" | "moment2":
                utils.safe_set_local_optimizer_state(parameter, shard, MOMENTS[kind])

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The first element of this replica's shard, and how many there are before the padding."""
        size = _deepspeed.weight_shard(parameter).numel()
        first = self._replicas.index * size
        return first, max(0, min(size, _deepspeed.whole_size(parameter) - first))

    def tensors(self) -> dict[str, list[Tensor]]:
        """Shards, with DeepSpeed's padding."""
        parameters = list(self._engine.module.parameters())
        weights = [*parameters, *map(_deepspeed.weight_shard, parameters)]
        gradients = [_deepspeed.gradient_shards(self._zero)]
        gradients += [p.grad for p in parameters if p.grad is not None]
        return by_kind(weights, gradients, _deepspeed.master_shards(self._zero), self._optimizer)


def _read_whole(kind: Stored, parameter: nn.Parameter) -> Tensor:
    """A master weight, a gradient or a moment, by DeepSpeed's own getters: all replicas have to call."""
    utils = import_deepspeed().utils
    match kind:
        case "weight":
            return utils.safe_get_full_fp32_param(parameter)
        case "gradient":
            return utils.safe_get_full_grad(parameter)
        case "moment1" | "moment2":
            return utils.safe_get_full_optimizer_state(parameter, MOMENTS[kind])


def _updated(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """What the optimizer updates: parameters, or the flat buffers that DeepSpeed has made of them."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
