"""The loss in chunks makes no array of tokens × vocabulary: what it makes grows with the chunk, not with the row."""

import re
from dataclasses import replace

import numpy as np
import pytest
from backend import NAME, start_state, train_step
from small import SMALL, write_checkpoint

from trainspec.data import Batch

EXAMPLES, VOCAB = 2, 320
CHUNK, LENGTHS = 16, (32, 64, 128, 256)
FP32 = {"policy": "fp32", "reduce": "fp32"}


def size(shape):
    return int(np.prod(shape))


def rows_of(tokens):
    ids = np.arange(EXAMPLES * tokens, dtype=np.int32).reshape(EXAMPLES, tokens) % VOCAB
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), ids.shape)
    return Batch(ids, ids, positions, np.ones_like(ids), np.arange(EXAMPLES, dtype=np.int32))


def started(make_recipe, tokens, chunk, **sections):
    return start_state(
        make_recipe(
            method={
                "kind": "lora",
                "rank": 2,
                "alpha": 2.0,
                "targets": ["q_proj"],
            },  # the head's gradient is no array
            precision=FP32,
            batch={"global_examples": EXAMPLES},
            data={"sequence_tokens": tokens},
            plan={"loss_chunk": chunk},
            **sections,
        )
    )


def logits_at_once(make_recipe, tokens, chunk, *, compiled=False):
    """The shape of the largest array over the vocabulary that an update makes, weights [vocabulary, embed] left out."""
    state, batch = started(make_recipe, tokens, chunk), rows_of(tokens)
    shapes = shapes_in_jax(state, batch, compiled) if NAME == "jax" else shapes_in_torch(state, batch)
    embed = state.program.run.spec.embed if NAME == "jax" else state.run.spec.embed
    return max((s for s in shapes if VOCAB in s and sorted(s) != sorted((embed, VOCAB))), key=size)


def program_of_jax(state, batch):
    import jax.numpy as jnp

    arguments = (state.trainable, state.frozen, state.program.feeder.slices(batch), jnp.int32(0))
    return state.program.gradients.lower(*arguments, record_activations=False)


def shapes_in_jax(state, batch, compiled):
    """Of every array in the program that makes the gradients, as it is compiled or as it is given to the compiler."""
    lowered = program_of_jax(state, batch)
    if compiled:
        found = re.findall(r"\b[fsu]\d+\[([\d,]+)\]", lowered.compile().as_text())
    else:
        found = re.findall(r"tensor<((?:\d+x)+)[fsui]+\d+>", lowered.as_text())
    return {tuple(int(size) for size in re.findall(r"\d+", dims)) for dims in found}


def shapes_in_torch(state, batch):
    """Of every tensor that an operation of an update gives."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, (tuple, list)) else [result]
            shapes.update(tuple(each.shape) for each in results if isinstance(each, torch.Tensor))
            return result

    with Seen():
        train_step(state, batch, lr=0.0)
    return shapes


def test_an_update_makes_the_logits_of_a_chunk(make_recipe):
    tokens = LENGTHS[1]
    made = logits_at_once(make_recipe, tokens, CHUNK)
    assert size(made) == EXAMPLES * CHUNK * VOCAB, made
    # The control: all at once, as the plan has it for a short row.
    assert size(logits_at_once(make_recipe, tokens, "auto")) >= EXAMPLES * (tokens - 1) * VOCAB


@pytest.mark.full
def test_logits_grow_with_the_chunk_and_not_with_the_row(make_recipe):
    by_length = [size(logits_at_once(make_recipe, tokens, CHUNK, compiled=True)) for tokens in LENGTHS]
    assert by_length == [EXAMPLES * CHUNK * VOCAB] * len(LENGTHS)
    assert size(logits_at_once(make_recipe, LENGTHS[-1], 2 * CHUNK, compiled=True)) == 2 * by_length[0]
    plain = [size(logits_at_once(make_recipe, tokens, "auto", compiled=True)) for tokens in LENGTHS]
    assert all(
        EXAMPLES * (t - 1) * VOCAB <= n <= EXAMPLES * t * VOCAB for t, n in zip(LENGTHS, plain, strict=True)
    )


@pytest.mark.full
@pytest.mark.skipif(NAME != "jax", reason="the compiler's own figure")
def test_the_compiled_program_needs_less_memory_by_the_logits(make_recipe, tmp_path):
    """Of a vocabulary whose logits are more than anything that a layer makes: a smaller one's are not where the peak is."""
    vocab, tokens, needed = 8192, LENGTHS[-1], {}
    model = {"from": str(write_checkpoint(tmp_path / "wide", replace(SMALL, vocab=vocab)))}
    for chunk in (CHUNK, tokens):
        lowered = program_of_jax(started(make_recipe, tokens, chunk, model=model), rows_of(tokens))
        needed[chunk] = lowered.compile().memory_analysis().temp_size_in_bytes
    # In float32, at the least once: as logits or as their gradient.
    assert needed[tokens] - needed[CHUNK] > 4 * EXAMPLES * (tokens - 2 * CHUNK) * vocab, needed


@pytest.mark.full
@pytest.mark.skipif(NAME != "torch", reason="what autograd keeps")
def test_nothing_of_the_logits_is_kept_for_the_backward_pass(make_recipe, monkeypatch):
    """Bytes that autograd holds when the backward pass begins; what a chunk held is gone by then."""
    import weakref

    import torch

    from torchtrain.step import _Microbatches

    tokens, kept = LENGTHS[-1], {}
    for chunk in (CHUNK, "auto"):
        saved, held = [], {}

        def pack(tensor, saved=saved):
            saved.append(weakref.ref(tensor))
            return tensor

        def count(*_, saved=saved, held=held):
            for tensor in (reference() for reference in saved):
                if tensor is not None:
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

        monkeypatch.setattr(_Microbatches, "backward", count)
        state = started(make_recipe, tokens, chunk)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train_step(state, rows_of(tokens), lr=0.0)
        kept[chunk] = sum(held.values())
    assert kept["auto"] - kept[CHUNK] >= 4 * EXAMPLES * tokens * VOCAB
