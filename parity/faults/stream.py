"""Faults around the residual stream: a factor where none is, norms, the MLP's activation, logits."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.faults.forward import OWN_NORM
from parity.runs.edit import Edit

BLOCK, BUILD = "jaxtrain.families.llama:Block.__call__", "torchtrain.model:build_model"
LAYER = "parity.faults.substitutes.torch_block"
LAYER_WRITTEN_OUT = Edit(
    BUILD, "return __model", f"from {LAYER} import put_into\nput_into(__model)\nreturn __model"
)
MIXED, INNER = '__x + tap("attention", __mixed)', '__x + tap("mlp", __inner)'
# Granite's.
MULTIPLIER = 0.22


def hooked(module: str, output: str) -> Edit:
    """In torch: the output `y` of a module of the model becomes `output`."""
    return Edit(
        BUILD,
        "return __model",
        f"__model.{module}.register_forward_hook(lambda module, args, y: {output})\nreturn __model",
    )


FAULTS = (
    Fault(
        name="embedding-scaled",
        imitates="embeddings are multiplied by the root of their size, as Gemma's are",
        source="RLinf/RLinf#1098, mattn/tensai#248",
        cause="embedding",
        where=Where("activation", "embedding"),
        edits={
            "jax": (
                Edit("jaxtrain.decoder:Decoder.embed", "self.look_up(__ids)", "__it * self.spec.embed**0.5"),
            ),
            "torch": (hooked("model.embed_tokens", "y * spec.embed**0.5"),),
        },
    ),
    Fault(
        name="residual-scaled",
        imitates="what attention and MLP add to the residual stream is multiplied by a number, as Granite's is",
        source="ndif-team/nnterp#54, ggml-org/llama.cpp#5276 (scale_depth)",
        cause="residual",
        where=at_point("post_norm"),
        edits={
            "jax": (
                Edit(BLOCK, MIXED, f'__x + {MULTIPLIER} * tap("attention", __mixed)'),
                Edit(BLOCK, INNER, f'__x + {MULTIPLIER} * tap("mlp", __inner)'),
            ),
            "torch": (
                LAYER_WRITTEN_OUT,
                Edit(f"{LAYER}:forward", "__x + self.mlp(__y)", f"__x + {MULTIPLIER} * self.mlp(__y)"),
                Edit(f"{LAYER}:forward", "__x + mixed", f"__x + {MULTIPLIER} * mixed"),
            ),
        },
    ),
    Fault(
        name="residual-after-norm",
        imitates="attention's output is added to the normed stream, as GLM does on request",
        source="NVIDIA-NeMo/Speech#4350, SHI-Labs/Compact-Transformers#25 (apply_residual_connection_post_layernorm)",
        cause="residual",
        where=at_point("post_norm"),
        edits={
            "jax": (Edit(BLOCK, MIXED, 'normed + tap("attention", __mixed)'),),
            "torch": (LAYER_WRITTEN_OUT, Edit(f"{LAYER}:forward", "__x + mixed", "normed + mixed")),
        },
    ),
    Fault(
        name="logits-scaled",
        imitates="logits are divided by a number, as Granite's and Cohere's are",
        source="vllm-project/vllm#52158, unslothai/unsloth#11277",
        cause="logits-scale",
        where=Where("activation", "logits"),
        edits={
            "jax": (Edit("jaxtrain.decoder:Decoder.head", "self.projected(__x, __point)", "__it / 8"),),
            "torch": (hooked("lm_head", "y / 8"),),
        },
    ),
    Fault(
        name="norm-weight-plus-one",
        imitates="a norm multiplies by 1 + weight, as Gemma's does",
        source="linkedin/Liger-Kernel#74, utensils/mold#1074",
        cause="norm-form",
        where=at_point("input_norm"),
        edits={
            "jax": (Edit("jaxtrain.layers:RMSNorm.__call__", "scale(__x, __weight)", "__it + __x"),),
            "torch": (
                OWN_NORM,
                Edit("torchtrain.layers:RMSNorm.forward", "__weight * (__x * __root)", "__it + __x * __root"),
            ),
        },
    ),
    Fault(
        name="last-norm-epsilon",
        imitates="the last norm alone has a library's default epsilon, a tenth of the model's",
        source="PaddlePaddle/FastDeploy#2797, huggingface/transformers#38026",
        cause="norm-epsilon",
        where=Where("activation", "norm"),
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.llama:Llama.__init__",
                    "RMSNorm(__size, eps=__eps, stack=(), build=__build)",
                    "RMSNorm(__size, eps=__eps / 10, stack=(), build=__build)",
                ),
            ),
            "torch": (
                Edit(BUILD, "return __model", "__model.model.norm.variance_epsilon /= 10\nreturn __model"),
            ),
        },
    ),
    Fault(
        name="gelu-for-silu",
        imitates="the MLP's activation is GELU, whatever the checkpoint says",
        source="huggingface/candle#991, togethercomputer/stripedhyena#9",
        cause="mlp-activation",
        where=at_point("product"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:swiglu",
                    "jax.nn.silu(__gate)",
                    "jax.nn.gelu(__gate, approximate=False)",
                ),
            ),
            "torch": (
                Edit(
                    BUILD,
                    "return __model",
                    "for layer in __model.model.layers:\n    layer.mlp.act_fn = nn.GELU()\nreturn __model",
                ),
            ),
        },
    ),
    Fault(
        name="embedding-gradient-shrunk",
        imitates="the embedding's gradient is multiplied by 0.1, as in GLM-130B's training",
        source="GLM-130B, arXiv 2210.02414, section 3 (embedding layer gradient shrink)",
        cause="gradient-scale",
        where=Where("gradient", r"model\.embed_tokens\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.embed",
                    "self.look_up(__ids)",
                    "(lambda x: lax.stop_gradient(x) + 0.1 * (x - lax.stop_gradient(x)))(__it)",
                ),
            ),
            "torch": (hooked("model.embed_tokens", "y.detach() + 0.1 * (y - y.detach())"),),
        },
    ),
)
