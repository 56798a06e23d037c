"""Faults of methods and starting weights: LoRA, adapters, frozen weights, initial values."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point, in_every_backend
from parity.runs.edit import Edit

MASK_KEY, OTHER_MASK_KEY = (
    'name_key(__seed, "dropout", __module)',
    'name_key(__seed + 1, "dropout", __module)',
)
SQUARE = "model.layers.0.self_attn.v_proj.weight"  # the right shape when transposed


def dropout_elsewhere(product: str) -> tuple[Edit, ...]:
    """LoRA's layer without dropout on its input, with `product` as its low-rank product."""
    layer = "jaxtrain.methods.lora:LoRALinear.__call__"
    return (
        Edit(layer, "__x if __is_off else self._dropout(__x, __point)", "__x"),
        Edit(layer, "self.product(__x)", product),
    )


def dropped(value: str) -> str:
    """`value` with that layer's dropout."""
    return f"({value} if point is None or self.rate == 0 else self._dropout({value}, point))"


def torch_dropout_after(matrix: str) -> tuple[Edit, ...]:
    """PEFT's layer with its dropout on the output of `matrix`."""
    return (
        Edit(
            "torchtrain.methods.low_rank:replace_targets",
            "__layer.lora_dropout[__adapter] = __dropout",
            "drop = __dropout\n"
            "__layer.lora_dropout[__adapter] = nn.Identity()\n"
            f"__layer.{matrix}[__adapter].register_forward_hook(lambda _, __, y, drop=drop: drop(y))",
        ),
    )


