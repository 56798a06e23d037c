"""The trace of a run: plain, documented files for comparison that any program can write and read.

    DIR/trace.json             what the run was: `trainspec.trace_header`; may be left out
    DIR/trace.jsonl            one object per step: step (1, 2, 3, ...; after a resume N+1, N+2, ..., which trace.json states
                               as first_step), loss_sum, tokens, loss, grad_norm, lr
    DIR/initial.safetensors    weight/<name>, frozen weights included, before the first step of the trace; after a resume also
                               moment1/<name>, moment2/<name>: the run as it was restored after step N. In its header (safetensors' `__metadata__`,
                               which other readers ignore) `causal_order`, a JSON list of [name, role, layer] of
                               every weight and every activation point, in causal order: see `TraceName`.
                               Role and layer are null where they are unknown
    DIR/step-000001.safetensors
        batch/input_ids, batch/labels, batch/positions, batch/segments   [global_examples, sequence_tokens]
                               a program with other inputs writes its own arrays as batch/<name>
        gradient/<name>        after reduction, before clipping
        update/<name>          weight after minus weight before
        change/<name>          the same of what has no gradient at this step: frozen weights, running statistics, target
                               networks, counters (as int64). Zero where it stays as it is: its absence says nothing
        moment1/<name>, moment2/<name>                                   the optimizer's state: Adam's, without bias
        slot/<slot>/<name>                                               correction, and any other by the slot's name
        activation/<point>, activation_gradient/<point>                  on request, [global_examples, ...]: see below
    DIR/stopped.safetensors    the step that ended the run before its update, as loss or gradient is not finite: batch, gradient,
                               activation and activation_gradient as above, and scalar/<key> for the keys of trace.jsonl
    DIR/resume-000003.safetensors
        weight/<name>, moment1/<name>, moment2/<name>                    in a trace joined from two parts (`parity check
                               --resume-at 2`): the run as it was restored before step 3

The points, in forward order (`trainspec.points`); those of layer i, from 0, are `layers.{i}.NAME`:

    prompt                     [examples, virtual, embed]                a prompt's virtual tokens, as they are put in front
    embedding                  [examples, positions, embed]              the first layer's input: positions are those of the
                               tokens, after any virtual tokens of a prompt
    input_norm                 [examples, positions, embed]              the layer's input, normed
    query, key, value          [examples, positions, heads, head_dim]    its projections; keys and values have kv heads
    query_norm, key_norm       the same                                  after the norms of each head (Qwen3)
    rotated_query, rotated_key the same                                  after the rotary embedding
    prefix_key, prefix_value   [examples, virtual, kv_heads, head_dim]   a prefix, as attention takes it
    mixed                      [examples, positions, heads, head_dim]    what the output projection takes
    attention                  [examples, positions, embed]              what is added to the residual stream
    post_norm                  [examples, positions, embed]              the stream after that, normed
    gate, up, product          [examples, positions, mlp]                product = act(gate) * up, what the last projection takes
    mlp, block                 [examples, positions, embed]              what is added to the stream, and the stream after it
    MODULE.lora_A              [examples, positions, rank]               at each target of LoRA or DoRA: A x
    MODULE.lora_B              [examples, positions, out]                and scale B A x
    attention_adapter.hidden,  [examples, positions, bottleneck]         what a bottleneck adapter's `up` takes
    mlp_adapter.hidden
    norm, logits               [examples, positions, embed], [..., vocab]

`<name>` is canonical: Hugging Face's for the model, PEFT's for its adapters. Arrays keep the run's precision. A trace may
leave `causal_order` out: `parity diff` then orders by the layer number in a name, and within a layer by name, with the
numbers in it taken as numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trainspec.data import Batch
from trainspec.entry import Role as WeightRole
from trainspec.errors import TraceError
from trainspec.files.tensors import save_tensors
from trainspec.trace_header import HEADER_FILE, TraceHeader, read_header

Arrays = Mapping[str, NDArray[Any]]
# What an update keeps for a trace; activations come with the gradients.
Keep = Literal["nothing", "gradients", "activations"]
# What a name in a trace stands for: a weight, by its role in the table, or an activation point.
Role = WeightRole | Literal["point"]
ROLES = (*get_args(WeightRole), "point")
ORDER_KEY = "causal_order"
STEP_KEYS = ("step", "loss_sum", "tokens", "loss", "grad_norm", "lr")
STOPPED_FILE = "stopped.safetensors"
# numpy's names for the types of a safetensors file.
_TYPES = {"BF16": "bfloat16", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{word}{bits}"
    for letter, word, sizes in (
        ("F", "float", (16, 32, 64)),
        ("I", "int", (8, 16, 32, 64)),
        ("U", "uint", (8, 16, 32, 64)),
    )
    for bits in sizes
}


class Form(NamedTuple):
    """Type, by numpy's name, and shape of a tensor that need not be read."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TraceName:
    """One name in a trace with its role (None if unknown) and, if it is in a layer, the layer (from 0)."""

    name: str
    role: Role | None
    layer: int | None = None


