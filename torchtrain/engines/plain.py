"""Plain torch: DeepSpeed's update in the type of the weights, and the store of a state that replicas hold whole."""

# B examples, T positions of a layer, V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.engines.engine import Inputs, Microbatches, Saved, Store, Stored, Stretch, by_kind
from torchtrain.mesh import Mesh
from torchtrain.optim import MOMENTS, clip, global_norm, start_moments
from torchtrain.tensor_parallel import is_split
from torchtrain.weights import Elements, canonical_name
from trainspec.runs.run import Run


class WholeStore:
    """Each replica holds all of its layers' state; of split weights each tensor peer holds a shard."""

    def __init__(self, run: Run, model: PreTrainedModel, optimizer: torch.optim.AdamW, mesh: Mesh) -> None:
        self._model, self._optimizer = model, optimizer
        self._tensor, self._replicas = mesh.tensor, mesh.replicas
        self._split = {p.name for p in run.trained if mesh.tensor.size > 1 and any(map(is_split, p.axes))}

    def norm(self) -> float:
        """Each logical element counts once: shards are summed over the peers, whole tensors are not."""
        split: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                (split if canonical_name(name) in self._split else whole)[name] = parameter.grad
        if not split:
            return global_norm(whole).item()
        squares = self._tensor.sum_(global_norm(split).double().square())
        return (squares + global_norm(whole).double().square()).sqrt().item()

    def read(self, kind: Stored, parameter: nn.Parameter) -> Tensor:
        """The tensor itself."""
        match kind:
            case "weight":
                return parameter
            case "gradient":
                assert parameter.grad is not None
                return parameter.grad
            case "moment1" | "moment2":
                return self._optimizer.state[parameter][MOMENTS[kind]]

    def own(self, kind: Saved, parameter: nn.Parameter) -> Stretch:
        """An equal share of what all replicas hold, in whole rows where there are enough of them."""
        whole = self.read(kind, parameter).detach().reshape(-1)
        rows, replicas = len(parameter), self._replicas
        units = rows if rows >= replicas.size else len(whole)
        first, end = (
            len(whole) // units * (units * i // replicas.size) for i in (replicas.index, replicas.index + 1)
        )
        return Stretch(first, whole[first:end])

    @torch.no_grad()
    def write(self, kind: Saved, parameter: nn.Parameter, elements: Elements) -> None:
        """All of the tensor."""
        whole = self.read(kind, parameter)
        whole.copy_(elements(0, whole.numel()).view_as(whole))

    def tensors(self) -> dict[str, list[Tensor]]:
        """There are no master weights."""
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return by_kind(parameters, gradients, (), self._optimizer)


class PlainEngine:
    """One microbatch after the other, and torch's AdamW."""

    def __init__(self, run: Run, model: PreTrainedModel, optimizer: torch.optim.AdamW, *, mesh: Mesh) -> None:
        self.loss_scale = 1.0
        self.store: Store = WholeStore(run, model, optimizer, mesh)
        self._model, self._optimizer, self._mesh = model, optimizer, mesh
        self._clip_norm = run.recipe.optimizer.clip_norm
        start_moments(optimizer, (p for p in model.parameters() if p.requires_grad))

    def accumulate(self, microbatches: Microbatches) -> None:
        """Sum gradients over the microbatches, and after the last one over the replicas."""
        for index in range(len(microbatches)):
            output = self._model(**microbatches.forward(index)).logits
            loss = microbatches.loss(index, output)
            microbatches.backward(index)
            loss.backward()
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                self._mesh.replicas.sum_(parameter.grad)

    def infer(self, count: int, inputs: Callable[[int], Inputs]) -> list[Tensor]:
        """The head's output of each microbatch."""
        return [self._model(**inputs(index)).logits for index in range(count)]

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
