"""Adapter directories: PEFT's, and our own where PEFT has no format (docs/adapter-files.md).

    adapter_config.json            the method's settings, in PEFT's words
    adapter_model.safetensors      the weights: PEFT's names, or for a bottleneck adapter the table's
    prompt_encoder.safetensors     rows of the encoder behind virtual tokens, by canonical name: PEFT's file has only
                                   what the encoder gives, from which training cannot go on

A directory is written beside its place, read back, and only then takes the place of an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainspec.encoders import encode, has_encoder
from trainspec.errors import RecipeError, WeightsError
from trainspec.hf import (
    TensorFiles,
    check_reads_back,
    copy_tokenizer,
    read_rows,
    refuse_non_finite,
    replaced_directory,
)
from trainspec.methods import (
    ENCODER,
    LSTM_LAYERS,
    Adapter,
    Full,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Virtual,
    adapter_table,
    target_modules,
)
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.tensors import save_tensors
from trainspec.weight import Weight

Arrays = Mapping[str, NDArray[Any]]
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ENCODER_FILE = "prompt_encoder.safetensors"
# PEFT's name for what virtual tokens are.
VIRTUAL_ROWS = "prompt_embeddings"
# In place of PEFT's types, for what it does not have.
BOTTLENECK = "TWINTRAIN_BOTTLENECK"
FORMAT = 1
# PEFT's settings under which its LoRA is y = W x + (alpha / r) B A dropout(x), and nothing else is changed.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}


def adapter_files(method: Method, weights: Arrays) -> dict[str, dict[str, NDArray[Any]]]:
    """The tensors of each safetensors file of an adapter, of the method's rows by canonical name."""
    if not isinstance(method, Virtual):
        return {ADAPTER_FILE: dict(weights)}
    stored = weights[f"{ENCODER}.embedding.weight"].dtype
    files = {ADAPTER_FILE: {VIRTUAL_ROWS: encode(method, weights).astype(stored)}}
    return files | {ENCODER_FILE: dict(weights)} if has_encoder(method) else files


def adapter_size(model: ModelSpec, method: Method) -> int:
    """How many numbers the adapter's file has; of virtual tokens what an encoder gives, not the encoder."""
    match method:
        case PromptTuning() | PTuning():
            return method.virtual_tokens * model.embed
        case PrefixTuning():
            return method.virtual_tokens * 2 * model.layers * model.kv_heads * model.head_dim
        case _:
            return sum(p.size for p in adapter_table(model, method))


def write_adapter(
    directory: Path,
    weights: Arrays,
    *,
    model: ModelSpec,
    method: Method,
    base: str,
    tokenizer_from: Path | None = None,
    chat_template: str | None = None,
) -> None:
    """An adapter directory; PEFT's methods load with `PeftModel.from_pretrained`. `base` is the model it belongs to.

    The tokenizer stands beside it, as Hugging Face's Trainer has it, with `chat_template` in place of its own.

    Raises WeightsError, and leaves what was there, where one of the method's rows is missing, misshapen, empty or not finite,
    or the files do not read back as written.
    """
    table = adapter_table(model, method)
    for param in table:
        if param.name not in weights or weights[param.name].shape != param.shape:
            shape = list(weights[param.name].shape) if param.name in weights else "missing"
            raise WeightsError(
                f"{directory}: {param.name} is {shape}, it should have shape {list(param.shape)}; nothing was written"
            )
    refuse_non_finite(weights, directory)
    files = adapter_files(method, {param.name: weights[param.name] for param in table})
    for tensors in files.values():  # what an encoder gives
        refuse_non_finite(tensors, directory)
    config = _config_of(model, method) | {"base_model_name_or_path": base}
    with replaced_directory(directory) as temporary:
        copy_tokenizer(tokenizer_from, temporary, chat_template=chat_template)
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, tensors in files.items():
            save_tensors(tensors, temporary / name, metadata={"format": "pt"})
            check_reads_back(tensors, temporary / name)


