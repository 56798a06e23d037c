"""Every kernel of attention is the definition: output and gradients, whatever a row shows; and what each keeps in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from numpy.typing import NDArray
from plan_runs import Make
from torch import Tensor

from torchtrain.attention import KERNELS, Kernel, choose_kernel, flex, fused, reference, segments
from torchtrain.attention.visible import Visible, rows_of
from torchtrain.cluster import finish, start
from torchtrain.layers import VIRTUAL
from torchtrain.step import State, init_state, train_step
from trainspec.data import Batch, open_dataset
from trainspec.errors import PlanError
from trainspec.recipe import Recipe

# Float64 sums of a few dozen terms of order one, in another order.
ROUNDING = 1e-12
LENGTH, HEADS, KV_HEADS, HEAD_DIM = 37, 4, 2, 6
SCALE = HEAD_DIM**-0.5
# The segments of each row, by their lengths; 0 is padding.
ROWS: dict[str, list[list[tuple[int, int]]]] = {
    "whole": [[(1, 37)], [(1, 37)]],
    "padded-right": [[(1, 20), (0, 17)], [(1, 37)], [(0, 37)]],
    "padded-left": [[(0, 16), (1, 21)], [(1, 37)], [(0, 36), (1, 1)]],
    "packed": [[(1, 9), (2, 13), (3, 15)], [(1, 1), (2, 30), (0, 6)]],
}
PREFIX = {"prefix": 5}
VIRTUAL_TOKENS: dict[str, dict[str, Any]] = {
    "none": {},
    "prefix": PREFIX,
    "prefix-from-zero": PREFIX | {"prefix_has_positions": False},
    "prompt": {"prompt": 4},
}
# The smallest hides virtual tokens from padding too.
WINDOWS = (None, 7, 3, 16, 64)


def arrays(rows: list[list[tuple[int, int]]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Segments and positions, as a batch has them."""
    segments_BS = [[number for number, length in row for _ in range(length)] for row in rows]
    positions_BS = [[i if number else 0 for number, length in row for i in range(length)] for row in rows]
    return np.array(segments_BS, np.int32), np.array(positions_BS, np.int32)


def visible_of(rows: list[list[tuple[int, int]]], **fields: Any) -> Visible:
    """What the queries of those rows may see, with virtual tokens and a window as `fields` say."""
    segments_BS, positions_BS = arrays(rows)
    prompt, prefix = fields.get("prompt", 0), fields.get("prefix", 0)
    shift = prompt + prefix if fields.get("prefix_has_positions", True) else 0
    lead = np.broadcast_to(np.arange(prompt), (len(rows), prompt))
    return Visible(
        segments_BT=torch.from_numpy(np.pad(segments_BS, ((0, 0), (prompt, 0)), constant_values=VIRTUAL)),
        positions_BT=torch.from_numpy(np.concatenate([lead, positions_BS + shift], 1)),
        rows=rows_of(segments_BS, positions_BS, shift=shift),
        **fields,
    )


