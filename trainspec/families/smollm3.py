"""SmolLM3: Llama that does not rotate queries and keys in every fourth layer (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from trainspec.errors import ModelError
from trainspec.families.config import DecoderFields
from trainspec.families.llama import Llama
from trainspec.model import ModelSpec
from trainspec.rope import Size


class _Fields(DecoderFields):
    """Defaults are those of transformers' SmolLM3Config."""

    default_theta: ClassVar[float] = 2e6
    num_key_value_heads: Size | None = 4
    max_position_embeddings: Size = 32768
    tie_word_embeddings: bool | None = True
    # 1 for each layer that rotates, 0 for one that does not. Without the list, every `interval`-th does not.
    no_rope_layers: list[Literal[0, 1]] | None = None
    no_rope_layer_interval: Size = 4
    # Windows are not supported; a size without the switch is not used.
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None


class SmolLM3(Llama):
    """Models of `SmolLM3ForCausalLM`, without a sliding window."""

    name = "smollm3"
    title = "SmolLM3"
    model_type = "smollm3"
    peft_targets: ClassVar[tuple[str, ...] | None] = None
    architectures = ("SmolLM3ForCausalLM",)
    fields: ClassVar[type[DecoderFields]] = _Fields
    heads_divide: ClassVar[bool] = False
    # Sizes of the published model (its model card).
    presets: ClassVar[Mapping[str, ModelSpec]] = {
        "smollm3-3b": ModelSpec(
            name="smollm3-3b", vocab=128256, embed=2048, layers=36, heads=16, kv_heads=4, head_dim=128, mlp=11008,
            norm_eps=1e-6, rope_theta=5e6, rope_scaling=None, max_positions=65536, tied_embeddings=True,
            attention_bias=False, mlp_bias=False, init_std=0.02, family="smollm3", unrotated=tuple(range(3, 36, 4)),
        )
    }  # fmt: skip

    def check(self, fields: DecoderFields, where: str) -> None:
        """The list of layers has to have all of them."""
        super().check(fields, where)
        assert isinstance(fields, _Fields)
        listed = fields.no_rope_layers
        if listed is not None and len(listed) < fields.num_hidden_layers:
            raise ModelError(
                f"{where}: no_rope_layers has {len(listed)} entries for {fields.num_hidden_layers} layers; give one for each"
            )

    def rules(self, fields: Any) -> dict[str, Any]:
        """The layers without rotation."""
        listed, interval = fields.no_rope_layers, fields.no_rope_layer_interval
        rotates = listed or [int((i + 1) % interval != 0) for i in range(fields.num_hidden_layers)]
        unrotated = tuple(i for i in range(fields.num_hidden_layers) if not rotates[i])
        return super().rules(fields) | {"unrotated": unrotated}

    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """Llama's, with a list of the layers that rotate; the default padding token is beyond small vocabularies."""
        rotates = [int(i not in model.unrotated) for i in range(model.layers)]
        return super().config_of(model) | {"no_rope_layers": rotates, "pad_token_id": None}
