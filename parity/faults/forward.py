"""Faults of the forward pass: rotary embedding, attention and its mask, norms, the MLP."""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.faults.written_out import torch_attention, torch_model
from parity.plant import Edit

MODEL, TORCH_MODEL = "jaxtrain.model", "torchtrain.model"
FIRST_ATTENTION = Where("activation", r"layers\.0\.attention")
TABLES = "cos, sin = rotary_tables(self.spec, positions, x_BSE.dtype)"
ROTATED = "q, k = rotate(q, cos, sin), rotate(k, cos, sin)"
THETA = Edit("trainspec.model", "np.asarray(model.rope_theta, dtype)", "np.asarray(10_000.0, dtype)")
SAME_SEGMENT = "segments_BS[:, :, None] == segments_BS[:, None, :]"
ANY_SEGMENT = "(segments_BS[:, :, None] > 0) == (segments_BS[:, None, :] > 0)"
# torchtrain's own norm, which fp64 runs have, in every precision.
OWN_NORM = Edit(TORCH_MODEL, 'if policy == "fp64":', "if True:")

FAULTS = (
    Fault(
        name="rope-pairing",
        imitates="interleaved pairs are rotated where the checkpoint has halves",
        source="huggingface/transformers#31788, karpathy/llama2.c#286",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                MODEL,
                "first, second = jnp.split(x_BSHD, 2, axis=-1)",
                "first, second = x_BSHD[..., ::2], x_BSHD[..., 1::2]\n"
                "    cos, sin = (jnp.repeat(jnp.split(t, 2, axis=-1)[0], 2, axis=-1) for t in (cos, sin))",
            ),
            Edit(
                MODEL,
                "jnp.concatenate([-second, first], axis=-1)",
                "jnp.stack([-second, first], axis=-1).reshape(x_BSHD.shape)",
            ),
        ),
        torch=torch_attention(
            (
                "first, second = x.chunk(2, dim=-1)",
                "first, second = x[..., ::2], x[..., 1::2]\n"
                "    cos, sin = (t.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for t in (cos, sin))",
            ),
            ("torch.cat((-second, first), dim=-1)", "torch.stack((-second, first), dim=-1).flatten(-2)"),
        ),
    ),
    Fault(
        name="rope-theta",
        imitates="theta stays at 10000 where the checkpoint says another",
        source="google-deepmind/penzai#102, marin-community/levanter#649",
        where=FIRST_ATTENTION,
        jax=(THETA,),
        torch=(THETA,),
    ),
    Fault(
        name="rope-key-offset",
        imitates="keys are rotated one position further than queries",
        source="huggingface/transformers#29419 (positions beside the mask); RoFormer, arXiv 2104.09864",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                MODEL,
                TABLES,
                "at, after = (rotary_tables(self.spec, p, x_BSE.dtype) for p in (positions, positions + 1))\n"
                "        cos, sin = (at[0], after[0]), (at[1], after[1])",
            ),
            Edit(
                MODEL,
                ROTATED,
                "q, k = rotate(q, cos[0], sin[0]), rotate(k, cos[1], sin[1])",
            ),
        ),
        torch=(
            *torch_attention(
                (
                    "k_tables = position_embeddings[:2], position_embeddings[:2]",
                    "k_tables = position_embeddings[:2], position_embeddings[2:]",
                )
            ),
            Edit(
                TORCH_MODEL,
                "return angles_BSD.cos().to(x_BSE.dtype), angles_BSD.sin().to(x_BSE.dtype)",
                "after_BSD = angles_BSD + torch.cat((self._inverse, self._inverse))\n"
                "        tables = (f(a) for a in (angles_BSD, after_BSD) for f in (torch.cos, torch.sin))\n"
                "        return tuple(table.to(x_BSE.dtype) for table in tables)",
            ),
        ),
        note="an offset of queries and keys alike changes nothing: see rope-all-offset",
    ),
    Fault(
        name="rope-all-offset",
        imitates="every position is one too large",
        source="huggingface/transformers#29419 (positions beside the mask); RoFormer, arXiv 2104.09864",
        where=None,
        jax=(Edit(MODEL, TABLES, TABLES.replace("positions", "positions + 1")),),
        torch=(Edit("torchtrain.step", "_tensor(batch.positions)", "_tensor(batch.positions) + 1"),),
        note="rotary attention depends on differences of positions only: the same arithmetic, so it must pass",
    ),
    Fault(
        name="attention-scale",
        imitates="scores are scaled by embed / heads where the head has another size",
        source="lucidrains/vit-pytorch#65, karpathy/ng-video-lecture#6",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                MODEL,
                ROTATED,
                "wrong = (q.shape[2] * self.head_dim / x_BSE.shape[-1]) ** 0.5\n        "
                + ROTATED.replace("rotate(q", "rotate(q * wrong"),
            ),
        ),
        torch=torch_model(
            "    for layer in model.model.layers:\n"
            "        layer.self_attn.scaling = (spec.embed / spec.heads) ** -0.5\n"
        ),
    ),
    Fault(
        name="causal-off-by-one",
        imitates="a query sees the token behind it",
        source="huggingface/transformers#48745 (decoders that see future tokens)",
        where=FIRST_ATTENTION,
        jax=(Edit(MODEL, "order[:, None] >= order[None, :]", "order[:, None] + 1 >= order[None, :]"),),
        torch=(Edit(TORCH_MODEL, "same_BSS.tril()", "same_BSS.tril(1)"),),
    ),
    Fault(
        name="padding-attended",
        imitates="padding on the left is seen by the tokens behind it",
        source="NVIDIA-NeMo/Automodel#3704 (36 of 150 models), huggingface/transformers#29419",
        where=FIRST_ATTENTION,
        jax=(Edit(MODEL, SAME_SEGMENT, f"({SAME_SEGMENT}) | (segments_BS[:, None, :] == 0)"),),
        torch=(Edit(TORCH_MODEL, SAME_SEGMENT, f"({SAME_SEGMENT}) | (segments_BS[:, None, :] == 0)"),),
    ),
    Fault(
        name="packed-rows-attend",
        imitates="documents packed into one row see each other",
        source="LlamaFactory#7318, MeetKai/functionary#265, meta-pytorch/torchtune#875",
        where=FIRST_ATTENTION,
        jax=(Edit(MODEL, SAME_SEGMENT, ANY_SEGMENT),),
        torch=(Edit(TORCH_MODEL, SAME_SEGMENT, ANY_SEGMENT),),
        setup="packed",
    ),
    Fault(
        name="packed-positions-ignored",
        imitates="the model counts positions over the whole row, whatever the batch says",
        source="LlamaFactory#7318, #4224",
        where=None,
        jax=(
            Edit(
                MODEL,
                TABLES,
                f"positions = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)\n        {TABLES}",
            ),
        ),
        torch=(
            Edit(
                "torchtrain.step",
                "_tensor(batch.positions)",
                "torch.arange(batch.positions.shape[1]).expand(batch.positions.shape)",
            ),
        ),
        setup="packed",
        note="behind a block mask only differences of positions within a document count: it must pass. A batch "
        "with such positions does show: see packed-positions-not-restarted",
    ),
    Fault(
        name="rmsnorm-eps-outside",
        imitates="eps is added to the root, not to the mean square",
        source="NVIDIA/TransformerEngine#364, fla-org/flash-linear-attention#508",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                MODEL,
                "lax.rsqrt(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True) + self.eps)",
                "(1 / (jnp.sqrt(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True)) + self.eps))",
            ),
        ),
        torch=(
            OWN_NORM,
            Edit(
                TORCH_MODEL,
                "torch.rsqrt(mean_square + self.variance_epsilon)",
                "(1 / (mean_square.sqrt() + self.variance_epsilon))",
            ),
        ),
    ),
    Fault(
        name="rmsnorm-weight-before-cast",
        imitates="the weight is multiplied before the cast to the compute type",
        source="huggingface/transformers LlamaRMSNorm against meta-llama/llama RMSNorm",
        where=None,
        jax=(
            Edit(
                MODEL,
                "scale(normed.astype(x.dtype), self.scale.get_value())",
                "scale(normed, self.scale.get_value()).astype(x.dtype)",
            ),
        ),
        torch=(
            OWN_NORM,
            Edit(
                TORCH_MODEL,
                "self.weight * (hidden_states * torch.rsqrt(mean_square + self.variance_epsilon))",
                "(self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)).to(hidden_states.dtype)",
            ),
        ),
        note="a cast to the type that is there already does nothing: it shows in bf16 only and must pass in fp64",
    ),
    Fault(
        name="gqa-tile",
        imitates="kv heads are tiled (0 1 0 1) where each serves neighbours (0 0 1 1)",
        source="onnx/onnx#7274; GQA, arXiv 2305.13245",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                MODEL,
                "q_BSHD.reshape(B, S, K, H // K, D)",
                "q_BSHD.reshape(B, S, H // K, K, D).swapaxes(2, 3)",
            ),
            Edit(MODEL, "v_BSKD).reshape(B, S, H, D)", "v_BSKD).swapaxes(2, 3).reshape(B, S, H, D)"),
        ),
        torch=torch_attention(
            (
                "t.repeat_interleave(self.num_key_value_groups, dim=1)",
                "t.repeat(1, self.num_key_value_groups, 1, 1)",
            )
        ),
    ),
    Fault(
        name="swiglu-swapped",
        imitates="the activation is on the up half, not on the gate",
        source="ml-explore/mlx-lm#767; SwiGLU, arXiv 2002.05202",
        where=Where("activation", r"layers\.0\.mlp"),
        jax=(
            Edit(
                MODEL,
                "jax.nn.silu(self.gate_proj(x_BSE, point)) * self.up_proj(x_BSE, point)",
                "jax.nn.silu(self.up_proj(x_BSE, point)) * self.gate_proj(x_BSE, point)",
            ),
        ),
        torch=torch_model(
            "    for layer in model.model.layers:\n"
            "        layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x))\n"
        ),
    ),
)