def operands(visible: Visible, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values of grouped heads, laid out as projections leave them, and the output's gradient."""
    B, T = visible.segments_BT.shape
    draw = torch.Generator().manual_seed(1)
    sizes = ((T, HEADS), (visible.prefix + T, KV_HEADS), (visible.prefix + T, KV_HEADS), (T, HEADS))
    drawn = [torch.randn(B, n, heads, HEAD_DIM, generator=draw, dtype=torch.float64) for n, heads in sizes]
    return [x.to(dtype).transpose(1, 2) for x in drawn]


def results(kernel: Kernel, visible: Visible, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The output and the gradients of queries, keys and values; nothing comes from padding unless it is recorded."""
    q, k, v, gradient = operands(visible, dtype)
    for x in (q, k, v):
        x.requires_grad_()
    output = kernel.attend(q, k, v, visible, scale=SCALE)
    counts = torch.ones_like(visible.segments_BT, dtype=torch.bool)
    if not visible.is_recorded:
        counts = visible.segments_BT != 0
    counted = counts[:, None, :, None].to(dtype)
    output.backward(gradient * counted)
    gradients = [x.grad for x in (q, k, v) if x.grad is not None]
    assert len(gradients) == 3
    return [(output * counted).detach(), *gradients]


def distance(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of its tensor's largest entry."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(mine, theirs, strict=True)
    )


@contextmanager
def flex_on_a_cpu() -> Iterator[None]:
    """torch's own unfused arithmetic of flex_attention, which it has no compiled backward pass for on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(torch_flex, "_validate_device", lambda *_: None)
        yield


def cases() -> Iterator[Any]:
    for rows, kind, window in product(ROWS, VIRTUAL_TOKENS, WINDOWS):
        yield rows, VIRTUAL_TOKENS[kind] | {"window": window}


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("kernel", [fused, segments], ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def test_a_kernel_is_the_reference(kernel: Kernel, is_recorded: bool):
    for rows, fields in cases():
        visible = visible_of(ROWS[rows], is_recorded=is_recorded, **fields)
        assert distance(results(kernel, visible), results(reference, visible)) < ROUNDING, (rows, fields)


# Each call of torch's unfused arithmetic costs a tenth of a second and more.
FLEX = [
    pytest.param(rows, kind, window, marks=() if case == ("packed", "prefix", 7) else pytest.mark.full)
    for case in product(ROWS, VIRTUAL_TOKENS, WINDOWS[:2])
    for rows, kind, window in [case]
]


@pytest.mark.parametrize(("rows", "kind", "window"), FLEX)
def test_flex_attention_is_the_reference(rows: str, kind: str, window: int | None):
    visible = visible_of(ROWS[rows], is_recorded=True, window=window, **VIRTUAL_TOKENS[kind])
    with flex_on_a_cpu():
        assert distance(results(flex, visible), results(reference, visible)) < ROUNDING
        if window is not None:  # control
            smaller = replace(visible, window=window - 1)
            assert distance(results(flex, smaller), results(reference, visible)) > 1e-2


@pytest.mark.parametrize(("policy", "unit"), [("float32", 2.0**-24), ("bfloat16", 2.0**-8)])
def test_fewer_bits_are_as_near_as_the_reference_is(policy: str, unit: float):
    """Both round; the kernel may stray from float64 twice as far as the definition does, and by a rounding."""
    dtype = getattr(torch, policy)
    for rows, fields in cases():
        visible = visible_of(ROWS[rows], **fields)
        exact = results(reference, visible)
        mine, theirs = (distance(results(kernel, visible, dtype), exact) for kernel in (fused, reference))
        assert mine < 2 * theirs + 2 * unit, (rows, fields)


# What a kernel may get wrong, and rows on which that shows.
MISTAKES: dict[str, tuple[str, dict[str, Any], Callable[[Visible], Visible]]] = {
    "segments dropped": (
        "packed", {},
        lambda seen: replace(seen, rows=rows_of(np.ones((2, LENGTH)), np.zeros((2, LENGTH)))),
    ),
    "window off by one": ("whole", {"window": 7}, lambda seen: replace(seen, window=8)),
    "window dropped": ("packed", {"window": 7} | PREFIX, lambda seen: replace(seen, window=None)),
    "window over a prefix without positions": (
        "packed", {"window": 7, "prefix_has_positions": False} | PREFIX,
        lambda seen: replace(seen, prefix_has_positions=True),
    ),
    "padding on the left seen": (
        "padded-left", {},
        lambda seen: replace(seen, rows=rows_of(np.ones((3, LENGTH)), np.zeros((3, LENGTH)))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_a_kernel_shows(mistake: str):
    """Control: of what is compared above, each of these changes much."""
    rows, fields, wrong = MISTAKES[mistake]
    visible = visible_of(ROWS[rows], **fields)
    assert distance(results(fused, wrong(visible)), results(reference, visible)) > 1e-2


@pytest.mark.parametrize(
    ("rows", "fields", "expected"),
    [
        ("whole", {}, True),
        ("whole", PREFIX, True),
        ("whole", {"prompt": 4, "window": LENGTH + 4}, True),
        ("whole", {"prompt": 4, "window": LENGTH + 3}, False),
        ("whole", {"window": LENGTH}, True),
        ("whole", {"window": LENGTH - 1}, False),
        ("padded-right", {}, True),
        ("padded-right", {"is_recorded": True}, False),
        ("padded-left", {}, False),
        ("packed", {}, False),
    ],
)
def test_what_needs_causality_alone(rows: str, fields: dict[str, Any], expected: bool):
    assert visible_of(ROWS[rows], **fields).is_causal is expected


def test_a_block_mask_leaves_out_only_what_no_query_sees():
    lengths = [[(1, 140), (2, 150), (0, 10)], [(1, 300)]]
    for fields in ({}, PREFIX, {"window": 40}):
        visible = visible_of(lengths, **fields)
        blocks = flex.make_block_mask(visible).to_dense()[:, 0].bool()
        covered = blocks.repeat_interleave(128, 1).repeat_interleave(128, 2)
        mask = visible.mask()
        assert not (mask & ~covered[:, : mask.shape[1], : mask.shape[2]]).any()
        assert not blocks.all()  # control


def test_a_dense_mask_is_made_once_for_all_layers():
    visible = visible_of(ROWS["packed"])
    q, k, v, _ = operands(visible)
    made = []

    def mask(seen: Visible) -> Tensor:
        made.append(seen)
        return Visible.mask(seen)

    for _ in range(3):
        visible.once(mask)
    assert made == [visible]
    reference.attend(q, k, v, visible, scale=SCALE)
    assert visible.once(Visible.mask) is visible.once(Visible.mask)


@pytest.mark.parametrize(
    ("asked", "policy", "device", "expected"),
    [
        ("auto", "fp64", "cpu", "reference"),
        ("auto", "fp64", "cuda", "reference"),
        ("auto", "fp32", "cpu", "fused"),
        ("auto", "bf16", "cuda", "fused"),
        ("reference", "bf16", "cuda", "reference"),
        ("fused", "fp64", "cpu", "fused"),
        ("fused", "fp32", "cuda", "fused"),
    ],
)
def test_the_kernel_of_a_run(asked: Any, policy: Any, device: str, expected: str):
    assert choose_kernel(asked, policy=policy, device=torch.device(device)) == expected
    assert expected in KERNELS


def test_a_kernel_that_there_is_not_is_refused():
    with pytest.raises(PlanError, match=r"use plan\.attention=auto") as raised:
        choose_kernel("fused", policy="fp64", device=torch.device("cuda"))
    assert "\n" not in str(raised.value)


FULL = {"kind": "full"}
PACKED = {"packing": True, "sequence_tokens": 200}
LEFT = {"padding_side": "left"}
PROMPT = {"kind": "prompt", "virtual_tokens": 4}
# A model, a method, the data and the plan.
RUNS = [
    ("mistral", {"kind": "prefix", "virtual_tokens": 5}, PACKED, {"remat": "full"}),
    ("plain", FULL, {}, {}),
    ("mistral", {"kind": "prefix", "virtual_tokens": 5, "positions": "from_zero", "dropout": 0.1}, LEFT, {}),
    ("mistral", PROMPT, PACKED, {}),
    ("plain", PROMPT, LEFT, {"remat": "full"}),
    ("qwen3", FULL, PACKED, {"remat": "full"}),
    ("glm", FULL, LEFT, {}),
]


def first_step(recipe: Recipe) -> tuple[State, Any]:
    """A run's first update, with everything that is recorded."""
    state = init_state(start(recipe))
    return train_step(state, batch_of(state), lr=1e-3, keep="activations")


def batch_of(state: State) -> Batch:
    return open_dataset(state.run, "train").batch(0, state.run.recipe.batch.global_examples)


@pytest.fixture(autouse=True)
def let_the_process_go() -> Iterator[None]:
    yield
    finish()


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=() if run in RUNS[:2] else pytest.mark.full) for run in RUNS], ids=str
)
def test_a_step_is_that_of_the_reference(make_recipe: Make, run: Any):
    """Loss, gradients and every activation, padding too, in float64."""
    variant, method, data, plan = run
    made = []
    for attention in ("reference", "fused"):
        recipe = make_recipe(
            variant, method=method, data=data, plan=plan | {"attention": attention},
            precision={"policy": "fp64", "reduce": "fp64"}, batch={"global_examples": 4, "accumulation": 2},
        )  # fmt: skip
        state, metrics = first_step(recipe)
        assert state.model.config._attn_implementation.endswith((attention, "after_prefix"))
        made.append(metrics)
        finish()
    theirs, mine = made
    assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=ROUNDING)
    for kind in ("gradients", "activations", "activation_gradients"):
        arrays, others = getattr(mine, kind), getattr(theirs, kind)
        assert arrays
        assert set(arrays) == set(others)
        for name, array in arrays.items():
            assert np.abs(array - others[name]).max() <= ROUNDING * np.abs(others[name]).max(), name


def test_every_model_with_a_prefix_has_its_own_kernel(make_recipe: Make, monkeypatch: pytest.MonkeyPatch):
    """Of two models in a process, the first attends by its own after the second is there."""
    method = {"kind": "prefix", "virtual_tokens": 2}
    recipes = [make_recipe(method=method, plan={"attention": name}) for name in ("reference", "fused")]
    states = [init_state(start(recipe)) for recipe in recipes]
    used: list[str] = []
    for name, kernel in KERNELS.items():
        attend = kernel.attend

        def counted(*given: Any, name: str = name, attend: Any = attend, **rest: Any) -> Tensor:
            used.append(name)
            return attend(*given, **rest)

        monkeypatch.setattr(kernel, "attend", counted)
    for name, state in zip(("reference", "fused"), states, strict=True):
        used.clear()
        train_step(state, batch_of(state), lr=1e-3)
        assert set(used) == {name}


def kept_bytes(state: State, length: int) -> int:
    """What a forward pass of one row keeps for the backward pass; memory that several tensors share counts once."""
    positions = torch.arange(length)[None]
    visible = Visible(
        segments_BT=torch.ones_like(positions),
        positions_BT=positions,
        rows=rows_of(np.ones((1, length)), positions.numpy()),
    )
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = state.model(input_ids=positions % 300, position_ids=positions, visible=visible).logits
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    assert logits.requires_grad
    return sum(size for at, size in kept.items() if at not in weights)


@pytest.mark.parametrize(("attention", "is_linear"), [("fused", True), ("reference", False)])
def test_what_a_step_keeps_grows_with_the_row(make_recipe: Make, attention: str, is_linear: bool):
    """Linearly where attention is fused; the definition keeps a mask of all pairs, as the control."""
    recipe = make_recipe(
        method=FULL, precision={"policy": "fp32", "reduce": "fp32"}, plan={"attention": attention}
    )
    state = init_state(start(recipe))
    lengths = (256, 512, 1024, 2048)
    each = [kept_bytes(state, length) / length for length in lengths]
    assert (max(each) < 1.01 * min(each)) is is_linear, dict(zip(lengths, each, strict=True))
