"""Record a trace of any training program, in any framework, for `parity diff`: arrays in, files out.

Two programs that do the same training may name and lay out their weights differently. Each maps its own names to common
ones, so that the traces can be compared tensor by tensor, step by step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from parity.recording.header import RecordedHeader
from parity.recording.name_map import Array, Arrays, Join, NamedArrays, NameMap, Split, copied
from trainspec.errors import TraceError
from trainspec.plans.plan import Policy
from trainspec.trace import StepTrace, TraceName, TraceWriter
from trainspec.trace_header import OrderOrigin


class Recorder:
    """Writes the trace of one training run.

        recorder = Recorder("runs/mine", names={"fc.kernel": "fc.weight"}, transpose={"fc.kernel"})
        recorder.initial(weights)
        for ...:
            recorder.step(batch=..., loss_sum=..., tokens=..., lr=..., gradients=..., weights=..., slots={"momentum": ...})

    `names` maps the program's own names to the common ones, one to one. Layouts, by own names: `transpose` lists the
    matrices whose two dimensions are swapped on the other side, `permute` gives the axes of a convolution's kernel, such
    as (3, 2, 0, 1), `split` the parts of a fused weight; `join` is by common name the own weights that are parts of it.
    `order` lists common names, of weights and activations, as data flows through them, for the comparison walks the
    gradients back through it; by default that is the order of `names`, or of the weights in `initial`, unless it is merely
    alphabetical. `replace` writes over an earlier trace.

    The trace's header, trace.json, says what the run was, and `parity diff` reads it: `program` is your name for it,
    `precision` what it computes in (fp64, fp32 or bf16; the type of the gradients stands for it where nothing is said),
    `first_step` the first step to come where the run resumed from a checkpoint. The versions of the libraries, and digests
    of the starting weights and of all batches, are added.

    Arrays are anything that `numpy.asarray` takes, a `jax.Array` or a torch tensor. Each is copied at once, so the program
    may update its weights in place. Types are kept: a float64 run gives a float64 trace, which is held to 1e-9.

    Raises TraceError if a name is not in the map, an array is missing, a shape is not the weight's, or an argument is not
    what it says.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        names: Mapping[str, str],
        transpose: Collection[str] = (),
        permute: Mapping[str, Sequence[int]] | None = None,
        split: Mapping[str, Split] | None = None,
        join: Mapping[str, Join] | None = None,
        order: Sequence[str] = (),
        replace: bool = False,
        program: str | None = None,
        precision: Policy | None = None,
        first_step: int = 1,
    ) -> None:
        self._map = NameMap(names, transpose=transpose, permute=permute, split=split, join=join)
        self._header = RecordedHeader(program, precision, first_step)
        for name in order:
            if list(order).count(name) > 1:
                raise TraceError(f"order: {name!r} is listed twice")
        directory = Path(directory)
        lines = directory / "trace.jsonl"
        if not replace and lines.is_file() and lines.stat().st_size:
            raise TraceError(
                f"{directory}: holds a trace; give another directory, or replace=True to write over it"
            )
        self._order = list(order)
        self._order_origin: OrderOrigin | None = "given" if order else None
        self._directory, self._writer = directory, TraceWriter(directory)
        self._weights: Arrays = {}
        self._starting_moments: tuple[Arrays, Arrays] | None = None
        self._own_shapes: dict[str, tuple[int, ...]] = {}
        self._trained: set[str] = set()
        self._step, self._first_step = first_step - 1, first_step

    def initial(
        self, weights: NamedArrays, *, moment1: NamedArrays | None = None, moment2: NamedArrays | None = None
    ) -> None:
        """Record the weights before the first update. Call it once, before the first `step`.

        Frozen weights, running statistics, target networks and counters belong to them. `moment1` and `moment2` are Adam's
        in a run that resumed.
        """
        if self._weights:
            raise TraceError(
                "initial: called before; one Recorder writes one run, so make another for another run"
            )
        missing = sorted(set(self._map.own) - set(weights))
        if missing:
            raise TraceError(f"initial: no {missing[0]!r}, which is in the name map; give every weight")
        self._weights = self._mapped("initial", weights)
        self._own_shapes = {
            name: tuple(array.shape if hasattr(array, "shape") else np.shape(array))
            for name, array in weights.items()
        }
        self._starting_moments = self._resumed(moment1, moment2)
        from_map = self._map.common if self._map.orders_all else ()
        origins: tuple[tuple[OrderOrigin, Iterable[str]], ...] = (
            ("names", from_map),
            ("recording", self._map.told_order(weights)),
        )
        for origin, names in origins:
            if not self._order and (told := _told(names)):
                self._order, self._order_origin = told, origin
        self._header.started(self._weights, self._order_origin)
        self._write_start()

    def step(
        self,
        *,
        batch: NamedArrays,
        loss_sum: float,
        tokens: int,
        lr: float,
        gradients: NamedArrays,
        weights: NamedArrays,
        moment1: NamedArrays | None = None,
        moment2: NamedArrays | None = None,
        slots: Mapping[str, NamedArrays] | None = None,
        grad_norm: float | None = None,
        activations: NamedArrays | None = None,
        activation_gradients: NamedArrays | None = None,
    ) -> None:
        """Record one update.

        `batch` is whatever the update is trained on, by common names; both sides' must be equal to the last bit. The
        loss is `loss_sum / tokens`, where `tokens` counts what the program averages over (elements, examples, tokens).
        `gradients` are those of the loss, before clipping; they tell what is trained at this step. `weights`, after the
        update, has every name of `initial`: what has no gradient (frozen weights, running statistics, target networks,
        counters) is compared too. `slots` is the optimizer's state after the update, by the slot's name and the weight's;
        no slot is required, and both sides must call it the same. `moment1` and `moment2` are slots that every trained
        weight has: Adam's, without bias correction. `grad_norm` is the program's norm over all gradients, before clipping;
        by default it is computed, with tied weights that are given twice counted once. `activations` and their gradients
        have common names.
        """
        self._check(batch, tokens)
        if self._step < self._first_step:
            self._order_points(activations or activation_gradients or {})
        mapped = self._mapped("gradients", gradients)
        self._trained |= set(mapped)
        after = self._mapped("weights", weights)
        if missing := [name for name in self._weights if name not in after]:
            raise TraceError(
                f"step {self._step + 1}: weights: no {missing[0]!r}, which was there at the start; give every weight, frozen "
                "ones, statistics and target networks too"
            )
        moved = {name: _difference(new, self._weights[name]) for name, new in after.items()}
        state = self._slots(moment1, moment2, slots or {}, mapped)
        inputs = _copies("batch", batch)
        self._writer.step(
            StepTrace(
                step=self._step + 1,
                batch=inputs,
                loss_sum=float(loss_sum),
                tokens=int(tokens),
                grad_norm=_norm(mapped, self._weights) if grad_norm is None else float(grad_norm),
                lr=float(lr),
                gradients=mapped,
                updates={name: moved[name] for name in mapped},
                changes={name: change for name, change in moved.items() if name not in mapped},
                moment1=state.pop("moment1", {}),
                moment2=state.pop("moment2", {}),
                slots=state,
                activations=_copies("activations", activations or {}),
                activation_gradients=_copies("activation_gradients", activation_gradients or {}),
            )
        )
        self._header.fed(inputs).write(self._directory)
        self._weights = after
        self._step += 1

    def _check(self, batch: NamedArrays, tokens: int) -> None:
        if not self._weights:
            raise TraceError("step: call initial(weights) before the first step")
        if not batch:
            raise TraceError("step: the batch is empty; give what the update is trained on")
        if tokens < 1:
            raise TraceError(f"step: tokens is {tokens}; give the number that the loss is divided by")

    def _order_points(self, activations: NamedArrays) -> None:
        """The order of recording tells that of the activation points, after the weights."""
        points = _told(name for name in activations if name not in self._order)
        if points and self._order:
            self._order += points
            self._write_start()

    def _write_start(self) -> None:
        order = [TraceName(name, None) for name in self._order]
        self._writer.initial(
            self._weights, order, moments=self._starting_moments, header=self._header.current
        )

    def _resumed(
        self, moment1: NamedArrays | None, moment2: NamedArrays | None
    ) -> tuple[Arrays, Arrays] | None:
        """The moments that a run starts from after a resume."""
        if moment1 is None and moment2 is None:
            return None
        if moment1 is None or moment2 is None:
            raise TraceError("initial: one moment without the other; give moment1 and moment2, or neither")
        if self._first_step == 1:
            raise TraceError(
                "initial: moments before step 1, where they are zero; leave them out, or give Recorder the first_step that "
                "the resumed run makes"
            )
        return self._mapped("initial: moment1", moment1), self._mapped("initial: moment2", moment2)

    def _slots(
        self,
        moment1: NamedArrays | None,
        moment2: NamedArrays | None,
        slots: Mapping[str, NamedArrays],
        gradients: Arrays,
    ) -> dict[str, Arrays]:
        """State by slot and common name. What never had a gradient has no state worth a comparison while it is zero."""
        moments = {"moment1": moment1, "moment2": moment2}
        state = {}
        for slot, arrays in moments.items():
            if arrays is None:
                continue
            if slot in slots:
                raise TraceError(f"{slot} is given by itself and in slots; give it once")
            state[slot] = self._mapped(slot, arrays, is_slot=True)
            if missing := [name for name in gradients if name not in state[slot]]:
                raise TraceError(f"step {self._step + 1}: {slot}: no {missing[0]!r}, which has a gradient")
        for slot, arrays in slots.items():
            if "/" in slot:
                raise TraceError(f"slots: {slot!r}: a slot's name has no '/'")
            state[slot] = self._mapped(f"slots: {slot}", arrays, is_slot=slot not in moments)
        return {
            slot: {name: a for name, a in arrays.items() if name in self._trained or np.any(a)}
            for slot, arrays in state.items()
        }

    def _mapped(self, what: str, arrays: NamedArrays, *, is_slot: bool = False) -> Arrays:
        """Copies under the common names and in the common layout; a slot may have another shape than its weight."""
        mapped = self._map.mapped(what, arrays, self._own_shapes if is_slot else None)
        for name, array in mapped.items():
            if is_slot or name not in self._weights or array.shape == self._weights[name].shape:
                continue
            raise TraceError(
                f"step {self._step + 1}: {what}: {name!r} has shape {list(array.shape)}, "
                f"its weight {list(self._weights[name].shape)}"
            )
        return mapped


