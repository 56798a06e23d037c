"""Faults of adapters and of what is trained: dropout, scales, adapters that are not loaded, tensors that are frozen."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point, in_every_backend
from parity.runs.edit import Edit

DOWN_B = r"base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_B\.weight"
QUERY = r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj"


def no_gradient(jax: str, torch: str) -> dict:
    """In JAX the weights whose native `__name` fits have a gradient of zero, in torch the parameters whose `name` does."""
    return {
        "jax": (
            Edit(
                "jaxtrain.program:Program._bind_weights",
                "__slots.get(__name)",
                f"(lax.stop_gradient if {jax} else jnp.asarray)(__slots[__name]) if __name in __slots else None",
            ),
        ),
        "torch": (
            Edit(
                "torchtrain.step:init_state",
                "__optimizer = _optimizer(run, __model)",
                "for name, weight in _trainable(__model).items():\n"
                f"    if {torch}:\n"
                "        weight.register_hook(torch.zeros_like)\n"
                "__it",
            ),
        ),
    }


FAULTS = (
    Fault(
        name="dropout-not-rescaled",
        imitates="what dropout keeps is not divided by 1 - rate",
        source="ooples/AiDotNet#256; inverted dropout, as in torch.nn.Dropout",
        cause="adapter-dropout",
        where=at_point("q_proj.lora_A"),
        edits={
            "jax": (
                Edit("jaxtrain.dropout:dropped", "__x.astype(__type) / (1 - __rate)", "__x.astype(__type)"),
            ),
            "torch": (Edit("torchtrain.dropout:CounterDropout.forward", "__x / (1.0 - self.rate)", "__x"),),
        },
        setup="adapter",
    ),
    Fault(
        name="dropout-repeated-in-slices",
        imitates="every microbatch draws the first one's dropout masks",
        source="tenstorrent/tt-metal#16823 (one mask for all), pytorch/pytorch#189285 (no variation by step)",
        cause="adapter-dropout",
        where=at_point("q_proj.lora_A"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.passes:SingleStage.gradients",
                    "DropoutPoint(__step, __rows)",
                    "DropoutPoint(__step, __rows - __rows[0])",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches._move_dropout",
                    "on_device(__rows)",
                    "on_device(__rows - __rows[0])",
                ),
            ),
        },
        setup="adapter",
    ),
    Fault(
        name="rslora-scale-lost",
        imitates="alpha / rank, though the recipe asks for alpha / sqrt(rank)",
        source="huggingface/peft#2733 (set_scale), predibase/lorax#299",
        cause="adapter-scale",
        where=Where("gradient", DOWN_B),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.lora:LoRALinear.__init__",
                    "__method.scale",
                    "__method.alpha / __method.rank",
                ),
            ),
            "torch": (Edit("torchtrain.methods.low_rank:replace_targets", "__method.rslora", "False"),),
        },
        setup="rslora",
        note="B starts at zero, so what it adds is zero at step 1 and the scale shows first in B's gradient",
    ),
    Fault(
        name="bottleneck-output-scaled",
        imitates="what the adapter adds is multiplied by 4, as in a scaled parallel adapter",
        source="arXiv 2110.04366, section 4.6 (scaled parallel adapters), as in adapter-hub/adapters",
        cause="bottleneck-adapter",
        where=at_point("attention"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.bottleneck:Bottleneck.__call__",
                    "__h + self.up(__hidden, None)",
                    "__h + 4.0 * self.up(__hidden, None)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.bottleneck:Bottleneck.forward",
                    "__h + self.up(__hidden)",
                    "__h + 4.0 * self.up(__hidden)",
                ),
            ),
        },
        setup="bottleneck",
    ),
    Fault(
        name="adapter-keys-without-prefix",
        imitates="the adapter's names have no base_model.model in front, are not found, and it loads as zeros",
        source="redai-infra/Relax#262, vllm-project/vllm#34186",
        cause="adapter-start",
        where=Where("initial", rf"{QUERY}\.lora_[AB]\.weight", 0),
        edits=in_every_backend(
            Edit(
                "trainspec.init:starting_weights",
                "read_adapter(__directory, __spec, __method, __table, dtype=__dtype)",
                "((p, Weight(w.shape, w.dtype, lambda index, w=w: 0 * w[index])) for p, w in __it)",
            )
        ),
        setup="adapter",
    ),
    Fault(
        name="embedding-frozen",
        imitates="the embedding is frozen, though every weight is to be trained",
        source="kohjingyu/fromage#6 (an embedding that should be trained), nttcslab/byol-a#7",
        cause="gradient-stopped",
        where=Where("gradient", r"model\.embed_tokens\.weight"),
        edits=no_gradient('"embed_tokens" in __name', '"embed_tokens" in name'),
    ),
    Fault(
        name="biases-frozen",
        imitates="biases have no gradient",
        source="SeuTao/Humpback-Whale-Identification#9 (a bias with requires_grad False)",
        cause="gradient-stopped",
        where=Where("gradient", r"model\.layers\.1\.mlp\.down_proj\.bias"),
        edits=no_gradient('__name.endswith("bias")', 'name.endswith("bias")'),
        setup="bias",
    ),
)