FAULTS = (
    Fault(
        name="lora-scale-missing",
        imitates="B A x is added without alpha / rank",
        source="ml-explore/mlx-examples#623, AI-Hypercomputer/maxtext#3376",
        cause="adapter-scale",
        where=at_point("q_proj.lora_B"),
        edits={
            "jax": (Edit("jaxtrain.methods.lora:LoRALinear.__init__", "__method.scale", "1.0"),),
            "torch": (
                Edit("torchtrain.methods.low_rank:replace_targets", "__method.alpha", "__method.rank"),
            ),
        },
        setup="adapter",
    ),
    Fault(
        name="lora-scale-of-rslora",
        imitates="alpha / sqrt(rank), though the adapter says alpha / rank",
        source="NVIDIA/TensorRT-LLM#1668; rsLoRA, arXiv 2312.03732",
        cause="adapter-scale",
        where=at_point("q_proj.lora_B"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.lora:LoRALinear.__init__",
                    "__method.scale",
                    "__method.alpha / __method.rank**0.5",
                ),
            ),
            "torch": (Edit("torchtrain.methods.low_rank:replace_targets", "__method.rslora", "True"),),
        },
        setup="adapter",
    ),
    Fault(
        name="lora-starts-swapped",
        imitates="A starts at zero and B at random values",
        source="microsoft/LoRA#155, #76",
        cause="adapter-start",
        where=Where(
            "initial", r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_[AB]\.weight", 0
        ),
        edits=in_every_backend(
            Edit(
                "trainspec.methods.low_rank:LowRank.target_entries",
                '(("lora_A.weight", __shape_a, __axes_a, __random), ("lora_B.weight", __shape_b, __axes_b, __zeros))',
                '(("lora_A.weight", __shape_a, __axes_a, __zeros), ("lora_B.weight", __shape_b, __axes_b, __random))',
            )
        ),
        setup="lora",
    ),
    Fault(
        name="lora-dropout-behind-a",
        imitates="dropout on A x, not on x",
        source="paiml/aprender#2170, axolotl-ai-cloud/axolotl#3528",
        cause="adapter-dropout",
        where=at_point("q_proj.lora_A"),
        edits={
            "jax": dropout_elsewhere(
                f"matmul(tap(self.name + '.lora_A', {dropped('matmul(__x, self.lora_a.get_value())')}), self.lora_b.get_value())"
            ),
            "torch": torch_dropout_after("lora_A"),
        },
        setup="adapter",
    ),
    Fault(
        name="lora-dropout-on-output",
        imitates="dropout on B A x, not on x",
        source="axolotl-ai-cloud/axolotl#3528, huggingface/peft#1178",
        cause="adapter-dropout",
        where=at_point("q_proj.lora_A"),
        edits={
            "jax": dropout_elsewhere(dropped("__it")),
            "torch": torch_dropout_after("lora_B"),
        },
        setup="adapter",
    ),
    Fault(
        name="lora-dropout-seed",
        imitates="dropout is drawn from another seed",
        source="NVIDIA-NeMo/Megatron-Bridge#5257 (one draw too many)",
        cause="adapter-dropout",
        where=at_point("q_proj.lora_A"),
        edits={
            "jax": (Edit("jaxtrain.methods.low_rank:replace_targets", MASK_KEY, OTHER_MASK_KEY),),
            "torch": (Edit("torchtrain.dropout:CounterDropout.__init__", MASK_KEY, OTHER_MASK_KEY),),
        },
        setup="adapter",
    ),
    Fault(
        name="lora-target-missed",
        imitates="one target module gets no adapter",
        source="NVIDIA-NeMo/Megatron-Bridge#1738, huggingface/peft#3554",
        cause="adapter-targets",
        where=Where("initial", r"base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_[AB]\.weight", 0),
        edits=in_every_backend(
            Edit(
                "trainspec.methods.low_rank:target_modules",
                "tuple(__m for __m in __linear if any(__tails))",
                "__it[:-1]",
            )
        ),
        setup="lora",
    ),
    Fault(
        name="adapter-behind-the-residual",
        imitates="the adapter after the MLP is given the residual stream with the MLP's output added",
        source="google-research/adapter-bert#7, adapter-hub/adapters#95; arXiv 1902.00751, figure 2",
        cause="bottleneck-adapter",
        where=at_point("mlp_adapter.hidden"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.llama:Block.__call__",
                    "self.mlp_adapter(__inner)",
                    "self.mlp_adapter(x_BSE + __inner) - x_BSE",
                ),
            ),
            "torch": (Edit("torchtrain.methods.bottleneck:attach", "__anatomy.mlp(__layer)", "__layer"),),
        },
        setup="bottleneck",
    ),
    Fault(
        name="adapter-without-non-linearity",
        imitates="the adapter has no non-linearity between its two matrices, which makes them one",
        source="thuml/Universal-Domain-Adaptation#7; arXiv 1902.00751, figure 2",
        cause="bottleneck-adapter",
        where=at_point("attention_adapter.hidden"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.bottleneck:Bottleneck.__call__",
                    "_act(__name, __down.astype(__wide)).astype(__dtype)",
                    "__down",
                ),
            ),
            "torch": (
                Edit("torchtrain.methods.bottleneck:Bottleneck.forward", "self._act(__down)", "__down"),
            ),
        },
        setup="bottleneck",
    ),
    Fault(
        name="dora-norm-in-the-graph",
        imitates="the norm that DoRA divides by is not treated as a constant: its gradient reaches A and B",
        source="DoRA, arXiv 2402.09353, section 4.3 (the norm is to be detached from the gradient graph)",
        cause="dora-norm",
        where=Where("gradient", r"base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_[AB]\.weight"),
        edits={
            "jax": (
                Edit("jaxtrain.methods.dora:DoRALinear._norms", "lax.stop_gradient(__norms)", "__norms"),
            ),
            "torch": (
                Edit("torchtrain.methods.dora:Magnitude", "torch.no_grad()", "torch.enable_grad()"),
                Edit("torchtrain.methods.dora:_Variant.forward", "torch.no_grad()", "torch.enable_grad()"),
            ),
        },
        setup="dora",
    ),
    Fault(
        name="dora-norm-of-the-base",
        imitates="the norm is that of W, not of W + scale B A",
        source="DoRA, arXiv 2402.09353, equation 5 (the direction is W + B A over its own norm)",
        cause="dora-norm",
        where=at_point("query"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.dora:DoRALinear._norms",
                    "__weight + self.scale * (__a @ __b)",
                    "__weight",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.dora:Magnitude._norms",
                    "__weight.to(__dtype) + __product",
                    "__weight.to(__dtype)",
                ),
            ),
        },
        setup="dora",
    ),
    Fault(
        name="frozen-weight-trained",
        imitates="LoRA trains the last norm as well",
        source="huggingface/diffusers#2245, #4687",
        cause="extra-trained",
        where=Where("grad_norm", "grad_norm"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.step:init_state",
                    "{native_name(__p)[0] for __p in __table}",
                    '__it | {"norm.scale"}',
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.low_rank:replace_targets",
                    "inject_adapter_in_model(__config, __model, adapter_name=__name)",
                    "__it\n__model.model.norm.weight.requires_grad_()",
                ),
                Edit(
                    "torchtrain.step:_optimizer",
                    "__run.trained",
                    "__run.full_table",
                ),
                Edit(
                    "torchtrain.step:init_state",
                    "{__p.name for __p in __run.trained}",
                    '__it | {"model.norm.weight"}',
                ),
            ),
        },
        setup="adapter",
        note="a trace holds the gradients of what the recipe trains: the extra one shows in their norm",
    ),
    Fault(
        name="start-transposed",
        imitates="a square weight is loaded transposed",
        source="vllm-project/vllm#44113 (square weights, silently)",
        cause="weight-layout",
        where=Where("initial", SQUARE.replace(".", r"\."), 0),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.weights:_native_shard",
                    "__weight.T if __is_transposed else __weight",
                    f'__weight.T if __is_transposed and param.name != "{SQUARE}" else __weight',
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.weights:_read",
                    "weight[pieces[0][1]]",
                    f'(weight[everything(param.shape)].T.copy() if param.name == "{SQUARE}" else weight)[pieces[0][1]]',
                ),
            ),
        },
    ),
    Fault(
        name="remat-redraws-dropout",
        imitates="the recomputed forward pass draws another dropout mask",
        source="allenai/OLMo-core#828, pytorch/pytorch#14253",
        cause="recomputed-dropout",
        where=Where("gradient", r"base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_[AB]\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.blocks.block",
                    "__y, __seen = nnx.merge(__layer, __weights)(__x, __cos, __sin, __mask, __point, __prefix)",
                    "from parity.faults.substitutes.jax_remat import redrawn\n"
                    "layer = nnx.merge(__layer, __weights)\n"
                    "__y = redrawn(lambda p: layer(__x, __cos, __sin, __mask, p, __prefix)[0], __point)\n"
                    "__seen = None",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.dropout:CounterDropout.forward",
                    "__point.step",
                    "__point.step + (torch._C._current_graph_task_id() != -1)",  # in a backward pass
                ),
            ),
        },
        setup="remat",
    ),
)
