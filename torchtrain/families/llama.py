"""Llama: Hugging Face's LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trainspec.model import ModelSpec


class Llama:
    """The anatomy of Llama, and of Hugging Face's other families with the same names."""

    norms: ClassVar[tuple[type[nn.Module], ...]] = (LlamaRMSNorm,)

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        # Without RoPE's settings: the run's own tables take them from the spec.
        return LlamaForCausalLM(LlamaConfig(**sizes(spec), mlp_bias=spec.mlp_bias))

    def inner(self, model: Any) -> nn.Module:
        return model.model

    def embedding(self, model: Any) -> nn.Module:
        return model.model.embed_tokens

    def rotary(self, model: Any) -> nn.Module:
        return model.model.rotary_emb

    def put_rotary(self, model: Any, rotary: nn.Module) -> None:
        model.model.rotary_emb = rotary

    def layers(self, model: Any) -> Sequence[nn.Module]:
        return model.model.layers

    def attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    def mlp(self, layer: Any) -> nn.Module:
        return layer.mlp

    def outputs(self, layer: Any) -> dict[str, Any]:
        attention = self.attention(layer)
        norms = {"input_norm": layer.input_layernorm, "post_norm": layer.post_attention_layernorm}
        heads = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        whole = {"attention": attention, "mlp": self.mlp(layer), "block": layer}
        return norms | heads | self.before_product(self.mlp(layer)) | whole

    def before_product(self, mlp: Any) -> dict[str, Any]:
        """Those of the feed-forward block, before its product."""
        return {"gate": mlp.gate_proj, "up": mlp.up_proj}

    def inputs(self, layer: Any) -> dict[str, Any]:
        return {"mixed": self.attention(layer).o_proj, "product": self.mlp(layer).down_proj}

    def norm(self, model: Any) -> nn.Module:
        return model.model.norm

    def head(self, model: Any) -> nn.Module:
        return model.lm_head


def sizes(spec: ModelSpec) -> dict[str, Any]:
    """A spec as arguments of a Hugging Face configuration."""
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.embed,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_bias": spec.attention_bias,
        "pad_token_id": None,  # labels keep padding out of the loss; no row of the embedding is special
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
