"""Faults of virtual tokens: where a prefix or a prompt enters the model, what sees it, and what trains it."""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.plant import Edit

MODEL, VIRTUAL, STEP = "jaxtrain.model", "jaxtrain.virtual", "jaxtrain.step"
TORCH_VIRTUAL, DATA = "torchtrain.virtual", "trainspec.data"
FIRST_ATTENTION = Where("activation", r"layers\.0\.attention")
SLOT = "slots.get(name), which"
TARGETS = "int((self.labels != IGNORED).sum())"
UNBOUND = "return mine.permute(1, 2, 0, 3).unbind(0)"
ENCODED = "rows_1NE = encoder(tokens_1N.to(embedded_BSE.device))"

FAULTS = (
    Fault(
        name="prefix-positions-from-zero",
        imitates="the tokens behind a prefix start at position 0, not behind its virtual tokens",
        source="XiangLi1999/PrefixTuning#40, huggingface/transformers#33852",
        where=FIRST_ATTENTION,
        jax=(Edit(VIRTUAL, "positions + virtual_tokens(method)", "positions + leading_rows(method)"),),
        torch=(
            Edit(
                TORCH_VIRTUAL, "positions_BS + virtual_tokens(method)", "positions_BS + leading_rows(method)"
            ),
        ),
        setup="prefix",
        note="a prefix is not rotated, so that positions count from it: rope-all-offset has none, and passes",
    ),
    Fault(
        name="prefix-masked-out",
        imitates="no token may look at the prefix",
        source="QwenLM/ParScale#11, zai-org/ChatGLM3#359",
        where=FIRST_ATTENTION,
        jax=(Edit(MODEL, "seen_by_all, constant_values=True", "seen_by_all, constant_values=False"),),
        torch=(
            Edit(TORCH_VIRTUAL, "(virtual_tokens(method), 0), value=True", "(virtual_tokens(method), 0)"),
        ),
        setup="prefix",
    ),
    Fault(
        name="prefix-keys-and-values-swapped",
        imitates="of each layer's pair in the prefix the values come first",
        source="zai-org/ChatGLM3#359, huggingface/peft#919 (the prefix is cut up in another order)",
        where=FIRST_ATTENTION,
        jax=(
            Edit(MODEL, "in_front(prefix_N2KD[:, 0], k)", "in_front(prefix_N2KD[:, 1], k)"),
            Edit(MODEL, "in_front(prefix_N2KD[:, 1], v)", "in_front(prefix_N2KD[:, 0], v)"),
        ),
        torch=(
            Edit(
                TORCH_VIRTUAL,
                "keys_KND, values_KND = prefix[2 * module.layer_idx]",
                "values_KND, keys_KND = prefix[2 * module.layer_idx]",
            ),
        ),
        setup="prefix",
    ),
    Fault(
        name="prefix-rotated",
        imitates="the keys of the prefix are rotated as tokens at positions 0, 1, ... are",
        source="mistyreed63849/Graph-LLM#1",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                MODEL,
                "            seen_by_all = ",
                "            at = jnp.arange(virtual.prefix.shape[1])[None]\n"
                "            tables = rotary_tables(self.spec, at, virtual.prefix.dtype)\n"
                "            turned = rotate(virtual.prefix[:, :, 0], *tables)\n"
                "            virtual = virtual._replace(prefix=virtual.prefix.at[:, :, 0].set(turned))\n"
                "            seen_by_all = ",
            ),
        ),
        torch=(
            Edit(
                TORCH_VIRTUAL,
                UNBOUND,
                "both = mine.permute(1, 2, 0, 3)\n"
                "    cos, sin = model.model.rotary_emb(both, tokens_1N)\n"
                "    first, second = both.chunk(2, -1)\n"
                "    turned = both * cos + torch.cat((-second, first), -1) * sin\n"
                "    return [(turned, both)[i % 2][i] for i in range(len(both))]",
            ),
        ),
        setup="prefix",
    ),
    Fault(
        name="prompt-rows-in-the-loss",
        imitates="virtual rows have labels, as if they stood for padding, and count as targets",
        source="huggingface/trl#4168",
        where=Where("tokens", "tokens"),
        jax=(Edit(VIRTUAL, "jnp.full(leading_rows(method), IGNORED)", "jnp.full(leading_rows(method), 0)"),),
        torch=(
            Edit(TORCH_VIRTUAL, "(leading_rows(method), 0), value=IGNORED", "(leading_rows(method), 0)"),
            # Each but the first is the target of the one before it.
            Edit(DATA, TARGETS, f"{TARGETS} + 2 * len(self.labels)"),
        ),
        setup="prompt",
    ),
    Fault(
        name="virtual-tokens-appended",
        imitates="the rows of the prompt stand behind the embedded tokens",
        source="huggingface/peft#416, yeyeyeye33/SEC-Prompt#3",
        where=Where("activation", "embedding"),
        jax=(
            Edit(
                MODEL,
                "x_BSE = in_front(virtual.rows, x_BSE)",
                "x_BSE = jnp.roll(in_front(virtual.rows, x_BSE), -len(virtual.rows), axis=1)",
            ),
        ),
        torch=(
            Edit(
                TORCH_VIRTUAL,
                "torch.cat((rows_1NE.expand(len(embedded_BSE), -1, -1), embedded_BSE), 1)",
                "torch.cat((embedded_BSE, rows_1NE.expand(len(embedded_BSE), -1, -1)), 1)",
            ),
        ),
        setup="prompt",
    ),
    Fault(
        name="encoder-frozen",
        imitates="the virtual tokens' embeddings are trained, the encoder that reads them is not",
        source="bowang-lab/MedSAM#233, MaverickRen/PixelLM#30",
        where=Where("gradient", r"prompt_encoder\.mlp_head\.4\.weight"),
        jax=(
            Edit(
                STEP,
                SLOT,
                '(lax.stop_gradient if "mlp_head" in name else jnp.asarray)(slots[name]) if name in slots else None, which',
            ),
        ),
        torch=(
            Edit(
                TORCH_VIRTUAL,
                ENCODED,
                "head = {n: p for n, p in encoder.named_parameters() if n.startswith('mlp_head')}\n"
                "        still = {n: p.detach() for n, p in head.items()}\n"
                "        inputs = (tokens_1N.to(embedded_BSE.device),)\n"
                "        rows_1NE = torch.func.functional_call(encoder, still, inputs)\n"
                "        rows_1NE = rows_1NE + 0 * sum(p.sum() for p in head.values())",
            ),
        ),
        setup="ptuning-mlp",
    ),
)