@dataclass(frozen=True)
class StepTrace:
    """The record of one update. `step` counts from 1; `grad_norm` is taken before clipping.

    `batch` is a mapping of named arrays in a program with other inputs than tokens.
    """

    step: int
    batch: Batch | Arrays
    loss_sum: float
    tokens: int
    grad_norm: float
    lr: float
    gradients: Arrays
    updates: Arrays
    moment1: Arrays
    moment2: Arrays
    activations: Arrays = field(default_factory=dict)
    activation_gradients: Arrays = field(default_factory=dict)
    changes: Arrays = field(default_factory=dict)
    slots: Mapping[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceRequest:
    """Where to write a trace, and which steps (from 1) have activations: none, one, or `all`."""

    directory: Path
    activations_at: int | Literal["all"] | None = None

    def keep(self, step: int) -> Keep:
        """What update `step` must keep."""
        return "activations" if self.activations_at in ("all", step) else "gradients"


def check_free(directory: Path, *, resumes: bool = False) -> None:
    """Raises TraceError for a directory that holds anything but a trace; for a run that resumes, a trace as well."""
    if resumes and (directory / "trace.jsonl").is_file():
        raise TraceError(
            f"--trace {directory}: holds a trace, perhaps of the steps before the checkpoint; give another directory, or remove it"
        )
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "trace.jsonl").is_file():
        raise TraceError(f"--trace {directory}: holds other files; give an empty or a new directory")


