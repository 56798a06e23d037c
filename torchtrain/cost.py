"""What a run costs a process, measured: bytes of training state, and bytes that its collectives move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

from torchtrain.engines.engine import Inputs, Microbatches
from torchtrain.step import State, train_step
from trainspec.data import Batch
from trainspec.plans.cost import Collective


def held(state: State, batch: Batch) -> dict[str, int]:
    """Bytes of weights, gradients, master weights and moments in this process, in a step on `batch`; consumes `state`.

    Measured after the backward pass that leaves the largest gradients. Memory that several tensors share counts once.
    Adam's count of updates is left out. Differs from jaxtrain as `moved` does.
    """
    measured: list[dict[str, int]] = []
    accumulate = state.engine.accumulate

    def weigh() -> None:
        seen: set[int] = set()
        tensors = state.engine.store.tensors()
        measured.append({kind: _bytes(of_kind, seen) for kind, of_kind in tensors.items()})

    def weighed(microbatches: Microbatches) -> None:
        forward = microbatches.forward

        def weighed_forward(index: int) -> Inputs:
            weigh()
            return forward(index)

        with patch.object(microbatches, "forward", weighed_forward):
            accumulate(microbatches)
        weigh()

    with patch.object(state.engine, "accumulate", weighed):
        train_step(state, batch, lr=0.0)
    return max(measured, key=lambda sizes: sizes["gradients"])


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def moved(state: State, batch: Batch) -> list[Collective]:
    """The collectives of one step on `batch`; consumes `state`.

    Differs from jaxtrain, which reads a compiled program: here a step with a rate of zero is made.
    """
    seen: Counter[tuple[str, str, int, int]] = Counter()
    with _counted(seen):
        train_step(state, batch, lr=0.0)
    return [
        Collective("step", kind, dtype, size, devices, times)
        for (kind, dtype, size, devices), times in seen.items()
    ]


# The methods of a process group that functions of torch.distributed call: the kind of collective, and which argument is
# the payload. A function may be bound under other names; these methods are looked up at each call.
_METHODS: dict[str, tuple[str, int]] = {
    "allreduce": ("all-reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "all_to_all_single": ("all-to-all", 1),
    "send": ("collective-permute", 0),
}
# The compiler's names, which jaxtrain reads.
_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.int64: "s64",
    torch.int32: "s32",
    torch.uint8: "u8",
}


@contextmanager
def _counted(seen: Counter[tuple[str, str, int, int]]) -> Iterator[None]:
    """Count the collectives of the block in `seen`, by kind, type, bytes and number of processes."""
    with ExitStack() as stack:
        for name, (kind, argument) in _METHODS.items():
            method = getattr(ProcessGroup, name)

            def call(
                self: ProcessGroup,
                *args: Any,
                method: Callable[..., Any] = method,
                kind: str = kind,
                argument: int = argument,
                **kwargs: Any,
            ) -> Any:
                tensors = list(_tensors(args[argument]))
                size = sum(t.numel() * t.element_size() for t in tensors)
                seen[kind, _DTYPES[tensors[0].dtype], size, self.size()] += 1
                return method(self, *args, **kwargs)

            stack.enter_context(patch.object(ProcessGroup, name, call))
        yield


def _tensors(payload: Any) -> Iterator[Tensor]:
    """The tensors of a nested list."""
    if isinstance(payload, Tensor):
        yield payload
    else:
        for item in payload:
            yield from _tensors(item)