def _copies(what: str, arrays: NamedArrays) -> Arrays:
    return {name: copied(array, f"{what}: {name!r}") for name, array in arrays.items()}


def _told(names: Iterable[str]) -> list[str]:
    """`names` if their order can be causal; none of them where it is alphabetical, as JAX sorts the keys of a pytree."""
    listed = list(names)
    return [] if listed == sorted(listed) and len(listed) > 1 else listed


def _difference(new: Array, old: Array) -> Array:
    """`new - old`; of integers as int64, where an unsigned counter may go down."""
    counts = new.dtype.kind in "iu"
    return np.asarray(new.astype(np.int64) - old.astype(np.int64) if counts else new - old)


def _norm(gradients: Arrays, weights: Arrays) -> float:
    """The norm over all gradients; of tied weights, given under each of their names, one is counted."""
    counted: set[bytes] = set()
    squares = 0.0
    for name, gradient in gradients.items():
        weight = weights[name]
        identity = sha256(weight.tobytes() + gradient.tobytes()).digest()
        # Equal weights and gradients are one tensor; biases that start at zero may be equal and are not.
        if weight.size > 1 and np.any(weight != weight.flat[0]) and identity in counted:
            continue
        counted.add(identity)
        squares += float(np.sum(np.square(gradient.astype(np.float64))))
    return float(np.sqrt(squares))