def _config_of(model: ModelSpec, method: Method) -> dict[str, Any]:
    """`adapter_config.json` but for the base model: PEFT's keys and words."""
    match method:
        case LoRA():
            return {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": method.rank,
                "lora_alpha": int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,
                "lora_dropout": method.dropout,
                "use_rslora": method.rslora,
                "target_modules": list(target_modules(model, method)),
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            }
        case Adapter():
            return {
                "peft_type": BOTTLENECK,
                "format": FORMAT,
                "bottleneck": method.bottleneck,
                "activation": method.activation,
                "num_layers": model.layers,
                "token_dim": model.embed,
            }
        case PromptTuning():
            return _prompt_config(model, method) | {
                "peft_type": "PROMPT_TUNING",
                "prompt_tuning_init": "RANDOM",
            }
        case PTuning():
            return _prompt_config(model, method) | {
                "peft_type": "P_TUNING",
                "encoder_reparameterization_type": method.encoder.upper(),
                "encoder_hidden_size": method.hidden or model.embed,
                "encoder_num_layers": LSTM_LAYERS,
                "encoder_dropout": method.dropout,
            }
        case PrefixTuning():
            width = model.kv_heads * model.head_dim
            return _prompt_config(model, method) | {
                "peft_type": "PREFIX_TUNING",
                "token_dim": width,
                "num_attention_heads": model.kv_heads,
                "prefix_projection": method.projection,
                "encoder_hidden_size": method.hidden or width,
            }
        case Full():
            raise RecipeError("method.kind=full has no adapter; its weights are the model")


def _prompt_config(model: ModelSpec, method: Virtual) -> dict[str, Any]:
    """What PEFT's methods with virtual tokens have in common."""
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": method.virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.layers,
        "token_dim": model.embed,
        "num_attention_heads": model.heads,
        "inference_mode": True,
    }


def read_adapter(
    directory: Path, model: ModelSpec, method: Method, table: Sequence[Param], *, dtype: DTypeLike
) -> Iterator[tuple[Param, Weight]]:
    """An adapter, row by row of the method's `table`, after checking that its settings are those of `method`.

    Raises WeightsError before the first read.
    """
    config = _read_config(directory)
    match method:
        case LoRA():
            _check_lora(directory, config, method)
        case Adapter():
            _check_type(directory, config, method, (BOTTLENECK,))
            if config.get("format") != FORMAT:
                raise WeightsError(
                    f"{directory}: format {config.get('format')} of {BOTTLENECK}; this twintrain reads {FORMAT}"
                )
            _check_setting(directory, config, method, "bottleneck", method.bottleneck)
            _check_setting(directory, config, method, "activation", method.activation)
        case PromptTuning() | PTuning() | PrefixTuning():
            return _read_virtual(directory, config, model, method, table, dtype)
        case Full():
            raise RecipeError("method.kind=full starts from the model's weights, not from an adapter")
    return read_rows(_adapter_tensors(directory), table, dtype=dtype, where=directory)


