"""Faults of methods and starting weights: LoRA's parts, adapters, what is frozen, what a run starts from."""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.plant import Edit

JAX, TORCH, TABLE = "jaxtrain.methods", "torchtrain.methods", "trainspec.methods"
ADAPTER, TORCH_ADAPTER = "jaxtrain.adapter", "torchtrain.adapter"
FIRST_ATTENTION = Where("activation", r"layers\.0\.attention")
SCALE = "method.scale, method.dropout"
DROPPED = "dropped = x if point is None or self.rate == 0 else self._dropout(x, point)"
A_PRODUCT = "matmul(dropped, self.lora_a.get_value())"
B_PRODUCT = "matmul(low, self.lora_b.get_value())"
TORCH_DROPOUT = (
    "layer.lora_dropout[_ADAPTER] = CounterDropout(module, seed=seed, rate=method.dropout, point=point)"
)
TORCH_MASKS = "torchtrain.dropout"
SQUARE = "model.layers.0.self_attn.v_proj.weight"  # the right shape when transposed
STARTS_SWAPPED = (
    Edit(TABLE, '("rank", in_axis), UniformFanIn(in_size))', '("rank", in_axis), Zeros())'),
    Edit(TABLE, '(out_axis, "rank"), Zeros())', '(out_axis, "rank"), UniformFanIn(in_size))'),
)
TARGET_MISSED = Edit(
    TABLE,
    "return tuple(m for m in linear if any(_is_tail(t, m) for t in method.targets))",
    "return tuple(m for m in linear if any(_is_tail(t, m) for t in method.targets))[:-1]",
)


def torch_dropout_behind(matrix: str) -> tuple[Edit, ...]:
    """PEFT's layer with its dropout on what `matrix` gives out."""
    return (
        Edit(
            TORCH,
            TORCH_DROPOUT,
            TORCH_DROPOUT.replace("layer.lora_dropout[_ADAPTER]", "drop")
            + "\n        layer.lora_dropout[_ADAPTER] = nn.Identity()"
            f"\n        layer.{matrix}[_ADAPTER].register_forward_hook(lambda _, __, y, drop=drop: drop(y))",
        ),
    )


