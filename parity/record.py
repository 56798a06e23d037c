"""Record a trace of any training program, in any framework, for `parity diff`: arrays in, files out.

Two programs that do the same training may name and lay out their weights differently. Each maps its own names to common
ones, so that the traces can be compared tensor by tensor, step by step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainspec.errors import TraceError, nearest
from trainspec.trace import StepTrace, TraceName, TraceWriter

Array = NDArray[Any]
Arrays = dict[str, Array]
NamedArrays = Mapping[str, ArrayLike]


class Recorder:
    """Writes the trace of one training run with an optimizer of the Adam family.

        recorder = Recorder(Path("runs/mine"), names={"fc.kernel": "fc.weight"}, transpose={"fc.kernel"})
        recorder.initial(weights)
        for ...:
            recorder.step(batch=..., loss_sum=..., tokens=..., lr=..., gradients=..., weights=..., moment1=..., moment2=...)

    `names` maps the program's own names to the common ones, one to one. `transpose` lists the matrices (by their own
    names) whose two dimensions are swapped on the other side. `order` lists common names, of weights and activations, as
    data flows through them, for the comparison walks the gradients back through it; by default that is the order of
    `names`, or of the weights in `initial`, unless it is merely alphabetical. Arrays are anything that `numpy.asarray` takes:
    `tensor.detach().cpu().numpy()` for torch, a `jax.Array` itself. Each is copied at once, so the program may update its
    weights in place. Types are kept: a float64 run gives a float64 trace, which is held to 1e-9.

    Raises TraceError if a name is not in the map, an array is missing, or a shape is not the weight's.
    """

    def __init__(
        self,
        directory: Path,
        *,
        names: Mapping[str, str],
        transpose: Collection[str] = (),
        order: Sequence[str] = (),
    ) -> None:
        for name in transpose:
            if name not in names:
                raise TraceError(f"transpose: {name!r} is not in the name map{nearest(name, names)}")
        if len(set(names.values())) < len(names):
            twice = sorted(name for name in names.values() if list(names.values()).count(name) > 1)
            raise TraceError(f"the name map gives {twice[0]!r} to more than one weight; each needs its own")
        for name in order:
            if list(order).count(name) > 1:
                raise TraceError(f"order: {name!r} is listed twice")
        self._order = list(order)
        self._names, self._transpose = dict(names), frozenset(transpose)
        self._writer = TraceWriter(directory)
        self._weights: Arrays = {}
        self._step = 0

    def initial(self, weights: NamedArrays) -> None:
        """Record the weights before the first update. Call it once, before the first `step`.

        Frozen weights, running statistics, target networks and counters belong to them.
        """
        missing = sorted(set(self._names) - set(weights))
        if missing:
            raise TraceError(f"initial: no {missing[0]!r}, which is in the name map; give every weight")
        self._weights = self._mapped("initial", weights)
        self._order = self._order or _told(self._names.values()) or _told(self._weights)
        self._writer.initial(self._weights, _without_roles(self._order))

    def step(
        self,
        *,
        batch: NamedArrays,
        loss_sum: float,
        tokens: int,
        lr: float,
        gradients: NamedArrays,
        weights: NamedArrays,
        moment1: NamedArrays,
        moment2: NamedArrays,
        grad_norm: float | None = None,
        activations: NamedArrays | None = None,
        activation_gradients: NamedArrays | None = None,
    ) -> None:
        """Record one update.

        `batch` is whatever the update is trained on, by common names; both sides' must be equal to the last bit. The
        loss is `loss_sum / tokens`, where `tokens` counts what the program averages over (elements, examples, tokens).
        `gradients` are those of the loss, before clipping; they tell what is trained at this step, and `moment1` and
        `moment2` (Adam's, without bias correction) must have their names. `weights` has every name of `initial`: what has
        no gradient (frozen weights, running statistics, target networks, counters) is compared too. Those three are the
        values after the update.
        `grad_norm` is the program's norm over all gradients, before clipping; by default it is computed, with tied weights
        that are given twice counted once. `activations`
        and their gradients have common names.
        """
        if not self._weights:
            raise TraceError("step: call initial(weights) before the first step")
        if not batch:
            raise TraceError("step: the batch is empty; give what the update is trained on")
        if tokens < 1:
            raise TraceError(f"step: tokens is {tokens}; give the number that the loss is divided by")
        if self._step == 0:
            self._order_points(activations or activation_gradients or {})
        mapped_gradients = self._mapped("gradients", gradients)
        after = self._mapped("weights", weights)
        if missing := [name for name in self._weights if name not in after]:
            raise TraceError(
                f"step {self._step + 1}: weights: no {missing[0]!r}, which was there at the start; give every weight, frozen "
                "ones, statistics and target networks too"
            )
        moved = {name: _difference(new, self._weights[name]) for name, new in after.items()}
        self._writer.step(
            StepTrace(
                step=self._step + 1,
                batch={name: _plain(array) for name, array in batch.items()},
                loss_sum=float(loss_sum),
                tokens=int(tokens),
                grad_norm=_norm(mapped_gradients, self._weights) if grad_norm is None else float(grad_norm),
                lr=float(lr),
                gradients=mapped_gradients,
                updates={name: moved[name] for name in mapped_gradients},
                changes={name: change for name, change in moved.items() if name not in mapped_gradients},
                moment1=self._trained("moment1", moment1, mapped_gradients),
                moment2=self._trained("moment2", moment2, mapped_gradients),
                activations={name: _copy(array) for name, array in (activations or {}).items()},
                activation_gradients={
                    name: _copy(array) for name, array in (activation_gradients or {}).items()
                },
            )
        )
        self._weights = after
        self._step += 1

    def _order_points(self, activations: NamedArrays) -> None:
        """The order of recording tells that of the activation points, after the weights."""
        points = _told(name for name in activations if name not in self._order)
        if points and self._order:
            self._order += points
            self._writer.initial(self._weights, _without_roles(self._order))

    def _trained(self, what: str, arrays: NamedArrays, gradients: Arrays) -> Arrays:
        """The arrays of the trained weights; those of frozen ones are ignored."""
        mapped = self._mapped(what, arrays)
        missing = [name for name in gradients if name not in mapped]
        if missing:
            raise TraceError(f"step {self._step + 1}: {what}: no {missing[0]!r}, which has a gradient")
        return {name: mapped[name] for name in gradients}

    def _mapped(self, what: str, arrays: NamedArrays) -> Arrays:
        """Copies under the common names and in the common layout."""
        mapped = {}
        for name, array in arrays.items():
            if name not in self._names:
                raise TraceError(f"{what}: {name!r} is not in the name map{nearest(name, self._names)}")
            copy = _copy(array)
            mapped[self._names[name]] = _plain(copy.T) if name in self._transpose else _plain(copy)
        for name, array in mapped.items():
            if name in self._weights and array.shape != self._weights[name].shape:
                raise TraceError(
                    f"step {self._step}: {what}: {name!r} has shape {list(array.shape)}, "
                    f"its weight {list(self._weights[name].shape)}"
                )
        return mapped


def _told(names: Iterable[str]) -> list[str]:
    """`names` if their order can be causal; none of them where it is alphabetical, as JAX sorts the keys of a pytree."""
    listed = list(names)
    return [] if listed == sorted(listed) and len(listed) > 1 else listed


def _without_roles(names: Iterable[str]) -> list[TraceName]:
    return [TraceName(name, None) for name in names]


def _copy(array: ArrayLike) -> Array:
    return np.array(array, order="C", copy=True)


def _plain(array: ArrayLike) -> Array:
    """A boolean mask becomes uint8, as integer types have no precision to check."""
    copy = _copy(array)
    return copy.astype(np.uint8) if copy.dtype == np.bool_ else copy


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
