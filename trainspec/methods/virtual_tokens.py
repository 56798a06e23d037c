"""What prompt tuning, P-tuning and prefix tuning share: entries, PEFT's files and initial values.

PEFT's file holds the output of an encoder, not the encoder. The leader computes it from the trained weights in float64
numpy, whatever the backend; the encoder's own weights go into a file beside it.
"""

# V virtual tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, assert_never

import numpy as np
from numpy.typing import DTypeLike
from pydantic import model_validator

from trainspec.errors import WeightsError
from trainspec.methods.adapter_config import check_setting
from trainspec.methods.method import (
    ADAPTER_FILE,
    ENCODER_FILE,
    AdapterFiles,
    AddedWeights,
    Arrays,
    Count,
    Weights,
)
from trainspec.model import ModelSpec
from trainspec.params import FromText, Init, Normal, Param, Zeros
from trainspec.points import Point
from trainspec.weight import Array, Weight, WeightLike

# The module that makes virtual tokens, in canonical names.
ENCODER = "prompt_encoder"
# The embeddings that are put before those of the tokens.
PROMPT = Point("prompt", ("virtual", "embed"))
# PEFT's name for the virtual tokens.
PROMPT_EMBEDDINGS = "prompt_embeddings"


class VirtualTokens(AddedWeights, frozen=True):
    """The base class of methods that train `virtual_tokens`, or an encoder that makes them."""

    virtual_tokens: Count = 20
    """Number of virtual tokens."""

    @property
    def num_virtual_tokens(self) -> int:
        """See the base class."""
        return self.virtual_tokens

    def counts(self) -> dict[str, float]:
        """The number of virtual tokens."""
        return {"virtual tokens": float(self.virtual_tokens)}

    def points(self, model: ModelSpec) -> tuple[Point, ...]:
        """The virtual tokens, of every example, where they are embeddings."""
        return (PROMPT,)

    def encode(self, weights: Weights) -> Array:
        """The virtual tokens [V, width] that the method's weights, by canonical name, make: in float64, without dropout.

        The width is the model's; for a prefix it is that of all keys and values (2 layer, + 1 for values; kv head; dim).
        """
        return self.encoded({name: weight[...].astype(np.float64) for name, weight in weights.items()})

    def encoded(self, weights: Arrays) -> Array:
        """`encode` of float64 weights; without an encoder the trained embedding is the result."""
        return weights[f"{ENCODER}.embedding.weight"]

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """What PEFT's methods with virtual tokens share."""
        return {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": model.layers,
            "token_dim": model.embed,
            "num_attention_heads": model.heads,
            "inference_mode": True,
        }

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """Raises WeightsError where an adapter has another number of virtual tokens."""
        check_setting(
            directory, config, self, "num_virtual_tokens", self.virtual_tokens, field="virtual_tokens"
        )

    def files(self, weights: Weights) -> dict[str, dict[str, WeightLike]]:
        """The virtual tokens, as PEFT keeps them, and the encoder, where there is one."""
        stored = weights[f"{ENCODER}.embedding.weight"].dtype
        files: dict[str, dict[str, WeightLike]] = {
            ADAPTER_FILE: {PROMPT_EMBEDDINGS: self.encode(weights).astype(stored)}
        }
        return files | {ENCODER_FILE: dict(weights)} if self.has_encoder else files

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """See the base class. An encoder must make the virtual tokens that the adapter holds."""
        given, where = files.tensors, files.directory / ADAPTER_FILE
        unexpected = sorted(set(given.shapes) - {PROMPT_EMBEDDINGS})
        if unexpected:
            raise WeightsError(f"{where}: {unexpected[0]} is unexpected; it should hold {PROMPT_EMBEDDINGS} alone")  # fmt: skip
        if self.has_encoder:
            self._check_encoder(files, table)
            return files.entries(table, dtype=dtype, file=ENCODER_FILE)
        (param,) = table
        found = given.shapes.get(PROMPT_EMBEDDINGS)
        if found != param.shape:
            raise WeightsError(
                f"{where}: {PROMPT_EMBEDDINGS} is {'missing' if found is None else list(found)}, the "
                f"configuration requires {list(param.shape)}"
            )
        return iter([(param, given.weight(PROMPT_EMBEDDINGS, dtype))])

    def _check_encoder(self, files: AdapterFiles, table: Sequence[Param]) -> None:
        path = files.directory / ENCODER_FILE
        if not path.is_file():
            raise WeightsError(
                f"{path}: missing; PEFT keeps only the encoder's output: set {self.without_encoder} to start from that"
            )
        entries = list(files.entries(table, dtype=np.float64, file=ENCODER_FILE))
        made = self.encode({param.name: weight[...] for param, weight in entries})
        given = files.tensors
        stored = given.read(PROMPT_EMBEDDINGS) if PROMPT_EMBEDDINGS in given.shapes else np.empty(0)
        # On another machine float64 sums may have run in another order.
        tolerance = 4 * np.finfo(stored.dtype).eps * np.abs(made).max()
        if made.shape != stored.shape or np.abs(made - stored).max() > tolerance:
            raise WeightsError(
                f"{path}: does not make the {PROMPT_EMBEDDINGS} of {ADAPTER_FILE}; the two are from different runs; "
                "export them again together"
            )

    @property
    def without_encoder(self) -> str:
        """The setting with which a run can start from virtual tokens whose encoder is lost."""
        raise NotImplementedError


class VirtualTokensFromText(VirtualTokens, frozen=True):
    """The base class of methods whose virtual tokens may start as a text."""

    init: Literal["random", "zero", "text"] = "random"
    """How virtual tokens start: from N(0, 1), at zero, or as what `text` makes in the model."""
    text: str | None = None
    """The text to start as, repeated or cut to the number of virtual tokens."""

    @model_validator(mode="after")
    def _startable(self) -> Self:
        if (self.init == "text") != (self.text is not None):
            missing = (
                "method.init=text: method.text is missing" if self.init == "text" else "method.text: not used"
            )
            raise ValueError(f"{missing}; give method.init=text and method.text together")
        if self.adapter is not None and self.init != "random":
            reset = "method.init=random" + (" and method.text=null" if self.text is not None else "")
            raise ValueError(
                f"method.init={self.init}: method.adapter says how to start; leave it out, or set {reset}"
            )
        return self

    @property
    def start_text(self) -> str | None:
        """See the base class."""
        return self.text

    def embedding_init(self) -> Init:
        """The initial value of the trained embedding, where no adapter gives one."""
        match self.init:
            case "random":
                return Normal(1.0)
            case "zero":
                return Zeros()
            case "text":
                assert self.text is not None  # validated above
                return FromText(self.text)
            case other:
                assert_never(other)


def embedding_entry(shape: tuple[int, int], axes: tuple[str, str], init: Init) -> Param:
    """The entry of the trained embedding: the virtual tokens themselves, or the input of their encoder."""
    return Param(f"{ENCODER}.embedding.weight", shape, axes, init, decay=True, role="adapter")


def linear(weights: Arrays, module: str, x: Array) -> Array:
    """y = W x + b, for a module of the encoder."""
    return x @ weights[f"{ENCODER}.{module}.weight"].T + weights[f"{ENCODER}.{module}.bias"]
