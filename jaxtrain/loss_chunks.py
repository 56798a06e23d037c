"""The loss of rows in chunks of their positions, `plan.loss_chunk`: logits exist for one chunk at a time.

A chunk's gradients are made beside its loss, in the forward pass, and summed over the chunks: the gradient of a sum, which the
backward pass only multiplies by a number. So nothing of a chunk is kept or made twice, but in the pipelines
that autodiff goes back through, which make all of a microbatch's loss again (docs/decisions/0026).

B examples, T positions, N positions of a chunk, C chunks, E embed, R replicas.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.activations import is_recorded, tap
from jaxtrain.decoder import Decoder
from jaxtrain.dropout import DropoutPoint, Stretch
from jaxtrain.layers import project
from jaxtrain.loss import target_loss, targets_of, token_loss
from jaxtrain.precision import accumulation_dtype
from jaxtrain.rounding import is_simulated
from jaxtrain.sharding import batch_axes_taken
from jaxtrain.weight_ops import BoundWeight, hold, reduced
from trainspec.data import IGNORED
from trainspec.plans.plan import BATCH_AXES, Plan

# What a head computes with, by its place in the module: weights, and a method's constants.
Leaves = tuple[BoundWeight | Array, ...]
Cotangents = tuple[BoundWeight | None, ...]
# Gradients of those leaves that are trained weights, by their index.
Gradients = dict[int, Array]


def head_loss(
    model: Decoder, x_BTE: Array, labels_BT: Array, point: DropoutPoint | None, plan: Plan
) -> tuple[Array, Array]:
    """(loss sum, number of target tokens) from the last layer's output, what `token_loss` gives of the model's logits.

    It is `token_loss` itself where the plan makes all logits of a row at once, where logits are recorded, and where roundings
    are simulated.
    """
    B, T, _ = x_BTE.shape
    chunk = plan.positions_at_once(math.ceil(B / plan.replicas), T, model.spec.vocab)
    if chunk == T or is_recorded("logits") or is_simulated():
        return token_loss(model.head(x_BTE, point), labels_BT)
    definition, state = nnx.split(model.head_layer())
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, BoundWeight))
    head = _Head(definition, tree, chunk, tuple(axis for axis in BATCH_AXES if getattr(plan, axis) > 1))
    x_BTE = tap("norm", model.normed(x_BTE))
    return _loss(head, plan.replicas, tuple(leaves), x_BTE, targets_of(labels_BT), point)


class _Head(NamedTuple):
    """What is no array: the module that makes logits, the length of a chunk, and the mesh axes that split the batch."""

    definition: Any
    tree: Any
    chunk: int
    batch_axes: tuple[str, ...]

    def chunks(self, x_BTE: Array, targets_BT: Array) -> tuple[Array, Array, Array]:
        """Each chunk's first position [C], x [C, B, N, E] and targets [C, B, N]; the last chunk's padding is no target."""
        B, T, E = x_BTE.shape
        count = math.ceil(T / self.chunk)
        padding = ((0, 0), (0, count * self.chunk - T))
        x_BTE = jnp.pad(x_BTE, (*padding, (0, 0)))
        targets_BT = jnp.pad(targets_BT, padding, constant_values=IGNORED)
        return (
            jnp.arange(count) * self.chunk,
            jnp.moveaxis(x_BTE.reshape(B, count, self.chunk, E), 1, 0),
            jnp.moveaxis(targets_BT.reshape(B, count, self.chunk), 1, 0),
        )

    def loss(
        self, leaves: Leaves, x_BNE: Array, targets_BN: Array, point: DropoutPoint | None
    ) -> tuple[Array, Array]:
        """Loss sum and target tokens of a chunk."""
        layer: Any = nnx.merge(self.definition, jax.tree.unflatten(self.tree, leaves))
        return target_loss(project(layer, x_BNE, point), targets_BN)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    head: _Head,
    replicas: int,
    leaves: Leaves,
    x_BTE: Array,
    targets_BT: Array,
    point: DropoutPoint | None,
) -> tuple[Array, Array]:
    """Loss sum and target tokens, of which no gradient is wanted."""
    held = _held(leaves, x_BTE)

    def add(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        first, x_BNE, targets_BN = chunk
        loss_sum, tokens = head.loss(held, x_BNE, targets_BN, _moved(point, first, x_BTE.shape[1]))
        return (sums[0] + loss_sum, sums[1] + tokens), None

    return lax.scan(add, _no_loss(x_BTE), head.chunks(x_BTE, targets_BT))[0]


def _loss_and_gradients(
    head: _Head, leaves: Leaves, x_BTE: Array, targets_BT: Array, point: DropoutPoint | None
) -> tuple[tuple[Array, Array], Gradients, Array]:
    """Loss sum and target tokens, and the loss's gradients: by the trained leaves, and by x."""
    B, T, E = x_BTE.shape
    trained = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, BoundWeight) and leaf.grad_placeholder is not None
    }
    zeros = {i: jnp.zeros(w.value.shape, w.sharding.gradient_dtype) for i, w in trained.items()}

    def loss(placeholders: Gradients, x_BNE: Array, targets_BN: Array, first: Array) -> tuple[Array, Array]:
        bound = list(leaves)
        for i, placeholder in placeholders.items():
            bound[i] = replace(trained[i], grad_placeholder=placeholder)
        return head.loss(tuple(bound), x_BNE, targets_BN, _moved(point, first, T))

    def add(
        sums: tuple[tuple[Array, Array], Gradients], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[tuple[Array, Array], Gradients], Array]:
        first, x_BNE, targets_BN = chunk
        loss_and_gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        of_chunk, (gradients, dx_BNE) = loss_and_gradients(zeros, x_BNE, targets_BN, first)
        return jax.tree.map(jnp.add, sums, (of_chunk, gradients)), dx_BNE

    start = (_no_loss(x_BTE), zeros)
    (totals, gradients), dx_CBNE = lax.scan(add, start, head.chunks(x_BTE, targets_BT))
    return totals, gradients, jnp.moveaxis(dx_CBNE, 0, 1).reshape(B, -1, E)[:, :T]


