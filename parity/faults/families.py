"""Faults of families: what one does otherwise than a Llama is left out, or done where it should not be.

Two more are with their kind: a norm of heads after the rotation (`forward`), and its gradient on tensor ranks (`sharding`).
"""

from __future__ import annotations

from parity.faults.fault import Fault, at_point, in_every_backend
from parity.runs.edit import Edit

# Layers of torch's models are Hugging Face's: they are changed where the model is built.
BUILT = "torchtrain.model:build_model"

FAULTS = (
    Fault(
        name="norm-epsilon-of-another-family",
        imitates="a GLM's norms have Llama's epsilon, 1e-5, not the 1.5625e-7 of its config",
        source="apache/tvm#15856, pytorch/torchtitan#4395 (the default of another model); transformers' GlmConfig against LlamaConfig",
        cause="norm-epsilon",
        where=at_point("input_norm"),
        below_bound_in=("bf16",),
        edits=in_every_backend(
            Edit("trainspec.families.config:DecoderFields.spec", "__fields.rms_norm_eps", "1e-5")
        ),
        setup="glm",
    ),
    Fault(
        name="gate-and-up-swapped",
        imitates="the halves of a fused matrix are taken as up and gate, not gate and up",
        source="NVIDIA-NeMo/Automodel's list of pitfalls (pitfalls.md); transformers' GlmMLP",
        cause="mlp-activation",
        where=at_point("product"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.glm:FusedSwiGLU.__call__",
                    "jnp.split(__both, 2, axis=-1)",
                    "__it[::-1]",
                ),
            ),
            "torch": (
                Edit(
                    BUILT,
                    "return __model",
                    "for layer in __model.model.layers:\n"
                    "    def swapped(x, m=layer.mlp):\n"
                    "        up, gate = m.gate_up_proj(x).chunk(2, -1)\n"
                    "        return m.down_proj(up * m.activation_fn(gate))\n"
                    "    layer.mlp.forward = swapped\n"
                    "return __model",
                ),
            ),
        },
        setup="glm",
    ),
    Fault(
        name="window-off-by-one",
        imitates="a query sees one key more than the window has",
        source="huggingface/transformers#39408, ml-explore/mlx-lm#390",
        cause="attention-window",
        where=at_point("mixed"),
        edits={
            "jax": (Edit("jaxtrain.layers:in_window", "__distance < __window", "__distance <= __window"),),
            "torch": (
                Edit("torchtrain.layers:in_window", "__distance < __window", "__distance <= __window"),
            ),
        },
        setup="mistral",
    ),
    Fault(
        name="rotated-where-it-should-not-be",
        imitates="every layer rotates queries and keys, also those that the config leaves out (NoPE)",
        source="airockchip/rknn-llm#501, timtoole02/Camelid#535",
        cause="rotated-layers",
        where=at_point("rotated_query", layer=1),
        edits={
            "jax": (Edit("jaxtrain.decoder:rotated_layers", "__layer not in __spec.unrotated", "True"),),
            "torch": (
                Edit("torchtrain.families.smollm3:SmolLM3.make", "int(__i not in __spec.unrotated)", "1"),
            ),
        },
        setup="smollm3",
    ),
    Fault(
        name="bias-on-the-output",
        imitates="attention's output gets a bias, newly drawn, as the checkpoint has none: Llama's rule for a Qwen2",
        source="sgl-project/sglang-jax#578, NVIDIA-NeMo/Automodel#3926 (a bias that no checkpoint fills)",
        cause="projection",
        where=at_point("attention"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.llama:Attention.__call__",
                    "return self.o_proj(__mixed, __point), __seen",
                    "import jax\n"
                    "bias = jax.numpy.linspace(-0.02, 0.02, x_BSE.shape[-1])\n"
                    "return self.o_proj(__mixed, __point) + bias.astype(x_BSE.dtype), __seen",
                ),
            ),
            "torch": (
                Edit(
                    BUILT,
                    "return __model",
                    "bias = torch.linspace(-0.02, 0.02, spec.embed, device='cpu')\n"
                    "for layer in __model.model.layers:\n"
                    "    layer.self_attn.o_proj.register_forward_hook(lambda m, args, y: y + bias.to(y))\n"
                    "return __model",
                ),
            ),
        },
        setup="qwen2",
    ),
    Fault(
        name="rotary-table-in-half-precision",
        imitates="the frequencies of the rotary table are rounded to half precision, as in the published code of ChatGLM2",
        source="EleutherAI/gpt-neox#1003, sgl-project/sglang-jax#1472",
        cause="rotation-precision",
        where=at_point("rotated_query"),
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:rotary_tables",
                    "jnp.asarray(__frequencies)",
                    "lax.reduce_precision(__it, exponent_bits=5, mantissa_bits=10)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.layers:RotaryTables.__init__",
                    "torch.from_numpy(__frequencies)",
                    "__it.half().to(dtype)",
                ),
            ),
        },
        setup="glm",
    ),
)
