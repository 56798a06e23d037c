"""The base class of the training methods, and the protocols by which one reads an adapter.

A method is a frozen pydantic spec: the `method:` section of a recipe, with everything that the rest of trainspec has to
know about it. The defaults here are those of a method that adds nothing to the model and changes none of its weights.
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
from trainspec.points import Point
from trainspec.weight import Array, Weight, WeightLike

Arrays = Mapping[str, Array]
# The same, which may be read on demand.
Weights = Mapping[str, WeightLike]
PEFT_PREFIX = "base_model.model."
# The files of an adapter's directory (docs/adapter-files.md).
ADAPTER_CONFIG = "adapter_config.json"
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
        """One tensor as `dtype` (None: as stored), read on demand."""
        ...


class AdapterFiles(Protocol):
    """The files of an adapter directory, as a method reads them; `trainspec.files.adapters` opens them."""

    @property
    def directory(self) -> Path:
        """The adapter directory."""
        ...

    @property
    def tensors(self) -> Tensors:
        """The tensors of the method's `weights_file`."""
        ...

    def entries(
        self, table: Sequence[Param], *, dtype: DTypeLike, file: str | None = None
    ) -> Iterator[tuple[Param, Weight]]:
        """The weight of each entry of `table` by its name, from the method's `weights_file` or `file`.

        Raises WeightsError before the first read where one is missing or misshapen or a tensor is unexpected.
        """
        ...


class MethodSpec(BaseModel, frozen=True):
    """The base class of the methods. The docstring of a field is its description in the JSON schema."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    kind: str
    """The name of the method."""

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """Small specs by name, one for each way in which the method may compute; a name starts with the kind.

        Tests, planted faults and the parity matrix train them, so that virtual tokens and widths should not be divisible
        by a number of devices, and dropout should be on where the method has it.
        """
        raise NotImplementedError

    @property
    def trains_model(self) -> bool:
        """Whether the model's own weights are trained."""
        return False

    @property
    def start(self) -> Path | None:
        """The adapter directory to start from, if any."""
        return None

    @property
    def start_text(self) -> str | None:
        """The text that virtual tokens start as, if any."""
        return None

    @property
    def num_virtual_tokens(self) -> int:
        """Number of virtual tokens, which every token sees."""
        return 0

    @property
    def position_shift(self) -> int:
        """The position of a record's first token: virtual tokens come before it."""
        return self.num_virtual_tokens

    @property
    def leading_positions(self) -> int:
        """Number of embeddings put in front of an example's."""
        return 0

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder makes the virtual tokens; the adapter file then holds only what it makes."""
        return False

    @property
    def low_rank_scale(self) -> float:
        """The factor of a low-rank product B A; 1 where there is none."""
        return 1.0

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """One entry per weight that the method adds to `model`, in forward order."""
        raise NotImplementedError

    def points(self, model: ModelSpec) -> tuple[Point, ...]:
        """The activation points that the method adds to `model`."""
        return ()

    def counts(self) -> dict[str, float]:
        """Numbers of the spec by name, any of which may turn up as a wrong factor between two runs."""
        return {}

    @property
    def settings_file(self) -> str:
        """The file of an adapter's directory that has its settings."""
        return ADAPTER_CONFIG

    @property
    def weights_file(self) -> str:
        """The file of an adapter's directory that has its weights."""
        return ADAPTER_FILE

    def missing_settings(self, directory: Path) -> str:
        """The way out where `directory` has no `settings_file`."""
        return "give an adapter directory"

    def adapter_config(self, model: ModelSpec) -> dict[str, Any]:
        """The settings that are written: PEFT's, where it has the method. Raises RecipeError for a method without an adapter."""
        return self.peft_config(model)

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """The `adapter_config.json` in PEFT's words, without the base model. Raises RecipeError for a method without one."""
        raise RecipeError(f"method.kind={self.kind} has no adapter; its weights are the model")

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """Raises WeightsError where an adapter's `config` has another method, other settings or another model's sizes."""
        raise RecipeError(f"method.kind={self.kind} starts from the model's weights, not from an adapter")

    def adapter_size(self, model: ModelSpec) -> int:
        """Number of elements in `ADAPTER_FILE`."""
        return sum(param.size for param in self.table(model))

    def files(self, weights: Weights) -> dict[str, dict[str, WeightLike]]:
        """The tensors of each adapter file, from the method's weights by canonical name."""
        return {ADAPTER_FILE: dict(weights)}

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """The inverse of `files`: a weight per entry of `table`. Raises WeightsError before the first read."""
        return files.entries(table, dtype=dtype)

    @property
    def not_merged(self) -> str | None:
        """Why it cannot be merged into the model, as words that follow the kind; None where it can."""
        return "has nothing to merge"

    def merged(self, param: Param, weight: Array, trained: Weights, rows: slice = slice(None)) -> Array:
        """The model's `weight`, of which these are the `rows`, with the `trained` weights merged in, in float64.

        Itself where none applies to it.
        """
        return weight


class AddedWeights(MethodSpec, frozen=True):
    """The base class of methods that add weights to a frozen model."""

    adapter: str | None = None
    """An adapter directory to start from (docs/adapter-files.md)."""

    @property
    def start(self) -> Path | None:
        """See the base class."""
        return None if self.adapter is None else Path(self.adapter)
