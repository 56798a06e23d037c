"""What every backend has: `CONTRACT` names its modules, and a Protocol each for what is in them.

The twins are held to these names and parameters by `tests/test_architecture.py`. What else a module has is its own
framework's business, and so are keyword-only parameters after those of the contract.
The loop needs `Backend` alone, the functions of a `step` module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import Shard
from trainspec.data import Batch
from trainspec.evaluation.request import EvaluationRequest
from trainspec.generation.request import GenerationRequest
from trainspec.methods import METHODS, Method
from trainspec.model import ModelSpec
from trainspec.plans.accelerators import Devices
from trainspec.plans.names import DeviceKind
from trainspec.plans.plan import Plan, Policy
from trainspec.recipe import AdamW, Recipe
from trainspec.runs.processes import Processes
from trainspec.runs.request import TrainRequest
from trainspec.runs.run import Run
from trainspec.trace import Keep

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Metrics:
    """The results of one update. `grad_norm`, `gradients` and `activation_gradients` are taken before clipping.

    `gradients` (by canonical name), `activations` and `activation_gradients` (by point, [global_examples,
    sequence_tokens, ...]) are given only on request. A gradient is that of the batch's mean token loss.
    """

    loss_sum: float
    tokens: int
    grad_norm: float
    gradients: Arrays | None = None
    activations: Arrays | None = None
    activation_gradients: Arrays | None = None


RoundingKind = Literal["stored", "wide"]


@dataclass(frozen=True)
class Roundings:
    """Relative sizes of the roundings that a float64 reference simulates.

    `stored` is that of results in the type that is computed with, `wide` of those in the accumulation type, `summed` of weights'
    gradients in the type that they are summed in.
    """

    stored: float
    wide: float
    summed: float

    def of(self, kind: RoundingKind) -> float:
        """The size of a rounding of this kind."""
        return self.stored if kind == "stored" else self.wide


class HasStep(Protocol):
    """A state of training."""

    @property
    def step(self) -> int:
        """Number of updates made."""
        ...


S = TypeVar("S", bound=HasStep)


class ArrayFormat(Protocol[S]):
    """How the arrays of a state become files, and files arrays."""

    name: str

    def begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """Take a copy of what this process saves of `state`, which may change as soon as this returns.

        The function that is returned writes it into `folder`, in another thread, and returns the digest of each file by its path
        there (`files.digests`).
        """
        ...

    def restore(self, state: S, path: Path) -> S:
        """`state` as it was when the checkpoint at `path` was taken."""
        ...


class Decoding(Protocol):
    """Rows of tokens that grow by one at a time: what attention needs of the tokens that are there is kept.

    The logits are those of `Backend.next_logits` for the whole rows, but for rounding. All processes call, with the same
    arguments.
    """

    def begin(self, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row of `batch`, which has one segment a row, padded right."""
        ...

    def extend(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """Add a token [B] to each row: the logits [B, vocab] after it. -1 adds none to a row that has ended: its logits mean nothing."""
        ...


class DecodingWithCache(Protocol):
    """`decoding`: `Decoding` with keys and values kept. How it is made is the backend's own: `Backend.decoding` makes it."""

    CachedRows: Any


class Backend(Protocol[S]):
    """The functions of `jaxtrain.step` and `torchtrain.step`. Arrays are whole, under canonical names."""

    def init_state(self, run: Run, *, like: S | None = None) -> S:
        """The run before its first update. Reuses what was compiled for `like`, a state of an equal recipe."""
        ...

    def feed(self, state: S, batch: Batch) -> Batch:
        """The same batch, near the devices: called in a thread while `train_step` makes another update of the run."""
        ...

    def train_step(self, state: S, batch: Batch, *, lr: float, keep: Keep = "nothing") -> tuple[S, Metrics]:
        """One update; consumes `state`.

        Raises NonFiniteLossError with the step's metrics before the update, with `state` as it was.
        """
        ...

    def eval_step(self, state: S, batch: Batch) -> tuple[float, int]:
        """Loss sum and target tokens, without dropout."""
        ...

    def next_logits(self, state: S, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The logits [B, vocab] after position `last` [B] of each row, without dropout; on every process."""
        ...

    def decoding(self, state: S, *, length: int) -> Decoding | None:
        """A cache for rows of up to `length` tokens; None where the plan has none, and each token computes its whole row."""
        ...

    def weights_of(self, state: S, *, frozen: bool = False) -> Arrays:
        """The trained weights; with `frozen` all weights."""
        ...

    def moments_of(self, state: S) -> tuple[Arrays, Arrays]:
        """Adam's first and second moments."""
        ...

    def shards_of(self, state: S, copy: Copy = np.copy) -> Iterator[Shard]:
        """Copies of what this process saves: of all processes together every element of weights and moments once.

        `copy` makes those of arrays that are on the host, and may fill them until the last shard was taken and later.
        """
        ...

    def restore(self, state: S, checkpoint: Checkpoint) -> S:
        """`state` as it was when `checkpoint` was taken; consumes `state`."""
        ...

    def native_format(self, run: Run, processes: Processes) -> ArrayFormat[S]:
        """What `checkpoint.format: native` is. Called where the backend's capabilities have it."""
        ...


class Reference(Backend[S], Protocol):
    """A backend that can be the float64 reference of `parity`: it simulates the roundings of a narrower type."""

    def gradients_of(
        self, state: S, batch: Batch, *, keep: Keep, roundings: Roundings | None = None, draw: int = 0
    ) -> Metrics:
        """What an update would leave, without making it. Raises NonFiniteLossError with it, if it is not finite."""
        ...

    def logits(
        self, state: S, batch: Batch, *, roundings: Roundings | None = None, draw: int = 0
    ) -> NDArray[Any]:
        """The logits [B, S, vocab] after every token of `batch`, without dropout."""
        ...


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
