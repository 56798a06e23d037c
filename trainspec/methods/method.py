"""What every training method answers: the base class of the specs, and what it is given to read an adapter from.

A method is a frozen pydantic spec (the `method:` section of a recipe) with the answers to what the rest of trainspec
asks. The base class answers for a method that adds nothing to the model and changes none of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

from numpy.typing import DTypeLike
from pydantic import BaseModel, ConfigDict, Field

from trainspec.errors import RecipeError
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.weight import Array, Weight

Arrays = Mapping[str, Array]
PEFT_PREFIX = "base_model.model."
# The files of an adapter's directory (docs/adapter-files.md).
ADAPTER_FILE, ENCODER_FILE = "adapter_model.safetensors", "prompt_encoder.safetensors"

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Tensors(Protocol):
    """The tensors of a safetensors file by name, read one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Array:
        """One tensor, in its stored type."""
        ...

    def weight(self, name: str, dtype: DTypeLike | None) -> Weight:
        """One tensor as `dtype`, read as far as it is asked for."""
        ...


class AdapterFiles(Protocol):
    """The files of an adapter's directory, as a method reads them (`trainspec.files.adapters` opens them)."""

    @property
    def directory(self) -> Path:
        """Where they are."""
        ...

    @property
    def tensors(self) -> Tensors:
        """Those of `ADAPTER_FILE`."""
        ...

    def entries(
        self, table: Sequence[Param], *, dtype: DTypeLike, file: str | None = None
    ) -> Iterator[tuple[Param, Weight]]:
        """The weight of each entry of `table` by its name, of `ADAPTER_FILE` or of another file.

        Raises WeightsError before the first read where one is missing or misshapen or a tensor is unexpected.
        """
        ...


class MethodSpec(BaseModel, frozen=True):
    """The base class of the methods; `kind` is the name that a recipe has for one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    kind: str

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """Small specs by name, each name starting with the kind: one for every way in which the method may compute.

        Tests, planted faults and the parity matrix train them: a number of virtual tokens or a width that no number
        of devices divides, and dropout where the method has it.
        """
        raise NotImplementedError

    @property
    def trains_model(self) -> bool:
        """Whether the model's own weights are what is trained."""
        return False

    @property
    def start(self) -> Path | None:
        """The adapter's directory that training starts from, if there is one."""
        return None

    @property
    def start_text(self) -> str | None:
        """The text that virtual tokens start as, if there is one."""
        return None

    @property
    def num_virtual_tokens(self) -> int:
        """By how much the positions of the real tokens are moved."""
        return 0

    @property
    def leading_rows(self) -> int:
        """How many embeddings are put before those of an example's tokens."""
        return 0

    @property
    def has_encoder(self) -> bool:
        """Whether virtual tokens are made of the trained weights, and the adapter's file has only what was made."""
        return False

    @property
    def low_rank_scale(self) -> float:
        """What a product B A is multiplied by; 1 where there is none."""
        return 1.0

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """An entry for each weight that the method adds to `model`, in forward order."""
        raise NotImplementedError

    def counts(self) -> dict[str, float]:
        """What the spec counts, by name: a factor between two tensors that are compared may be one of these."""
        return {}

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """`adapter_config.json` but for the base model: PEFT's keys and words. Raises RecipeError without an adapter."""
        raise RecipeError(f"method.kind={self.kind} has no adapter; its weights are the model")

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """Raises WeightsError where an adapter's `config` is another method's, has other settings or another model's sizes."""
        raise RecipeError(f"method.kind={self.kind} starts from the model's weights, not from an adapter")

    def adapter_size(self, model: ModelSpec) -> int:
        """How many numbers `ADAPTER_FILE` has."""
        return sum(param.size for param in self.table(model))

    def files(self, weights: Arrays) -> dict[str, dict[str, Array]]:
        """The tensors of each file of an adapter, from the method's weights by canonical name."""
        return {ADAPTER_FILE: dict(weights)}

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """The reverse of `files`, entry by entry of `table`. Raises WeightsError before the first read."""
        return files.entries(table, dtype=dtype)

    @property
    def not_merged(self) -> str | None:
        """Why the method is no change of the model's own weights, to follow its kind; None where it is one."""
        return "has nothing to merge"

    def merged(self, param: Param, weight: Array, trained: Arrays) -> Array:
        """The model's `weight` changed as the `trained` weights change it, in float64; itself where they do not."""
        return weight


class AddedWeights(MethodSpec, frozen=True):
    """The base class of methods that add weights to a frozen model; `adapter` is a directory to start from."""

    adapter: str | None = None

    @property
    def start(self) -> Path | None:
        """See the base class."""
        return None if self.adapter is None else Path(self.adapter)
