"""What families share in reading and writing a `config.json`.

Settings that transformers honours are honoured or refused by name; where two contradict, a note says which one counts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from trainspec.errors import ModelError
from trainspec.model import ModelSpec
from trainspec.rope import Positive, RopeFields, Size, rope_notes

LONGEST = 120  # characters of a wrong value in a message
# A bound for the table of weights, which has entries for every layer. The deepest Llama, 3.1 405B, has 126.
Layers = Annotated[int, Field(ge=1, le=10_000)]
# Settings that transformers honours and we do not, with the way out.
REFUSED = {
    "quantization_config": "quantized weights are not trained; give the model that they were made from",
    "per_layer_config": "layers of different sizes are not trained",
    "transformers_weights": "weights under another name are not read; rename the file to model.safetensors",
}
# Settings that may be null in old files, which means their default; transformers 5 refuses null.
SWITCHES = (
    "tie_word_embeddings", "rope_theta", "original_max_position_embeddings", "attention_bias", "mlp_bias",
)  # fmt: skip


class DecoderFields(RopeFields):
    """The fields that determine a decoder's arithmetic, validated; other fields are ignored."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    # Settings of unsupported arithmetic must have the value that leaves it out.
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_dropout: Annotated[float, Field(ge=0, le=0)] | None = None
    is_causal: Literal[True] = True

    def spec(self, family: str, *, name: str, where: str) -> ModelSpec:
        """The spec of these fields. Raises ModelError where they contradict one another."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        head_dim = self.head_dim or self.hidden_size // heads
        if heads % kv_heads:
            raise ModelError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        theta, scaling, share = self.rope(where)
        if head_dim % 2 and share == 1:
            raise ModelError(f"{where}: head_dim {head_dim} is odd; rotary embedding turns pairs")
        turned = int(head_dim * share)
        if turned % 2 or not 0 < turned <= head_dim:
            raise ModelError(
                f"{where}: partial_rotary_factor {share:g} turns {turned} of the {head_dim} elements of a head; it must be "
                "an even number of them"
            )
        return ModelSpec(
            name=name,
            vocab=self.vocab_size,
            embed=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=self.intermediate_size,
            norm_eps=self.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=self.max_position_embeddings,
            tied_embeddings=bool(self.tie_word_embeddings),
            attention_bias=bool(self.attention_bias),
            mlp_bias=bool(self.mlp_bias),
            init_std=self.initializer_range,
            family=family,
            rotary_share=share,
        )


F = TypeVar("F", bound=RopeFields)


def validated_fields(fields: type[F], config: dict[str, Any], where: str) -> F:
    """The fields of a `config.json`. Raises ModelError for what is malformed or unsupported."""
    for key, reason in REFUSED.items():
        if config.get(key):
            raise ModelError(f"{where}: {key} is unsupported: {reason}")
    given = {key: value for key, value in config.items() if value is not None or key not in SWITCHES}
    try:
        return fields.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"] if isinstance(part, str))
        value = "null" if detail["input"] is None else format_setting(detail["input"])
        got = "" if detail["type"] == "missing" else f", not {value}"
        raise ModelError(f"{where}: {key}: {detail['msg'][0].lower()}{detail['msg'][1:]}{got}") from None


def format_setting(value: object) -> str:
    """A value of a setting for a message, cut to LONGEST characters."""
    words = "not given" if value is None else repr(value)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


def decoder_notes(config: dict[str, Any], fields: DecoderFields, *, title: str, where: str) -> list[str]:
    """One sentence for each setting that differs from what is trained."""
    notes = rope_notes(config, fields, title=title, where=where)
    if config.get("auto_map"):
        notes.append(
            f"auto_map names code of the model's own, which is not run: the model is trained as a {title}"
        )
    pad = config.get("pad_token_id")
    if _is_out_of_range(pad, fields.vocab_size):
        notes.append(
            f"pad_token_id {pad} is beyond the {fields.vocab_size} rows of the embedding, where transformers cannot load the "
            "model; it is not used, and an export leaves it out"
        )
    return notes


def _is_out_of_range(token: object, vocab: int) -> bool:
    return isinstance(token, int) and not -vocab <= token < vocab


def export_config(
    config: dict[str, Any], model: ModelSpec, *, fields: type[DecoderFields] = DecoderFields
) -> dict[str, Any]:
    """`config` for the weights of `model`: unchanged except for nulls and for settings that contradict the spec.

    `fields` have the defaults of what is absent.
    """
    kept = {key: value for key, value in config.items() if value is not None or key not in SWITCHES}
    for key in ("rope_parameters", "rope_scaling"):
        rope = kept.get(key)
        if isinstance(rope, dict):
            kept[key] = {name: value for name, value in rope.items() if value is not None}
    if "rope_theta" in kept:
        kept["rope_theta"] = model.rope_theta
    is_tied = kept.get("tie_word_embeddings", fields.model_fields["tie_word_embeddings"].default)
    if bool(is_tied) != model.tied_embeddings:
        kept["tie_word_embeddings"] = model.tied_embeddings
    if _is_out_of_range(kept.get("pad_token_id"), model.vocab):
        del kept["pad_token_id"]
    return kept
