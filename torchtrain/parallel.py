"""The processes of a run: joining them, their mesh, and the engine that makes an update over it.

Ranks go along `trainspec.plans.plan.MESH_AXES`, the last axis fastest: rank = (stage * replicas + replica) * tensor + part.
DeepSpeed is in zero.py, its pipeline in pipeline.py, starting processes in launch.py.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.engine import Engine, Inputs, Microbatches, Store, Stored
from torchtrain.launch import check_gpus, count_processes, describe_cluster
from torchtrain.optim import MOMENTS, clip, global_norm, start_moments
from torchtrain.pipeline import PipelineEngine
from torchtrain.tensor import Mesh, Peers, is_split
from torchtrain.weights import canonical_name
from torchtrain.zero import DeepSpeedEngine, by_part, import_deepspeed
from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.plans.accelerators import Devices, accelerators, hides_gpus
from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.runs.run import Run, resolve_on

# What a launcher would set; without RANK DeepSpeed looks for MPI. Port 0 lets the system choose a free one.
_ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
# What was made since `start`, for `finish` to undo.
_open_engines: list[Engine] = []
_open_groups: list[Any] = []


def start(recipe: Recipe) -> Run:
    """The recipe's run, with this process set up for it: matmul precision, device, and the group of all processes.

    Raises PlanError for an unsupported plan, where a launcher started another number of processes than it takes, or
    where they do not find each other or a GPU each.
    """
    run = resolve_on(recipe, BACKENDS["torch"])
    os.environ.update(describe_cluster(os.environ))
    processes = count_processes(os.environ)
    if processes != recipe.plan.devices:
        raise PlanError(
            f"the launcher started {processes} processes, the plan takes {recipe.plan.devices}; start as many, or make "
            f"plan.pipe × plan.data × plan.fsdp × plan.tensor {processes}"
        )
    check_accelerators()
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 means fp32
    if torch.cuda.is_available():
        # Slurm does not say how many are here; a place is refused where there are too few before it.
        place = int(os.environ.get("LOCAL_RANK", "0"))
        check_gpus(max(place + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        torch.cuda.set_device(place)
    if processes > 1:
        _join()
    if _runs_on_deepspeed(recipe):
        for name, value in _ONE_PROCESS.items():
            os.environ.setdefault(name, value)
        import_deepspeed().init_distributed(verbose=False)
    return run


def _join() -> None:
    """Join the other processes, once: a launcher's store keeps the addresses of a first meeting."""
    if dist.is_initialized():
        return
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PlanError(f"the processes did not meet at {where}: {str(error).splitlines()[0]}") from error
    atexit.register(dist.destroy_process_group)


def finish() -> None:
    """Undo `start`, but for the group of several processes: the next run in them finds it joined."""
    while _open_engines:
        _open_engines.pop().close()
    # Nobody closes a connection that another still reads from. A process that failed waits for nobody, and leaves it to
    # its end to close them: the others are not to fail before it has said why.
    if _open_groups and sys.exc_info()[0] is not None:
        return
    if _open_groups:
        dist.barrier()
    deepspeed = sys.modules.get("deepspeed")
    # DeepSpeed's, not torch's, where it is in use: it also drops the groups that it remembers.
    owner = deepspeed.comm if deepspeed and deepspeed.comm.is_initialized() else dist
    while _open_groups:
        owner.destroy_process_group(_open_groups.pop())
    if deepspeed is not None:
        deepspeed.utils.groups.mpu = None
        if dist.is_initialized() and dist.get_world_size() == 1:
            deepspeed.comm.destroy_process_group()


def check_accelerators() -> None:
    """Raises PlanError where this machine has a GPU or TPU that torch cannot use, and nobody said to do without."""
    if torch.cuda.is_available() or hides_gpus(os.environ):
        return
    for found in accelerators():
        way_out = "or set CUDA_VISIBLE_DEVICES= to train on the cores"
        if found.kind == "TPU":
            raise PlanError(f"{found}, which torchtrain does not use; train with jaxtrain, {way_out}")
        reason = f"it sees {torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
            reason = str(error)
        raise PlanError(
            f"{found}, and torch {torch.__version__} cannot use it: {reason}; install a driver and a build of torch that "
            f"go with each other, {way_out}"
        )


def describe_devices(plan: Plan) -> Devices:
    """What a run with this plan computes on: a device for each process."""
    packages = ("torch", "transformers", "peft", "deepspeed", "numpy")
    if not torch.cuda.is_available():
        return Devices("torch", "cpu", plan.devices, plan.devices, plan.devices, packages)
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    kind, count = f"{gpu.name} (CUDA {torch.version.cuda})", max(plan.devices, torch.cuda.device_count())
    return Devices("torch", kind, plan.devices, count, plan.devices, packages, gpu.total_memory)


def is_leader() -> bool:
    """Whether this is the one process that has the console and writes files."""
    return (os.environ | describe_cluster(os.environ)).get("RANK", "0") == "0"


