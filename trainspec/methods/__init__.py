"""Training methods: what is trained, which modules it touches, and the entries it adds to the table.

One file per method with its spec, a subclass of `method.MethodSpec`. Names, layouts and initial values are those of
PEFT's modules, where PEFT has the method. Each backend has a file of the same name with the method's layers.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from trainspec.methods.bottleneck import Adapter
from trainspec.methods.dora import DoRA
from trainspec.methods.full import Full
from trainspec.methods.lora import LoRA
from trainspec.methods.low_rank import LowRank, target_modules
from trainspec.methods.method import ADAPTER_FILE, ENCODER_FILE, PEFT_PREFIX, AdapterFiles, MethodSpec
from trainspec.methods.prefix import PrefixTuning
from trainspec.methods.prompt import PromptTuning
from trainspec.methods.ptuning import LSTM_LAYERS, PTuning
from trainspec.methods.virtual_tokens import ENCODER, VirtualTokens
from trainspec.model import ModelSpec
from trainspec.params import Param, param_table

__all__ = [
    "ADAPTER_FILE",
    "ENCODER",
    "ENCODER_FILE",
    "EXAMPLES",
    "LSTM_LAYERS",
    "METHODS",
    "PEFT_PREFIX",
    "Adapter",
    "AdapterFiles",
    "DoRA",
    "Full",
    "LoRA",
    "LowRank",
    "Method",
    "MethodSpec",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "VirtualTokens",
    "adapter_table",
    "full_table",
    "leading_positions",
    "position_shift",
    "target_modules",
    "trainable_table",
    "virtual_tokens",
]

# The registry: what a recipe's `method:` may be.
_Registered = Full | LoRA | DoRA | Adapter | PromptTuning | PTuning | PrefixTuning
Method = Annotated[_Registered, Field(discriminator="kind")]
METHODS: dict[str, type[_Registered]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(_Registered)
}
# Small specs of every method by name; names begin with the kind.
EXAMPLES: dict[str, Method] = {
    name: example for spec in METHODS.values() for name, example in spec.examples().items()
}


def virtual_tokens(method: MethodSpec) -> int:
    """Number of virtual tokens, which every token sees."""
    return method.num_virtual_tokens


def position_shift(method: MethodSpec) -> int:
    """The position of a record's first token: the number of virtual tokens, or 0 where they have no positions."""
    return method.position_shift


def leading_positions(method: MethodSpec) -> int:
    """Number of embeddings put in front of an example's."""
    return method.leading_positions


def adapter_table(model: ModelSpec, method: MethodSpec) -> tuple[Param, ...]:
    """The weights that `method` adds to the model, in forward order."""
    return method.table(model)


def trainable_table(model: ModelSpec, method: MethodSpec) -> tuple[Param, ...]:
    """The entries that `method` trains; everything else in the model is frozen."""
    return param_table(model) if method.trains_model else method.table(model)


def full_table(model: ModelSpec, method: MethodSpec) -> tuple[Param, ...]:
    """Every entry of the run: the model's own, then the method's."""
    return param_table(model) + method.table(model)
