"""What every backend has: `CONTRACT` names its modules, and a Protocol each for what is in them.

The twins are held to these names and parameters by `tests/test_architecture.py`. What else a module has is its own
framework's business, and so are keyword-only parameters after those of the contract.
The loops need `trainspec.step` alone.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Protocol

from trainspec.evaluation.request import EvaluationRequest
from trainspec.generation.request import GenerationRequest
from trainspec.methods import METHODS, Method
from trainspec.model import ModelSpec
from trainspec.plans.accelerators import Devices
from trainspec.plans.names import DeviceKind
from trainspec.plans.plan import Plan, Policy
from trainspec.recipe import AdamW, Recipe
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.step import Backend
from trainspec.training.request import TrainRequest


class Cluster(Protocol):
    """`cluster`: what belongs to the whole process and to all processes of a run."""

    def start(self, recipe: Recipe) -> Run:
        """The recipe's run, with this process set up for it. Raises PlanError."""
        ...

    def set_up(self, run: Run) -> None:
        """Set this process up for a run whose plan the backend runs. Raises PlanError."""
        ...

    def finish(self) -> None:
        """Undo `set_up`."""
        ...

    def check_accelerators(self) -> None:
        """Raises PlanError for an accelerator of this machine that the framework cannot use."""
        ...

    def default_devices(self) -> tuple[DeviceKind, int]:
        """The kind of device that a run in this process computes on, and how many there are here; on the cores any number."""
        ...

    def describe_devices(self, plan: Plan) -> Devices:
        """What a run with this plan computes on."""
        ...

    def is_leader(self) -> bool:
        """Whether this process has the console and writes files."""
        ...

    def processes(self) -> Processes:
        """The processes of the run, after `set_up`."""
        ...


class Program(Protocol):
    """`train`: what the command line calls."""

    def train(self, run: Run, request: TrainRequest) -> None:
        """Train to the recipe's last step."""
        ...

    def evaluate(self, run: Run, request: EvaluationRequest) -> None:
        """Measure the run's model on its held-out records."""
        ...

    def generate(self, run: Run, request: GenerationRequest) -> None:
        """Generate what the request asks for."""
        ...


class Meshes(Protocol):
    """`mesh`: the grid of devices."""

    def make_mesh(self, plan: Plan) -> Any:
        """The devices of a plan along `plan.MESH_AXES`."""
        ...


class Precisions(Protocol):
    """`precision`: which type is computed in."""

    def accumulation_dtype(self, dtype: Any) -> Any:
        """float32, or float64 for float64."""
        ...


class Models(Protocol):
    """`model`: the forward pass of a spec."""

    def build_model(self, spec: ModelSpec, *, policy: Policy, remat: str) -> Any:
        """The model without weights."""
        ...


class Layers(Protocol):
    """`layers`: what families are made of."""

    RMSNorm: Any

    def attention_mask(self, segments_BS: Any) -> Any:
        """True [B, S, S] where a query may attend."""
        ...


class Dropout(Protocol):
    """`dropout`: masks that are a function of their indices."""

    DropoutPoint: Any

    def keep_mask(
        self, key: Any, *, step: Any, rows: Any, sequence_tokens: int, features: int, rate: float
    ) -> Any:
        """True where an element is kept, bit-equal on every backend."""
        ...


class Losses(Protocol):
    """`loss`: the loss is a sum and a count."""

    def token_loss(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """The sum of token losses, and how many targets there are."""
        ...


class Optimizers(Protocol):
    """`optim`: clip and AdamW."""

    CLIP_EPS: float

    def global_norm(self, gradients: Any) -> Any:
        """The norm of all gradients together."""
        ...

    def clip(self, gradients: Any, norm: Any, *, max_norm: float) -> Any:
        """Gradients of at most `max_norm`."""
        ...

    def make_optimizer(self, spec: AdamW, decayed: Set[str]) -> Any:
        """AdamW, with decay on the names in `decayed`."""
        ...


class Weights(Protocol):
    """`weights`: canonical to native and back; every transpose and stacking."""

    from_canonical: Any
    to_canonical: Any


class Families(Protocol):
    """`families`: a class for each family, by its name."""

    FAMILIES: dict[str, Any]


class Methods(Protocol):
    """`methods`: `attach` by kind, in `ATTACH`."""

    ATTACH: dict[str, Any]

    def attach(self, model: Any, spec: ModelSpec, method: Method, *, seed: int) -> Any:
        """Put the method's layers into the model."""
        ...


class MethodKind(Protocol):
    """`methods.KIND`: one method."""

    def attach(self, model: Any, method: Method, *, site: Any) -> Any:
        """Put its layers into the model."""
        ...


class Costs(Protocol):
    """`cost`: what a device holds and sends, counted; `trainspec.plans.cost` says it in advance."""

    def held(self, state: Any, batch: Any) -> Any:
        """Bytes of the training state on a device."""
        ...

    def moved(self, state: Any, batch: Any) -> Any:
        """Bytes that an update sends."""
        ...


class DecodingWithCache(Protocol):
    """`decoding`: `step.Decoding` with keys and values kept. How it is made is the backend's own: `Backend.decoding` makes it."""

    CachedRows: Any


# A backend's modules, and what is in them.
CONTRACT: dict[str, type] = {
    "step": Backend,
    "train": Program,
    "cluster": Cluster,
    "mesh": Meshes,
    "precision": Precisions,
    "model": Models,
    "layers": Layers,
    "dropout": Dropout,
    "loss": Losses,
    "optim": Optimizers,
    "weights": Weights,
    "families": Families,
    "methods": Methods,
    "cost": Costs,
    "decoding": DecodingWithCache,
} | {f"methods.{spec.__module__.rpartition('.')[2]}": MethodKind for spec in METHODS.values()}