class TraceWriter:
    """Writes a trace directory step by step, replacing an earlier trace.

    Raises TraceError for a directory that holds anything else.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        check_free(directory)
        directory.mkdir(parents=True, exist_ok=True)
        others = (directory / name for name in ("initial.safetensors", HEADER_FILE, STOPPED_FILE))
        for old in (
            *directory.glob("step-??????.safetensors"),
            *directory.glob("resume-??????.safetensors"),
            *others,
        ):
            old.unlink(missing_ok=True)
        (directory / "trace.jsonl").write_text("", encoding="utf-8")
        self._file = directory / "trace.jsonl"

    def initial(
        self,
        weights: Arrays,
        order: Sequence[TraceName] = (),
        *,
        moments: tuple[Arrays, Arrays] | None = None,
        header: TraceHeader | None = None,
    ) -> None:
        """Record the starting weights, and the causal order of all names and what the run is, if that is known.

        `moments` are those of a run that resumed.
        """
        listed = json.dumps([[named.name, named.role, named.layer] for named in order])
        metadata = {ORDER_KEY: listed} if order else None
        groups = {"weight": weights}
        if moments:
            groups |= {"moment1": moments[0], "moment2": moments[1]}
        _save(self._directory / "initial.safetensors", groups, metadata=metadata)
        if header:
            header.write(self._directory)

    def step(self, trace: StepTrace) -> None:
        """Record one update: first its tensors, then its line, so that every line has its tensors."""
        groups = _passes(trace) | {
            "update": trace.updates,
            "change": trace.changes,
            "moment1": trace.moment1,
            "moment2": trace.moment2,
            "slot": {
                f"{slot}/{name}": a for slot, arrays in trace.slots.items() for name, a in arrays.items()
            },
        }
        _save(self._directory / step_file(trace.step), groups)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_scalars(trace)) + "\n")

    def stopped(self, trace: StepTrace) -> None:
        """Record the step that ended the run before its update."""
        scalars = {key: np.asarray(value, np.float64) for key, value in _scalars(trace).items()}
        _save(self._directory / STOPPED_FILE, _passes(trace) | {"scalar": scalars})


class Trace:
    """Reads a trace directory; tensors are read one at a time.

    `steps` are the objects of trace.jsonl, from `first_step` on; `stopped` is that of the step that ended the run before its
    update, None if there is none, which is read like the others. `header` is None where there is none. Raises TraceError
    where a file is missing, cut short or malformed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "trace.jsonl"
        if not path.is_file():
            raise TraceError(f"{path}: missing; give the directory that a run wrote with --trace")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise TraceError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        self.header = read_header(directory)
        self.steps = [_parse_step(path, number, line) for number, line in enumerate(lines, 1)]
        self.stopped = _stopped(directory / STOPPED_FILE)
        records = [*self.steps, *([self.stopped] if self.stopped else [])]
        if not records:
            raise TraceError(f"{path}: has no step; the run that wrote it made no update")
        self.first_step = _first_step(path, [record["step"] for record in records], self.header)
        self._records = {record["step"]: record for record in records}

    def __contains__(self, step: int) -> bool:
        """Whether it has the step, made or stopped."""
        return step in self._records

    def record(self, step: int) -> dict[str, Any]:
        """The object of a step in trace.jsonl."""
        return self._records[step]

    def names(self, step: int) -> list[str]:
        """Keys of the step's tensors, such as `gradient/model.norm.weight`, in a fixed order."""
        return [key for key in _keys(self._path(step)) if not key.startswith("scalar/")]

    def read(self, step: int, key: str) -> NDArray[Any]:
        """One tensor of one step."""
        return _read(self._path(step), key)

    def forms(self, step: int) -> dict[str, Form]:
        """Type and shape of the step's tensors by key; none is read."""
        return _forms(self._path(step))

    def _path(self, step: int) -> Path:
        is_stopped = self.stopped is not None and step == self.stopped["step"]
        return self.directory / (STOPPED_FILE if is_stopped else step_file(step))

    def resumed_names(self, step: int) -> list[str]:
        """Keys of what the run was restored to before a step; empty where it did not resume there."""
        path = self.directory / resume_file(step)
        return _keys(path) if path.is_file() else []

    def read_resumed(self, step: int, key: str) -> NDArray[Any]:
        """One tensor of what the run was restored to before a step."""
        return _read(self.directory / resume_file(step), key)

    def initial_names(self) -> list[str]:
        """Keys of the starting weights, such as `weight/model.norm.weight`, and after a resume of the moments."""
        return _keys(self.directory / "initial.safetensors")

    def initial_forms(self) -> dict[str, Form]:
        """Type and shape of what `initial_names` names; nothing is read."""
        return _forms(self.directory / "initial.safetensors")

    def causal_order(self) -> tuple[TraceName, ...]:
        """The names of the trace in causal order; empty where it was written without one."""
        path = self.directory / "initial.safetensors"
        try:
            with safe_open(path, "numpy") as file:
                listed = (file.metadata() or {}).get(ORDER_KEY, "[]")
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{path}: {error}; the trace is incomplete, write it again") from None
        try:
            return tuple(TraceName(*entry) for entry in json.loads(listed) if _is_named(*entry))
        except (TypeError, ValueError) as error:
            raise TraceError(
                f"{path}: {ORDER_KEY} is not a list of [name, role, layer] ({error}); write the trace again, or without it"
            ) from None

    def read_initial(self, key: str) -> NDArray[Any]:
        """One starting weight or moment."""
        return _read(self.directory / "initial.safetensors", key)


