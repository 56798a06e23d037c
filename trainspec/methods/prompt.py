"""Prompt tuning, arXiv 2104.08691."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from trainspec.methods.adapter_config import check_type
from trainspec.methods.virtual_tokens import VirtualTokensFromText, embedding_entry
from trainspec.model import ModelSpec
from trainspec.params import Param


class PromptTuning(VirtualTokensFromText, frozen=True):
    """`virtual_tokens` trained embeddings before those of the tokens.

    `adapter` may also be P-tuning's, without the encoder.
    """

    kind: Literal["prompt"] = "prompt"
    """The name of the method."""

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {"prompt": cls(virtual_tokens=3)}

    @property
    def leading_positions(self) -> int:
        """See the base class."""
        return self.virtual_tokens

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """The embeddings."""
        shape = (self.virtual_tokens, model.embed)
        return (embedding_entry(shape, ("virtual", "embed"), self.embedding_init()),)

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's prompt tuning."""
        return super().peft_config(model) | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class. P-tuning without its encoder is prompt tuning."""
        check_type(directory, config, self, ("PROMPT_TUNING", "P_TUNING"))
        super().check_peft_config(config, directory=directory, model=model)

    @property
    def not_merged(self) -> str | None:
        """See the base class."""
        return "cannot be merged: its embeddings are in the input, not in a weight"
