"""DeepSpeed's private and version-dependent names, each wrapped in a function with a plain name.

No other module imports deepspeed or uses a private name of it: to upgrade, hold this file to the new version. A `zero` is
DeepSpeed's own optimizer around ours.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.versions import report_other_version

# The version that this file was read against, and all tests were run with.
WRITTEN_FOR = "0.19.8"
# The instructions of one stage, slot by slot.
Schedule = Iterable[Sequence[Any]]


def runs_on_deepspeed(recipe: Recipe) -> bool:
    """Whether DeepSpeed makes the updates: it has no float64."""
    return recipe.precision.policy != "fp64"


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


@cache
def report_version() -> None:
    """Say on stderr, once, if the installed DeepSpeed is not the version that this file was written for."""
    installed = import_deepspeed().__version__
    report_other_version("deepspeed", installed, written_for=WRITTEN_FOR, program="torchtrain")


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """For DeepSpeed's start: BF16_Optimizer prints what memory there is, six times, and collects garbage before each.

    Its prints, and a pipeline's of its topology, stay off the console. A collection goes through all objects that there are, most of
    a second; here through those of the start alone.
    """
    others_froze = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if not others_froze:
            gc.unfreeze()


def destroy_group(group: Any) -> None:
    """Destroy a process group; through DeepSpeed where it is in use, as it remembers groups."""
    deepspeed = sys.modules.get("deepspeed")
    owner = deepspeed.comm if deepspeed and deepspeed.comm.is_initialized() else dist
    owner.destroy_process_group(group)


def reset() -> None:
    """Clear what a run leaves in DeepSpeed's modules, and the group of a single process."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:
        return
    deepspeed.utils.groups.mpu = None
    if dist.is_initialized() and dist.get_world_size() == 1:
        deepspeed.comm.destroy_process_group()


def release(engine: Any) -> None:
    """Remove an engine's hooks, and its last loss, through whose graph it would refer to itself for ever."""
    engine.destroy()
    engine.loss = engine.total_loss = None


def mark_tensor_parallel(parameter: nn.Parameter) -> None:
    """Have the norm count `parameter` on every tensor peer, as each holds a shard; others count on the first only."""
    parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]


def mark_pipe_replicated(parameter: nn.Parameter, replicated: bool) -> None:
    """Have the norm leave `parameter` out if it is `replicated`: a copy of one that another stage counts."""
    parameter.ds_pipe_replicated = replicated  # pyright: ignore[reportAttributeAccessIssue]


def shard_parameter(init: Any, parameter: nn.Parameter) -> None:
    """Keep this process's shard of `parameter` only.

    `init` is a `deepspeed.zero.Init`. As a context around a model's constructor it would need whole modules in memory.
    """
    init._convert_to_zero_parameters([parameter])


def gather_whole(module: nn.Module) -> None:
    """Gather the weights of an adapted layer for the whole of its passes, not those of each layer in it as that is called.

    They are reduced when its input's gradient is there: an input that needs none is made to.
    """

    def needs_gradient(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not args[0].requires_grad:
            args[0].requires_grad_()

    import_deepspeed().utils.set_z3_leaf_module(module, True)
    module.register_forward_pre_hook(needs_gradient)


# Stages 1 and 2: float32 master weights, gradients and moments are flat buffers, of which each replica has a stretch.
# BF16_Optimizer has stage 1 in bf16 with gradients in float32, ZeRO's own optimizer the rest.


def start_flat_state(zero: Any) -> None:
    """Link the moments to the parameters, as DeepSpeed does at the first update: they can be restored before it."""
    zero._lazy_init_hp_params_optimizer_state()


def flat_stretch(parameter: nn.Parameter, moment: str | None) -> tuple[int, Tensor]:
    """This replica's stretch of a master weight, or of its `moment`, and which of the parameter's elements is its first."""
    mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is None:  # other replicas have all of it
        return 0, torch.empty(0, device=parameter.device)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).detach()


def flat_norm(zero: Any) -> float:
    """The norm that DeepSpeed clips by."""
    if not _is_bf16_optimizer(zero):
        return _number(zero.scaled_global_norm())
    from deepspeed.runtime.utils import get_global_norm_of_tensors

    gradients, _ = zero.get_grads_for_norm()
    return _number(get_global_norm_of_tensors(gradients, mpu=zero.mpu))


def flat_gradients(zero: Any) -> list[Tensor]:
    """This replica's stretches of the gradients, with DeepSpeed's padding."""
    if _is_bf16_optimizer(zero):
        return list(zero.fp32_groups_gradients_flat)
    return [t for stretches in zero.averaged_gradients.values() for t in stretches or ()]


def allow_no_gradients(zero: Any, device: torch.device) -> None:
    """Let a process have no gradient of its own in the norm, where BF16_Optimizer fails on an empty list.

    Replicated gradients are counted on the first tensor peer or stage only, and the others may have no further ones.
    """
    if not _is_bf16_optimizer(zero):
        return
    own = zero.get_grads_for_norm

    def get_gradients(for_clipping: bool = False) -> Any:
        gradients = own(for_clipping=for_clipping)
        if for_clipping:
            return gradients
        dense, of_experts = gradients
        return dense or [torch.zeros(1, device=device)], of_experts

    zero.get_grads_for_norm = get_gradients


def _is_bf16_optimizer(zero: Any) -> bool:
    return type(zero).__name__ == "BF16_Optimizer"


def _number(norm: Any) -> float:
    """DeepSpeed writes -1 for a norm that is not finite."""
    return math.nan if float(norm) < 0 else float(norm)


# Stage 3: each parameter is cut into as many shards as there are replicas, the last one padded.


