"""Adapter directories: PEFT's, and our own where PEFT has no format (docs/adapter-files.md).

    adapter_config.json            the method's settings, in PEFT's words
    adapter_model.safetensors      the weights: PEFT's names, or for a bottleneck adapter the table's
    config.json, model.safetensors for a prefix of `positions: from_zero`: as ChatGLM2's training script leaves them
    prompt_encoder.safetensors     the weights of the encoder that makes virtual tokens, by canonical name: PEFT's file
                                   has only the encoder's output, from which training cannot resume

The method decides what is in the files (`trainspec.methods`). A directory is written under a temporary name, read back,
and only then replaces an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike

from trainspec.errors import WeightsError
from trainspec.files.hf import (
    TensorFiles,
    copy_tokenizer,
    read_entries,
    refuse_non_finite,
    replaced_directory,
    write_finite,
)
from trainspec.files.weight_files import convert
from trainspec.methods import MethodSpec
from trainspec.methods.method import Weights
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.weight import Weight


def write_adapter(
    directory: Path,
    weights: Weights,
    *,
    model: ModelSpec,
    method: MethodSpec,
    base: str,
    tokenizer_from: Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Write an adapter directory; PEFT's methods load with `PeftModel.from_pretrained`. `base` is the model it belongs to.

    It gets a copy of the tokenizer, as with Hugging Face's Trainer, with `chat_template` in place of its own.
    Raises WeightsError, with an earlier directory untouched, where one of the method's weights is missing, misshapen, empty
    or not finite, or the files do not read back as written.
    """
    table = method.table(model)
    for param in table:
        if param.name not in weights or weights[param.name].shape != param.shape:
            shape = list(weights[param.name].shape) if param.name in weights else "missing"
            raise WeightsError(
                f"{directory}: {param.name} is {shape}, it should have shape {list(param.shape)}; nothing was written"
            )
    refuse_non_finite(weights, directory)
    files = method.files({param.name: weights[param.name] for param in table})
    config = method.adapter_config(model) | {"base_model_name_or_path": base}
    with replaced_directory(directory) as temporary:
        copy_tokenizer(tokenizer_from, temporary, chat_template=chat_template)
        (temporary / method.settings_file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, tensors in files.items():
            write_finite(tensors, temporary / name, where=directory)  # an encoder's output may overflow


def read_adapter(
    directory: Path, model: ModelSpec, method: MethodSpec, table: Sequence[Param], *, dtype: DTypeLike
) -> Iterator[tuple[Param, Weight]]:
    """The weights of an adapter, by the entries of the method's `table`.

    Raises WeightsError, before the first read, where its settings are not those of `method` or its tensors do not fit.
    """
    config = _read_config(directory, method)
    method.check_peft_config(config, directory=directory, model=model)
    return method.read(_Files(directory, method.weights_file), table, dtype=dtype)


class _Files:
    """An adapter directory as a method reads it: a `trainspec.methods.AdapterFiles`."""

    def __init__(self, directory: Path, weights_file: str) -> None:
        path = directory / weights_file
        for older in ("adapter_model.bin", "pytorch_model.bin"):
            if (directory / older).is_file() and not path.is_file():
                raise WeightsError(
                    f"{directory / older}: is not supported, only {weights_file} is; {convert(directory)}"
                )
        self.directory, self.tensors = directory, TensorFiles([path])

    def entries(
        self, table: Sequence[Param], *, dtype: DTypeLike, file: str | None = None
    ) -> Iterator[tuple[Param, Weight]]:
        """The weight of each entry of `table`, from the weights' file or `file`."""
        if file is None:
            return read_entries(self.tensors, table, dtype=dtype, where=self.directory)
        path = self.directory / file
        return read_entries(TensorFiles([path]), table, dtype=dtype, where=path)


def _read_config(directory: Path, method: MethodSpec) -> dict[str, Any]:
    path = directory / method.settings_file
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        way_out = method.missing_settings(directory)
        raise WeightsError(f"method.adapter: {path}: missing; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"method.adapter: {path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"method.adapter: {path}: not a JSON object")
    return config