def _adapter_tensors(directory: Path) -> TensorFiles:
    path, older = directory / ADAPTER_FILE, directory / "adapter_model.bin"
    if older.is_file() and not path.is_file():
        raise WeightsError(
            f"{older}: is not read, only {ADAPTER_FILE} is; convert it: python -c "
            f'"from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    return TensorFiles([path])


def _read_virtual(
    directory: Path,
    config: dict[str, Any],
    model: ModelSpec,
    method: Virtual,
    table: Sequence[Param],
    dtype: DTypeLike,
) -> Iterator[tuple[Param, Weight]]:
    match method:
        case PromptTuning():
            # Without its encoder P-tuning is prompt tuning.
            _check_type(directory, config, method, ("PROMPT_TUNING", "P_TUNING"))
        case PTuning():
            _check_type(directory, config, method, ("P_TUNING",))
            kind = method.encoder.upper()
            _check_setting(
                directory, config, method, "encoder_reparameterization_type", kind, field="encoder"
            )
        case PrefixTuning():
            _check_type(directory, config, method, ("PREFIX_TUNING",))
            for key, mine, word in (
                ("num_layers", model.layers, "layers"),
                ("num_attention_heads", model.kv_heads, "kv heads"),
            ):
                if not _is_equal(config.get(key), mine):
                    raise WeightsError(
                        f"{directory}: {key}={config.get(key)}, {model.name} has {mine} {word}; it is another model's"
                    )
    _check_setting(
        directory, config, method, "num_virtual_tokens", method.virtual_tokens, field="virtual_tokens"
    )
    given = _adapter_tensors(directory)
    unexpected = sorted(set(given.shapes) - {VIRTUAL_ROWS})
    if unexpected:
        raise WeightsError(f"{directory / ADAPTER_FILE}: {unexpected[0]} is unexpected; of virtual tokens it holds {VIRTUAL_ROWS} alone")  # fmt: skip
    if has_encoder(method):
        return _read_encoder(directory, method, table, given, dtype)
    (row,) = table
    found = given.shapes.get(VIRTUAL_ROWS)
    if found != row.shape:
        raise WeightsError(
            f"{directory / ADAPTER_FILE}: {VIRTUAL_ROWS} is {'missing' if found is None else list(found)}, the "
            f"configuration asks for {list(row.shape)}"
        )
    return iter([(row, given.weight(VIRTUAL_ROWS, dtype))])


def _read_encoder(
    directory: Path,
    method: Virtual,
    table: Sequence[Param],
    given: TensorFiles,
    dtype: DTypeLike,
) -> Iterator[tuple[Param, Weight]]:
    """The encoder's rows, which have to make the virtual tokens that the adapter has."""
    path = directory / ENCODER_FILE
    if not path.is_file():
        plain = "method.kind=prompt" if isinstance(method, PTuning) else "method.projection=false"
        raise WeightsError(
            f"{path}: missing, as PEFT keeps only what an encoder gives; set {plain} to go on from that"
        )
    rows = list(read_rows(TensorFiles([path]), table, dtype=np.float64, where=path))
    made = encode(method, {param.name: weight[...] for param, weight in rows})
    stored = given.read(VIRTUAL_ROWS) if VIRTUAL_ROWS in given.shapes else np.empty(0)
    # Made on another machine, the sums in float64 may have run in another order.
    room = 4 * np.finfo(stored.dtype).eps * np.abs(made).max()
    if made.shape != stored.shape or np.abs(made - stored).max() > room:
        raise WeightsError(
            f"{path}: does not make the {VIRTUAL_ROWS} of {ADAPTER_FILE}; the two are of different runs, "
            "export them again together"
        )
    return read_rows(TensorFiles([path]), table, dtype=dtype, where=path)


def _check_lora(directory: Path, config: dict[str, Any], method: LoRA) -> None:
    _check_type(directory, config, method, ("LORA",))
    for key, plain in PLAIN_LORA.items():
        if (config.get(key) or plain[0]) not in plain:
            raise WeightsError(
                f"{directory}: {key}={config[key]!r} is unsupported; it would be another method"
            )
    config = config | {"use_rslora": config.get("use_rslora") or False}  # older files do not have it
    for key, field, mine in (
        ("r", "rank", method.rank),
        ("lora_alpha", "alpha", method.alpha),
        ("use_rslora", "rslora", method.rslora),
    ):
        _check_setting(directory, config, method, key, mine, field=field)


def _check_type(directory: Path, config: dict[str, Any], method: Method, types: Sequence[str]) -> None:
    if config.get("peft_type") not in types:
        raise WeightsError(
            f"{directory}: peft_type {config.get('peft_type')!r}; method.kind={method.kind} starts from "
            f"{' or '.join(types)} only"
        )


def _check_setting(
    directory: Path,
    config: dict[str, Any],
    method: Method,
    key: str,
    mine: object,
    *,
    field: str | None = None,
) -> None:
    """Refuse a setting that is not the recipe's; `field` is the method's, where it has another name."""
    theirs = config.get(key)
    if theirs is None:
        raise WeightsError(
            f"{directory / ADAPTER_CONFIG}: no {key}; it is not a {type(method).__name__} configuration"
        )
    if type(theirs) is not type(mine) and (isinstance(mine, str | bool) or not _is_number(theirs)):
        raise WeightsError(f"{directory / ADAPTER_CONFIG}: {key} is {theirs!r:.80}, the recipe says {mine!r}")
    if theirs != mine:
        value = str(theirs).lower() if isinstance(theirs, str | bool) else theirs
        raise WeightsError(
            f"{directory}: {key}={theirs}, the recipe says {mine}; set method.{field or key}={value}"
        )


def _is_equal(theirs: object, mine: int) -> bool:
    return _is_number(theirs) and theirs == mine


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"method.adapter: {path}: missing; give an adapter directory") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"method.adapter: {path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"method.adapter: {path}: not a JSON object")
    return config