def weight_shard(parameter: nn.Parameter) -> Tensor:
    """This replica's shard of a weight, in the type of the computation."""
    return parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole_size(parameter: nn.Parameter) -> int:
    """How many elements a parameter has on all replicas together."""
    return parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]


def master_shards(zero: Any) -> list[Tensor]:
    """This replica's float32 master weights, which the optimizer updates."""
    return zero.fp32_partitioned_groups_flat


def gradient_shards(zero: Any) -> Tensor:
    """This replica's gradients, one flat buffer."""
    return zero.grad_partitions_flat_buffer


def group_norms(zero: Any) -> list[float]:
    """The norm of each group of the optimizer, over all replicas; NaN where it is not finite."""
    return [_number(norm) for norm in zero._get_norm_groups()]


class Pipeline:
    """DeepSpeed's pipeline engine, with passes and reductions of ours in place of its own, and the update apart."""

    def __init__(
        self,
        engine: Any,
        *,
        forward: Callable[[int], None],
        backward: Callable[[int], None],
        reduce_shared: Callable[[], None],
    ) -> None:
        """`forward` and `backward` make a pass of the microbatch whose buffer they are given.

        `reduce_shared` comes after the last one, for gradients that several stages have a share of.
        """
        self._engine = engine
        engine._compute_loss = True
        schedule = import_deepspeed().runtime.pipe.schedule
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
            schedule.LoadMicroBatch: _skip,  # the forward pass brings its own
            schedule.ForwardPass: lambda _, buffer_id: forward(buffer_id),
            schedule.BackwardPass: lambda _, buffer_id: backward(buffer_id),
            schedule.ReduceTiedGrads: lambda _: reduce_shared(),
            schedule.OptimizerStep: _skip,  # comes with `update`
        }

    @property
    def is_first_stage(self) -> bool:
        """Whether this process embeds the tokens."""
        return self._engine.is_first_stage()

    @property
    def is_last_stage(self) -> bool:
        """Whether this process has the logits."""
        return self._engine.is_last_stage()

    @property
    def groups(self) -> list[Any]:
        """The process groups that DeepSpeed has made for the pipeline."""
        grid, module = self._engine.grid, self._engine.module
        tied = [shared["group"] for shared in module.tied_comms.values()]
        whole = (grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group)
        return [module.world_group, *whole, *tied]

    def train(self, microbatches: int) -> None:
        """Run a batch's forward and backward passes, and the reductions."""
        self._run(training_schedule(microbatches, self._engine.num_stages, self._engine.stage_id))

    def infer(self, microbatches: int) -> None:
        """Run forward passes only."""
        self._run(self._engine._inference_schedule(microbatches))

    def _run(self, schedule: Schedule) -> None:
        # It remembers the shape of the last run, whose microbatches may have had more examples.
        self._engine.reset_activation_shape()
        self._engine._exec_schedule(schedule)

    def set_input(self, buffer: int, input_ids: Tensor) -> None:
        """What the first stage's next forward pass embeds."""
        self._engine.pipe_buffers["inputs"][buffer] = input_ids

    def forward_pass(self, buffer: int) -> None:
        """DeepSpeed's forward pass of a microbatch; on the last stage with the loss."""
        self._engine._exec_forward_pass(buffer)

    def backward_pass(self, buffer: int) -> None:
        """The backward pass of a microbatch. DeepSpeed's own would divide the loss by the number of microbatches."""
        engine = self._engine
        if not self.is_last_stage:
            engine._exec_backward_pass(buffer)
            return
        import_deepspeed().DeepSpeedEngine.backward(engine, engine.loss, scale_wrt_gas=False)
        engine.pipe_buffers["outputs"][buffer] = None  # the logits, which DeepSpeed would keep

    def reduce_tied(self) -> None:
        """Sum the gradients of a tied embedding over the stages that have it."""
        self._engine._exec_reduce_tied_grads()

    def gradient(self, parameter: nn.Parameter) -> Any:
        """The sum so far, which BF16_Optimizer has beside the parameter."""
        return parameter._hp_grad if self._engine.using_bf16_optimizer else parameter.grad  # pyright: ignore[reportAttributeAccessIssue]

    def update(self) -> None:
        """Clip, update and clear the gradients."""
        self._engine._exec_optimizer_step()


def training_schedule(microbatches: int, stages: int, stage: int) -> Schedule:
    """1F1B, with a slot for the update after it."""
    schedule = import_deepspeed().runtime.pipe.schedule
    return schedule.TrainSchedule(micro_batches=microbatches, stages=stages, stage_id=stage)


@torch.no_grad()  # a tied weight is sent from one stage to the others, in place
def pipeline_module(
    layers: Sequence[Any], *, plan: Plan, bounds: Sequence[int], loss: Callable[..., Tensor]
) -> nn.Module:
    """DeepSpeed's module of this process's stage: stage i has `layers[bounds[i] : bounds[i + 1]]`."""
    deepspeed = import_deepspeed()

    class Stages(deepspeed.pipe.PipelineModule):
        """Cut at `bounds`; DeepSpeed's own ways count parameters."""

        def _partition_layers(self, method: str) -> None:
            self.parts = list(bounds)
            self._set_bounds(bounds[self.stage_id], bounds[self.stage_id + 1])

    # Axes in the order of the mesh, the last one fastest.
    topology = deepspeed.runtime.pipe.topology.PipeModelDataParallelTopology(
        num_pp=plan.pipe, num_mp=plan.tensor, num_dp=plan.replicas
    )
    with starting():
        return Stages(list(layers), topology=topology, loss_fn=loss)


def _skip(engine: Any, **_: Any) -> None:
    """In place of an instruction that is carried out elsewhere."""