def make_mesh(plan: Plan) -> Mesh:
    """The groups that this process is in; every process of the run makes all of them, in the same order."""
    if plan.devices == 1:
        return Mesh(tensor=Peers(), replicas=Peers(), stages=Peers())
    ranks = np.arange(plan.devices).reshape(plan.pipe, plan.replicas, plan.tensor)
    stages = _peers(ranks, 0) if plan.pipe > 1 else Peers()
    return Mesh(tensor=_peers(ranks, 2), replicas=_peers(ranks, 1), stages=stages)


def _peers(ranks: NDArray[Any], axis: int) -> Peers:
    """Those along one axis of the mesh."""
    groups = np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis]).tolist()
    made = [(group, dist.new_group(group)) for group in groups]
    mine, group = next((mine, group) for mine, group in made if dist.get_rank() in mine)
    _open_groups.append(group)
    return Peers(group, mine.index(dist.get_rank()), len(mine))


def make_engine(run: Run, model: PreTrainedModel, optimizer: torch.optim.AdamW, *, mesh: Mesh) -> Engine:
    """DeepSpeed's engine, or its pipeline's; for fp64, which DeepSpeed has not, plain torch with the same arithmetic."""
    recipe, spec = run.recipe, run.spec
    parts = {p.name for p in run.trained if any(map(is_split, p.axes))}
    whole = _WholeStore(model, optimizer, mesh.tensor, parts=parts if mesh.tensor.size > 1 else set())
    engine: Engine
    if recipe.plan.pipe > 1:
        engine = pipeline = PipelineEngine(recipe, spec, model, optimizer, mesh=mesh)
        _open_groups.extend(pipeline.groups)
    elif _runs_on_deepspeed(recipe):
        engine = DeepSpeedEngine(recipe, spec, model, optimizer, mesh=mesh, whole=whole)
    else:
        engine = _PlainEngine(model, optimizer, whole, mesh, clip_norm=recipe.optimizer.clip_norm)
    _open_engines.append(engine)
    return engine


class _WholeStore:
    """Each replica has all of the state of its layers; of the rows named by `parts` each tensor peer has a part."""

    def __init__(
        self, model: PreTrainedModel, optimizer: torch.optim.AdamW, tensor: Peers, *, parts: Set[str]
    ) -> None:
        self._model, self._optimizer, self._tensor, self._parts = model, optimizer, tensor, parts

    def norm(self) -> float:
        """Each logical element once: what is split over the peers is summed, what all have is counted here."""
        split: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                (split if canonical_name(name) in self._parts else whole)[name] = parameter.grad
        if not split:
            return global_norm(whole).item()
        squares = self._tensor.sum_(global_norm(split).double().square())
        return (squares + global_norm(whole).double().square()).sqrt().item()

    def read(self, what: Stored, parameter: nn.Parameter) -> Tensor:
        """The tensor itself."""
        match what:
            case "weight":
                return parameter
            case "gradient":
                assert parameter.grad is not None
                return parameter.grad
            case "moment1" | "moment2":
                return self._optimizer.state[parameter][MOMENTS[what]]

    @torch.no_grad()
    def write(self, what: Stored, parameter: nn.Parameter, value: Tensor) -> None:
        """In place."""
        self.read(what, parameter).copy_(value)

    def held(self) -> dict[str, list[Tensor]]:
        """Everything; there is no master copy."""
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return by_part(parameters, gradients, (), self._optimizer)


class _PlainEngine:
    """The same update in plain torch, in the type of the weights."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.AdamW,
        store: Store,
        mesh: Mesh,
        *,
        clip_norm: float | None,
    ) -> None:
        self.loss_scale = 1.0
        self.store = store
        self._model = model
        self._optimizer = optimizer
        self._mesh = mesh
        self._clip_norm = clip_norm
        start_moments(optimizer, (p for p in model.parameters() if p.requires_grad))

    def accumulate(self, microbatches: Microbatches) -> None:
        """Gradients of the losses; after the last microbatch they are summed over the replicas."""
        for index in range(len(microbatches)):
            logits = self._model(**microbatches.forward(index)).logits
            loss = microbatches.loss(index, logits)
            microbatches.backward(index)
            loss.backward()
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                self._mesh.replicas.sum_(parameter.grad)

    def infer(self, parts: Sequence[Inputs]) -> list[Tensor]:
        """Logits [B, T, V] of each part."""
        return [self._model(**inputs).logits for inputs in parts]

    def step(self) -> None:
        """Clip, update and clear the gradients."""
        if self._clip_norm is not None:
            gradients = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
            norm = torch.tensor(self.store.norm(), dtype=torch.float64)
            clip(gradients, norm, max_norm=self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """There is nothing to undo."""


def _runs_on_deepspeed(recipe: Recipe) -> bool:
    return recipe.precision.policy != "fp64"
