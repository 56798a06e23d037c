"""Full fine-tuning: the model's own weights, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from trainspec.methods.method import MethodSpec
from trainspec.model import ModelSpec
from trainspec.params import Param


class Full(MethodSpec, frozen=True):
    """Every weight of the model is trained."""

    kind: Literal["full"] = "full"
    """The name of the method."""

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {"full": cls()}

    @property
    def trains_model(self) -> bool:
        """See the base class."""
        return True

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """Nothing is added."""
        return ()