FAULTS = (
    Fault(
        name="lora-scale-missing",
        imitates="B A x is added without alpha / rank",
        source="ml-explore/mlx-examples#623, AI-Hypercomputer/maxtext#3376",
        where=FIRST_ATTENTION,
        jax=(Edit(JAX, SCALE, "1.0, method.dropout"),),
        torch=(Edit(TORCH, "lora_alpha=method.alpha,", "lora_alpha=method.rank,"),),
        setup="adapter",
    ),
    Fault(
        name="lora-scale-of-rslora",
        imitates="alpha / sqrt(rank) where the adapter says alpha / rank",
        source="NVIDIA/TensorRT-LLM#1668; rsLoRA, arXiv 2312.03732",
        where=FIRST_ATTENTION,
        jax=(Edit(JAX, SCALE, "method.alpha / method.rank**0.5, method.dropout"),),
        torch=(Edit(TORCH, "use_rslora=method.rslora,", "use_rslora=True,"),),
        setup="adapter",
    ),
    Fault(
        name="lora-starts-swapped",
        imitates="A starts at zero and B at random",
        source="microsoft/LoRA#155, #76",
        where=Where(
            "initial", r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_[AB]\.weight", 0
        ),
        jax=STARTS_SWAPPED,
        torch=STARTS_SWAPPED,
        setup="lora",
    ),
    Fault(
        name="lora-dropout-behind-a",
        imitates="dropout on A x, not on x",
        source="paiml/aprender#2170, axolotl-ai-cloud/axolotl#3528",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                JAX,
                DROPPED,
                "low = matmul(x, self.lora_a.get_value())\n"
                "        dropped = low if point is None or self.rate == 0 else self._dropout(low, point)",
            ),
            Edit(JAX, A_PRODUCT, "dropped"),
        ),
        torch=torch_dropout_behind("lora_A"),
        setup="adapter",
    ),
    Fault(
        name="lora-dropout-on-output",
        imitates="dropout on B A x, not on x",
        source="axolotl-ai-cloud/axolotl#3528, huggingface/peft#1178",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                JAX,
                DROPPED,
                "low = matmul(matmul(x, self.lora_a.get_value()), self.lora_b.get_value())\n"
                "        dropped = low if point is None or self.rate == 0 else self._dropout(low, point)",
            ),
            Edit(JAX, A_PRODUCT, "dropped"),
            Edit(JAX, B_PRODUCT, "low"),
        ),
        torch=torch_dropout_behind("lora_B"),
        setup="adapter",
    ),
    Fault(
        name="lora-dropout-seed",
        imitates="dropout is drawn from another seed",
        source="NVIDIA-NeMo/Megatron-Bridge#5257 (one draw too many)",
        where=FIRST_ATTENTION,
        jax=(Edit(JAX, 'seed, "dropout", target', 'seed + 1, "dropout", target'),),
        torch=(
            Edit(TORCH_MASKS, 'name_key(seed, "dropout", module)', 'name_key(seed + 1, "dropout", module)'),
        ),
        setup="adapter",
    ),
    Fault(
        name="lora-target-missed",
        imitates="one target module gets no adapter",
        source="NVIDIA-NeMo/Megatron-Bridge#1738, huggingface/peft#3554",
        where=Where("initial", r"base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_[AB]\.weight", 0),
        jax=(TARGET_MISSED,),
        torch=(TARGET_MISSED,),
        setup="lora",
    ),
    Fault(
        name="adapter-behind-the-residual",
        imitates="the adapter behind the MLP is given the residual stream, with what the MLP adds to it",
        source="google-research/adapter-bert#7, adapter-hub/adapters#95; arXiv 1902.00751, figure 2",
        where=Where("activation", r"layers\.0\.mlp"),
        jax=(
            Edit(
                "jaxtrain.model",
                "inner = self.mlp_adapter(inner)",
                "inner = self.mlp_adapter(x_BSE + inner) - x_BSE",
            ),
        ),
        torch=(
            Edit(
                TORCH_ADAPTER,
                '_put_behind(layer, layer.mlp, "mlp_adapter"',
                '_put_behind(layer, layer, "mlp_adapter"',
            ),
        ),
        setup="bottleneck",
    ),
    Fault(
        name="adapter-without-non-linearity",
        imitates="nothing stands between the adapter's two matrices, which makes them one",
        source="thuml/Universal-Domain-Adaptation#7; arXiv 1902.00751, figure 2",
        where=FIRST_ATTENTION,
        jax=(
            Edit(
                ADAPTER,
                "_act(self.activation, down.astype(wide(down.dtype))).astype(down.dtype)",
                "down",
            ),
        ),
        torch=(Edit(TORCH_ADAPTER, "self.up(self._act(self.down(h_BSE)))", "self.up(self.down(h_BSE))"),),
        setup="bottleneck",
    ),
    Fault(
        name="frozen-weight-trained",
        imitates="LoRA trains the last norm as well",
        source="huggingface/diffusers#2245, #4687",
        where=Where("grad_norm", "grad_norm"),
        jax=(
            Edit(
                "jaxtrain.step",
                "trained = {native_name(p)[0] for p in trainable_table(spec, recipe.method)}",
                'trained = {native_name(p)[0] for p in trainable_table(spec, recipe.method)} | {"norm.scale"}',
            ),
        ),
        torch=(
            Edit(
                TORCH,
                "inject_adapter_in_model(config, model, adapter_name=_ADAPTER)",
                "inject_adapter_in_model(config, model, adapter_name=_ADAPTER)\n"
                "    model.model.norm.weight.requires_grad_()",
            ),
            Edit(
                "torchtrain.step",
                "decays = {p.name: p.decay for p in trainable_table(spec, recipe.method)}",
                "decays = {p.name: p.decay for p in full_table(spec, recipe.method)}",
            ),
        ),
        setup="adapter",
        note="a trace holds the gradients of what the recipe trains: the stranger shows in their norm",
    ),
    Fault(
        name="start-transposed",
        imitates="a square weight is loaded transposed",
        source="vllm-project/vllm#44113 (square weights, silently)",
        where=Where("initial", SQUARE.replace(".", r"\."), 0),
        jax=(
            Edit(
                "jaxtrain.weights",
                "placed = array.T if name.endswith(TRANSPOSED) else array",
                f'placed = array.T if name.endswith(TRANSPOSED) and param.name != "{SQUARE}" else array',
            ),
        ),
        torch=(
            Edit(
                "torchtrain.weights",
                "torch.from_numpy(array)",
                f'torch.from_numpy(array.T.copy() if param.name == "{SQUARE}" else array)',
            ),
        ),
    ),
    Fault(
        name="remat-redraws-dropout",
        imitates="the recomputed forward pass draws another dropout mask",
        source="allenai/OLMo-core#828, pytorch/pytorch#14253",
        where=Where("gradient", r"base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_[AB]\.weight"),
        jax=(
            Edit(
                "jaxtrain.model",
                "x_BSE: Array, layer: tuple[nnx.State, Probes, Array | None]\n",
                "x_BSE, layer, point=point\n",
            ),
            # The value is the first pass's, the gradient the second one's.
            Edit(
                "jaxtrain.model",
                "block = jax.checkpoint(block, prevent_cse=False)",
                "once, later = block, point and point._replace(step=point.step + 1)\n\n"
                "            def block(x_BSE, layer):\n"
                "                (y, seen), (z, _) = once(x_BSE, layer), once(x_BSE, layer, later)\n"
                "                return lax.stop_gradient(y) + (z - lax.stop_gradient(z)), seen\n",
            ),
        ),
        torch=(
            Edit(
                TORCH_MASKS,
                "step=self._point.step,",
                "step=self._point.step + (torch._C._current_graph_task_id() != -1),  # in a backward pass",
            ),
        ),
        setup="remat",
    ),
)
