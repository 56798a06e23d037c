"""Hugging Face's LlamaForCausalLM, made from a ModelSpec and held to the numerics contract."""

# B examples, S sequence, E embed, D head dim

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from torchtrain.tensor import Peers, compute_device, split_layers
from trainspec.model import ModelSpec, inverse_frequencies
from trainspec.plan import COMPUTE_DTYPE, Policy


class RMSNorm(LlamaRMSNorm):
    """x * rsqrt(mean(x²) + eps) * weight in the type of x: LlamaRMSNorm without its detour over float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(mean_square + self.variance_epsilon))


class _RotaryTables(nn.Module):
    """cos and sin [B, S, D] of each position's angles, made in `dtype` (float32 or float64), cast to the type of x.

    In place of LlamaRotaryEmbedding, whose frequencies are float32 and a buffer that a cast of the model rounds.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        numpy_dtype = "float64" if dtype == torch.float64 else "float32"
        self._inverse = torch.from_numpy(inverse_frequencies(spec, numpy_dtype)).to(compute_device())

    @torch.no_grad()
    def forward(self, x_BSE: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(self._inverse.dtype) * self._inverse
        angles_BSD = torch.cat((angles, angles), dim=-1)
        return angles_BSD.cos().to(x_BSE.dtype), angles_BSD.sin().to(x_BSE.dtype)


def attention_mask(segments_BS: Tensor) -> Tensor:
    """True where a query may see a key: same document, and not later. Bool [B, 1, S, S].

    Padding (segment 0) sees earlier padding, so that no row of the softmax is empty.
    """
    same_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    return same_BSS.tril()[:, None]


def build_model(spec: ModelSpec, *, policy: Policy, remat: str, tensor: Peers) -> LlamaForCausalLM:
    """This process's part of the module, on the meta device: weights.allocate gives every weight its memory.

    `remat` full recomputes each layer in the backward pass. fp64 runs get their own RMSNorm: Hugging Face's
    computes in float32 whatever the model's type. Differs from jaxtrain, where a constraint on the activations says
    what is split: here it is the layers.
    """
    dtype = getattr(torch, COMPUTE_DTYPE[policy])
    with torch.device("meta"):  # no memory and no random numbers for weights that are filled later
        model = LlamaForCausalLM(_config(spec))
        if tensor.size > 1:
            split_layers(model, spec, tensor)
        model.to(dtype)
    if policy == "fp64":
        _use_float64_norms(model)
    model.tie_weights()
    model.model.set_submodule("rotary_emb", _RotaryTables(spec, torch.promote_types(dtype, torch.float32)))
    if remat == "full":
        # No torch random numbers are drawn in a layer: their state need not be kept for the recomputation.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def _use_float64_norms(model: LlamaForCausalLM) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)


def _config(spec: ModelSpec) -> LlamaConfig:
    # RoPE's settings are left out: _RotaryTables takes them from the spec.
    return LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.embed,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied_embeddings,
        attention_bias=spec.attention_bias,
        mlp_bias=spec.mlp_bias,
        pad_token_id=None,  # padding has a loss of zero by its labels; no row of the embedding is special
        use_cache=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] (taken through **kwargs)
    )