def _forward(
    head: _Head,
    replicas: int,
    leaves: Leaves,
    x_BTE: Array,
    targets_BT: Array,
    point: DropoutPoint | None,
) -> tuple[tuple[Array, Array], tuple[Cotangents, Array]]:
    """The loss, and for the backward pass its gradients, those by weights in the place of their weights.

    Each replica sums the gradients of its own examples over the chunks: they are reduced over the devices once, as without
    chunks. So the replicas are a dimension of their own here.
    """
    B, T, E = x_BTE.shape
    held = _held(leaves, x_BTE)
    if replicas == 1 or not any(
        isinstance(leaf, BoundWeight) and leaf.sharding.gradient is not None for leaf in held
    ):
        totals, gradients, dx_BTE = _loss_and_gradients(head, held, x_BTE, targets_BT, point)
        gradients = {i: gradient[None] for i, gradient in gradients.items()}
    else:

        def of_replica(
            x_BTE: Array, targets_BT: Array, rows_B: Array | None
        ) -> tuple[tuple[Array, Array], Gradients, Array]:
            own = None if point is None or rows_B is None else point._replace(rows=rows_B)
            return _loss_and_gradients(head, held, x_BTE, targets_BT, own)

        split = jax.tree.map(
            lambda array: array.reshape(replicas, B // replicas, *array.shape[1:]),
            (x_BTE, targets_BT, None if point is None else point.rows),
        )
        with batch_axes_taken():
            totals_R, gradients, dx_RBTE = jax.vmap(of_replica, spmd_axis_name=head.batch_axes)(*split)
        totals, dx_BTE = jax.tree.map(lambda each: each.sum(0), totals_R), dx_RBTE.reshape(B, T, E)
    of_leaves = tuple(
        # A cotangent of None is zero: only the placeholder's is wanted.
        replace(
            leaf,
            value=cast(Array, None),
            grad_placeholder=reduced(gradients[i], leaf) if i in gradients else None,
        )
        if isinstance(leaf, BoundWeight)
        else None
        for i, leaf in enumerate(leaves)
    )
    return totals, (of_leaves, dx_BTE)


def _backward(
    head: _Head, replicas: int, gradients: tuple[Cotangents, Array], cotangents: tuple[Array, Array]
) -> tuple[Cotangents, Array, None, None]:
    """The gradients, which are those of the loss sum, times its cotangent."""

    def times(gradient: Array) -> Array:
        return (gradient.astype(cotangents[0].dtype) * cotangents[0]).astype(gradient.dtype)

    of_leaves, dx_BTE = jax.tree.map(times, gradients)
    return of_leaves, dx_BTE, None, None


_loss.defvjp(_forward, _backward)


def _held(leaves: Leaves, x_BTE: Array) -> Leaves:
    """Weights gathered once for all chunks, not before x is computed; their gradients are summed in the accumulation type."""
    return tuple(hold(leaf, x_BTE) if isinstance(leaf, BoundWeight) else leaf for leaf in leaves)


def _no_loss(x_BTE: Array) -> tuple[Array, Array]:
    """Zeros to add loss sums and target tokens to."""
    return jnp.zeros((), accumulation_dtype(x_BTE.dtype)), jnp.zeros((), int)


def _moved(point: DropoutPoint | None, first: Array, positions: int) -> DropoutPoint | None:
    """The point of a chunk: it draws the dropout masks of its own positions."""
    return None if point is None else point._replace(stretch=Stretch(first, positions))
