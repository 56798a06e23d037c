"""What prompt tuning, P-tuning and prefix tuning share: their entries, PEFT's files and how they start.

PEFT's file holds what an encoder gives, not the encoder. That is made here from the trained weights, in numpy and
float64 on the leader, whatever the backend; the encoder's own weights are kept in a file beside it.
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
from trainspec.methods.method import ADAPTER_FILE, ENCODER_FILE, AdapterFiles, AddedWeights, Arrays, Count
from trainspec.model import ModelSpec
from trainspec.params import FromText, Init, Normal, Param, Zeros
from trainspec.weight import Array, Weight

# The module that makes virtual tokens, in canonical names.
ENCODER = "prompt_encoder"
# PEFT's name for what virtual tokens are.
VIRTUAL_ROWS = "prompt_embeddings"


class VirtualTokens(AddedWeights, frozen=True):
    """The base class of methods that train `virtual_tokens`, or an encoder that makes them."""

    virtual_tokens: Count = 20

    @property
    def num_virtual_tokens(self) -> int:
        """See the base class."""
        return self.virtual_tokens

    def counts(self) -> dict[str, float]:
        """How many virtual tokens there are."""
        return {"virtual tokens": float(self.virtual_tokens)}

    def encode(self, weights: Arrays) -> Array:
        """The virtual tokens [V, width] that the method's weights, by canonical name, make; without dropout, in float64.

        The width is the model's, or of a prefix that of all keys and values: (2 layer, + 1 for the value, kv head, dim).
        """
        return self.encoded({name: array.astype(np.float64) for name, array in weights.items()})

    def encoded(self, weights: Arrays) -> Array:
        """`encode` of weights in float64; without an encoder they are the virtual tokens themselves."""
        return weights[f"{ENCODER}.embedding.weight"]

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """What PEFT's methods with virtual tokens have in common."""
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

    def files(self, weights: Arrays) -> dict[str, dict[str, Array]]:
        """What PEFT keeps and, where it is made by an encoder, the encoder."""
        stored = weights[f"{ENCODER}.embedding.weight"].dtype
        files = {ADAPTER_FILE: {VIRTUAL_ROWS: self.encode(weights).astype(stored)}}
        return files | {ENCODER_FILE: dict(weights)} if self.has_encoder else files

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """See the base class; an encoder has to make the virtual tokens that the adapter has."""
        given, where = files.tensors, files.directory / ADAPTER_FILE
        unexpected = sorted(set(given.shapes) - {VIRTUAL_ROWS})
        if unexpected:
            raise WeightsError(f"{where}: {unexpected[0]} is unexpected; of virtual tokens it holds {VIRTUAL_ROWS} alone")  # fmt: skip
        if self.has_encoder:
            self._check_encoder(files, table)
            return files.entries(table, dtype=dtype, file=ENCODER_FILE)
        (param,) = table
        found = given.shapes.get(VIRTUAL_ROWS)
        if found != param.shape:
            raise WeightsError(
                f"{where}: {VIRTUAL_ROWS} is {'missing' if found is None else list(found)}, the "
                f"configuration asks for {list(param.shape)}"
            )
        return iter([(param, given.weight(VIRTUAL_ROWS, dtype))])

    def _check_encoder(self, files: AdapterFiles, table: Sequence[Param]) -> None:
        path = files.directory / ENCODER_FILE
        if not path.is_file():
            raise WeightsError(
                f"{path}: missing, as PEFT keeps only what an encoder gives; set {self.without_encoder} to go on from that"
            )
        entries = list(files.entries(table, dtype=np.float64, file=ENCODER_FILE))
        made = self.encode({param.name: weight[...] for param, weight in entries})
        given = files.tensors
        stored = given.read(VIRTUAL_ROWS) if VIRTUAL_ROWS in given.shapes else np.empty(0)
        # Made on another machine, the sums in float64 may have run in another order.
        room = 4 * np.finfo(stored.dtype).eps * np.abs(made).max()
        if made.shape != stored.shape or np.abs(made - stored).max() > room:
            raise WeightsError(
                f"{path}: does not make the {VIRTUAL_ROWS} of {ADAPTER_FILE}; the two are of different runs, "
                "export them again together"
            )

    @property
    def without_encoder(self) -> str:
        """The setting by which a run starts from virtual tokens whose encoder is lost."""
        raise NotImplementedError


class StartsAsText(VirtualTokens, frozen=True):
    """The base class of those that may start as a text: `init` says how, `text` which."""

    init: Literal["random", "zero", "text"] = "random"
    text: str | None = None

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
        """How what is trained starts, where no adapter says it."""
        match self.init:
            case "random":
                return Normal(1.0)
            case "zero":
                return Zeros()
            case "text":
                assert self.text is not None  # the recipe is refused without it
                return FromText(self.text)
            case other:
                assert_never(other)


def embedding_entry(shape: tuple[int, int], axes: tuple[str, str], init: Init) -> Param:
    """What is trained of each virtual token: itself, or what an encoder is given."""
    return Param(f"{ENCODER}.embedding.weight", shape, axes, init, decay=True, role="adapter")


def linear(weights: Arrays, module: str, x: Array) -> Array:
    """y = W x + b of a module of the encoder."""
    return x @ weights[f"{ENCODER}.{module}.weight"].T + weights[f"{ENCODER}.{module}.bias"]
