"""Faults of generation: caches, padding, what is drawn, what ends a response. `parity generate` must catch each at its token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from parity.faults.fault import in_every_backend
from parity.runs.edit import Edit
from parity.runs.fixture import METHODS, TinySetup
from trainspec.plans.names import Backend
from trainspec.recipe import Recipe

# Where a fault must show first. `first token`: what the pass over the prompts gives. `second token`: the first that is decoded.
# `draw`: where another token is drawn, with the log-probabilities of before and there all right. `end`: where a response ends.
Stage = Literal["first token", "second token", "draw", "end"]
SETUPS: dict[str, str] = {
    "greedy": "the most probable token, prompts of several lengths at once",
    "drawn": "tokens drawn at temperature 0.7",
    "adapter": "the most probable token, with a LoRA adapter that is not zero",
    "prefix": "the most probable token, after three keys and values before every layer's own",
}
_METHODS = {"adapter": "lora", "prefix": "prefix"}
WORDS: dict[str, tuple[str, ...]] = {"drawn": ("--temperature", "0.7", "--seed", "5")}


@dataclass(frozen=True, kw_only=True)
class DecodingFault:
    """A mistake of generation, as edits of each backend's source.

    `stage` is where it must show first, in the side that has it alone (a response that ends names both). `without_cache` and `alone`
    say whether the side must agree on whole rows (`--no-cache`), and one prompt at a time (`--batch 1`).
    """

    name: str
    imitates: str
    source: str
    stage: Stage
    without_cache: bool
    alone: bool
    edits: Mapping[Backend, tuple[Edit, ...]] = field(hash=False)
    setup: str = "greedy"


def decoding_recipe(tiny: TinySetup, setup: str) -> Recipe:
    """The recipe of a set-up, in fp64."""
    name = _METHODS.get(setup)
    sections: dict[str, Any] = {"precision": {"policy": "fp64", "reduce": "fp64"}}
    assert name is None or name in METHODS
    return tiny.recipe("plain", **sections | ({"method": tiny.method(name)} if name else {}))


FAULTS = (
    DecodingFault(
        name="cache-position-off-by-one",
        imitates="a decoded token is rotated as if it stood one position further on than its row is long",
        source="skyzh/tiny-llm#46 (the offset of the cache), rasbt/reasoning-from-scratch#33",
        stage="second token",
        without_cache=True,
        alone=False,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.extend",
                    'jnp.take_along_axis(__positions, __places, axis=1, mode="clip")',
                    "__it + 1",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.decoding:CachedRows.extend",
                    "self._last_B + position_shift(__method)",
                    "__it + 1",
                ),
            ),
        },
    ),
    DecodingFault(
        name="padding-attended-in-decoding",
        imitates="a decoded token attends to the padding of its shorter row, which the pass over the prompts masks",
        source="OpenNMT/OpenNMT-py#2532, huggingface/transformers#30670, TransformerLensOrg/TransformerLens#1005",
        stage="second token",
        without_cache=True,
        alone=True,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.extend",
                    "self.visible(__positions, __segments, prefix=__prefix).mask(__places)[:, 0]",
                    "__it | (jnp.arange(__prefix + __positions.shape[1]) < __prefix + __places.max())",
                ),
            ),
            "torch": (
                Edit("torchtrain.attention.cache:one_token", "__before < 0", "np.zeros_like(__before, bool)"),
            ),
        },
    ),
    DecodingFault(
        name="prefix-lost-after-prefill",
        imitates="the keys and values of prefix tuning are there in the pass over the prompts, and not in decoding",
        source="XiangLi1999/PrefixTuning#37; huggingface/peft#869",
        stage="second token",
        without_cache=True,
        alone=False,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.extend",
                    "self.visible(__positions, __segments, prefix=__prefix).mask(__places)[:, 0]",
                    "__it & (jnp.arange(__prefix + __positions.shape[1]) >= __prefix)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.attention.cache:Cache.fill",
                    "",
                    "k_BKXD, v_BKXD = k_BKXD.clone(), v_BKXD.clone()\nk_BKXD[:, :, :3] = v_BKXD[:, :, :3] = 0",
                ),
            ),
        },
        setup="prefix",
    ),
    DecodingFault(
        name="kv-heads-interleaved-in-decoding",
        imitates="a decoded token's query heads take the kv heads in turn (repeat) and not in groups (repeat_interleave)",
        source="onnx/onnx#7274 (Tile), apple/axlearn#842",
        stage="second token",
        without_cache=True,
        alone=False,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.attention.one_token:attend",
                    "q_B1HD.reshape(__rows, __heads, -1, __size)",
                    "q_B1HD.reshape(__rows, -1, __heads, __size).swapaxes(1, 2)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.attention.cache:attend",
                    "q_BH1D.reshape(__rows, __heads, __group, __size)",
                    "q_BH1D.reshape(__rows, __group, __heads, __size).transpose(1, 2)",
                ),
            ),
        },
    ),
    DecodingFault(
        name="logits-of-the-last-column",
        imitates="the first token of every row comes from the last column of the batch, which is padding in shorter rows",
        source="huggingface/transformers#3167, unslothai/unsloth#772",
        stage="first token",
        without_cache=False,
        alone=True,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoding:CachedPrograms._begin",
                    "last_B + self._leading",
                    "jnp.full_like(last_B, last_B.max()) + self._leading",
                ),
                Edit(
                    "jaxtrain.program:Program._next_logits",
                    "last_B + leading_positions(__method)",
                    "jnp.full_like(last_B, last_B.max()) + leading_positions(__method)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_next_logits.expect",
                    "last[__rows]",
                    "np.full_like(last[__rows], last.max())",
                ),
            ),
        },
    ),
    DecodingFault(
        name="adapter-not-applied",
        imitates="the base model answers: the adapter is loaded and never active",
        source="huggingface/peft#515, unslothai/unsloth#2009",
        stage="first token",
        without_cache=False,
        alone=False,
        edits={
            "jax": (Edit("jaxtrain.methods.lora:LoRALinear.__init__", "__method.scale", "0.0"),),
            "torch": (
                Edit(
                    "torchtrain.methods.low_rank:replace_targets",
                    "layers.append(__layer)",
                    "layers.append(__layer) or setattr(__layer, '_disable_adapters', True)",
                ),
            ),
        },
        setup="adapter",
    ),
    DecodingFault(
        name="temperature-applied-twice",
        imitates="logits are divided by the temperature, and again before the draw",
        source="Adibvafa/CodonTransformer#20",
        stage="draw",
        without_cache=False,
        alone=False,
        edits=in_every_backend(
            Edit(
                "trainspec.generation.choice:probabilities",
                "__scores / __sampling.temperature",
                "__scores / __sampling.temperature / __sampling.temperature",
            )
        ),
        setup="drawn",
    ),
    DecodingFault(
        name="draw-follows-the-row",
        imitates="the generator is that of a row of the batch and not of the prompt, so answers change with the batch size",
        source="vllm-project/vllm#51226: what is drawn for a request depends on the others of its batch",
        stage="draw",
        without_cache=False,
        alone=False,
        edits=in_every_backend(
            Edit(
                "trainspec.generation.responder:Responder._batch",
                "__first + row",
                "row",
            )
        ),
        setup="drawn",
    ),
    DecodingFault(
        name="stop-token-not-stopped-at",
        imitates="a response goes on after its end token, up to the longest",
        source="ollama/ollama#3759, intel/ipex-llm#10815",
        stage="end",
        without_cache=False,
        alone=False,
        edits=in_every_backend(
            Edit("trainspec.generation.responder:Responder._end", "__response.ids[-1] in self.stops", "False")
        ),
        setup="drawn",
    ),
    DecodingFault(
        name="only-the-first-end-token",
        imitates="of a list of end tokens in generation_config.json the first alone is read",
        source="Blaizzy/mlx-vlm#309, vllm-project/vllm#4180",
        stage="end",
        without_cache=False,
        alone=False,
        edits=in_every_backend(
            Edit("trainspec.files.hf:end_tokens", "frozenset(known)", "frozenset(known[:1])")
        ),
        setup="drawn",
    ),
)
