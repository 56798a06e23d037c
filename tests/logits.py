"""Logits of many models in one process, from whoever `WHO` names.

    python tests/logits.py jaxtrain|torchtrain|transformers CASES.json OUT.npz [COMMANDS.json]

A case of a backend is {"recipe": FILE, "out": DIR}: the newest checkpoint under DIR, or with null the start of a run. One
of transformers is {"model": DIR, "adapter": DIR or null, "dtype": "float32" or "float64"}: loaded by transformers and PEFT
alone. COMMANDS are command lines of the backend ([[word, ...], ...]) that come first, and must end well. Both may have "padding": "left" or "right", which takes the last tokens of the second row away, and
"after": [id, ...], which puts tokens in front of every row. Logits are those of the rows without what is in front.
"""

import importlib
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from many import ended

ROOT = Path(__file__).parent.parent
IDS = np.random.default_rng(5).integers(3, 300, (2, 24)).astype(np.int32)
PADS = 7


def real_tokens(padding: str | None) -> np.ndarray:
    """Which of IDS are tokens: 1, or 0 for padding."""
    real = np.ones_like(IDS)
    match padding:
        case "left":
            real[1, :PADS] = 0
        case "right":
            real[1, -PADS:] = 0
    return real


def of_backend(program: str, case: dict[str, Any]) -> np.ndarray:
    from trainspec.checkpoints import checkpoint, folders
    from trainspec.data import Batch
    from trainspec.recipe import load_recipe

    step, cluster = (importlib.import_module(f"{program}.{name}") for name in ("step", "cluster"))
    recipe = load_recipe(Path(case["recipe"]))
    run = cluster.start(recipe)
    try:
        state = step.init_state(run)
        if case["out"]:
            newest = folders.latest(Path(case["out"]))
            assert newest is not None
            state = step.restore(state, checkpoint.load(newest, run))
        # As transformers numbers them where it is not told: padding in front counts.
        positions = np.broadcast_to(np.arange(IDS.shape[1], dtype=np.int32), IDS.shape)
        segments = real_tokens(case.get("padding"))
        batch = Batch(IDS, IDS, positions.copy(), segments, np.arange(len(IDS), dtype=np.int32))
        return step.logits(state, batch)
    finally:
        cluster.finish()


def of_transformers(case: dict[str, Any]) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, case["dtype"])
    if dtype == torch.float64:
        for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Glm"):
            module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
            getattr(module, f"{name}RMSNorm").forward = _norm64
            getattr(module, f"{name}RotaryEmbedding").forward = _rotary64
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, attn_implementation="sdpa")
    if case["adapter"]:
        torch.set_default_dtype(dtype)  # in which PEFT makes what it then loads into
        model = PeftModel.from_pretrained(model, case["adapter"], autocast_adapter_dtype=False)
        torch.set_default_dtype(torch.float32)
    before = np.tile(np.asarray(case.get("after") or [], np.int32), (len(IDS), 1))
    ids = torch.from_numpy(np.concatenate([before, IDS], axis=1)).long()
    # Without padding none is said: a mask would be no more than what is there.
    padding = case.get("padding")
    mask = torch.from_numpy(real_tokens(padding)).long() if padding else None
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits[:, -IDS.shape[1] :].numpy()


# Hugging Face computes these two in float32 even in a float64 model; here they are written out in float64.
def _norm64(self, x):
    return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def _rotary64(self, x, position_ids):
    import torch

    rope = self.config.rope_parameters
    size = int(self.config.head_dim * rope.get("partial_rotary_factor", 1))
    wavelength = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope["rope_type"] == "llama3":
        context, low, high = (
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        share = ((context / wavelength - low) / (high - low)).clamp(0, 1)
        wavelength = 1 / ((1 - share) / (rope["factor"] * wavelength) + share / wavelength)
    if rope["rope_type"] == "yarn":
        turns = rope["original_max_position_embeddings"] / wavelength
        log_theta, pair = np.log(rope["rope_theta"]), torch.arange(size // 2, dtype=torch.float64)
        # The pair that makes n turns: its wavelength is theta^(2 pair / size) times 2 pi.
        first, last = (
            float(-size / 2 * np.log(n / float(turns[0])) / log_theta)
            for n in (rope["beta_fast"], rope["beta_slow"])
        )
        first, last = max(np.floor(first), 0), min(np.ceil(last), size - 1)
        share = 1 - ((pair - first) / (last - first)).clamp(0, 1)
        wavelength = 1 / ((1 - share) / (rope["factor"] * wavelength) + share / wavelength)
    angle = position_ids[..., None].double() * (2 * torch.pi / wavelength)
    angle = torch.cat([angle, angle], -1)
    return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    who, cases, target, *commands = sys.argv[1:]
    for argv in chain(*(json.loads(Path(file).read_text()) for file in commands)):
        result = ended(importlib.import_module(f"{who}.cli").main, argv)
        assert result["code"] == 0, f"{who} {argv}: {result}"
    found = {
        str(i): of_transformers(case) if who == "transformers" else of_backend(who, case)
        for i, case in enumerate(json.loads(Path(cases).read_text()))
    }
    np.savez(target, **found)