def _batch_arrays(batch: Batch | Arrays) -> Arrays:
    if not isinstance(batch, Batch):
        return batch
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "positions": batch.positions,
        "segments": batch.segments,
    }


def _passes(trace: StepTrace) -> dict[str, Arrays]:
    """What the forward and backward pass of a step leave."""
    return {
        "batch": _batch_arrays(trace.batch),
        "gradient": trace.gradients,
        "activation": trace.activations,
        "activation_gradient": trace.activation_gradients,
    }


def _scalars(trace: StepTrace) -> dict[str, float]:
    mean = trace.loss_sum / trace.tokens if trace.tokens else math.nan
    values = (trace.step, trace.loss_sum, trace.tokens, mean, trace.grad_norm, trace.lr)
    return dict(zip(STEP_KEYS, values, strict=True))


def _stopped(path: Path) -> dict[str, Any] | None:
    """The object of the step that ended the run before its update."""
    if not path.is_file():
        return None
    record: dict[str, Any] = {key: float(_read(path, f"scalar/{key}")) for key in STEP_KEYS}
    return record | {key: int(record[key]) for key in ("step", "tokens")}


def _is_named(name: object, role: object, layer: object) -> bool:
    if (
        not isinstance(name, str)
        or role not in (*ROLES, None)
        or not (layer is None or isinstance(layer, int))
    ):
        raise ValueError(f"{[name, role, layer]}")
    return True


def step_file(step: int) -> str:
    """The name of the file of a step."""
    return f"step-{step:06d}.safetensors"


def resume_file(step: int) -> str:
    """The name of the file of what a run was restored to before a step."""
    return f"resume-{step:06d}.safetensors"


def _save(path: Path, groups: Mapping[str, Arrays], *, metadata: Mapping[str, str] | None = None) -> None:
    temporary = path.with_suffix(".tmp")
    save_tensors(
        {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()},
        temporary,
        metadata=metadata,
    )
    temporary.rename(path)


def _parse_step(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        missing = [key for key in STEP_KEYS if key not in values]
    except (json.JSONDecodeError, TypeError) as error:
        raise TraceError(
            f"{path} line {number}: not a JSON object: {error}; the file is cut short or damaged"
        ) from None
    if missing:
        raise TraceError(f"{path} line {number}: no {', '.join(missing)}")
    return values


def _first_step(path: Path, steps: Sequence[object], header: TraceHeader | None) -> int:
    """The first step: 1, or what the header says. Raises TraceError unless the steps follow each other from there."""
    first = steps[0]
    if not isinstance(first, int) or first < 1 or list(steps) != list(range(first, first + len(steps))):
        raise TraceError(
            f"{path}: steps are not 1, 2, 3, ... (or N+1, N+2, ... after a resume); write the trace of a whole run"
        )
    stated = (header.first_step if header else None) or 1
    if first != stated:
        raise TraceError(
            f"{path}: begins with step {first}, not {stated}; write the trace again, or say in {HEADER_FILE} that first_step is {first}"
        )
    return first


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: {error}; the trace is incomplete, write it again") from None


def _forms(path: Path) -> dict[str, Form]:
    try:
        with safe_open(path, "numpy") as file:
            slices = {key: file.get_slice(key) for key in list(file.keys())}
            return {
                key: Form(_TYPES.get(str(s.get_dtype()), str(s.get_dtype())), tuple(s.get_shape()))
                for key, s in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: {error}; the trace is incomplete, write it again") from None


def _read(path: Path, key: str) -> NDArray[Any]:
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: {key}: {error}; the trace is incomplete, write it again") from None
