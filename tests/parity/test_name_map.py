"""The map from a program's names and layouts to the common ones, and one line for each way to misuse it."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from parity import Join, Recorder, Split
from trainspec.errors import TraceError
from trainspec.trace import Trace


def recorded(home: Path, weights: dict, *, slots: dict | None = None, **maps) -> Trace:
    recorder = Recorder(str(home), **maps)
    recorder.initial(weights)
    recorder.step(
        batch={"x": np.ones(2)}, loss_sum=1.0, tokens=1, lr=0.1, gradients=weights, weights=weights, slots=slots,
    )  # fmt: skip
    return Trace(home)


def test_a_kernel_of_a_convolution_is_permuted(tmp_path: Path):
    kernel = np.arange(3 * 2 * 4 * 5.0).reshape(3, 2, 4, 5)  # height, width, in, out
    trace = recorded(tmp_path, {"k": kernel}, names={"k": "w"}, permute={"k": (3, 2, 0, 1)})
    weight = trace.read_initial("weight/w")
    assert weight.shape == (5, 4, 3, 2)
    assert weight[4, 1, 2, 0] == kernel[2, 0, 1, 4]


def test_a_fused_weight_is_split_after_its_transposition(tmp_path: Path):
    fused = np.arange(24.0).reshape(2, 12)
    trace = recorded(
        tmp_path, {"qkv": fused}, names={}, transpose=["qkv"],
        split={"qkv": Split(("q", "k", "v"), sizes=(8, 2, 2))}, slots={"momentum": {"qkv": fused}},
    )  # fmt: skip
    np.testing.assert_array_equal(trace.read_initial("weight/k"), fused.T[8:10])
    np.testing.assert_array_equal(trace.read(1, "gradient/v"), fused.T[10:])
    np.testing.assert_array_equal(trace.read(1, "slot/momentum/q"), fused.T[:8])


def test_parts_are_joined_to_what_the_other_side_fuses(tmp_path: Path):
    parts = {name: np.full((2, 3), float(i)) for i, name in enumerate("qkv")}
    trace = recorded(
        tmp_path, parts, names={}, transpose=["q", "k", "v"], join={"qkv": Join(("q", "k", "v"))}
    )
    assert trace.read_initial("weight/qkv")[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_slot_of_another_shape_keeps_its_layout(tmp_path: Path):
    rows = {"row": {"k": np.arange(3.0)}, "momentum": {"k": np.arange(6.0).reshape(2, 3)}}
    trace = recorded(tmp_path, {"k": np.ones((2, 3))}, names={"k": "w"}, transpose=["k"], slots=rows)
    assert trace.read(1, "slot/row/w").tolist() == [0, 1, 2]
    assert trace.read(1, "slot/momentum/w").shape == (3, 2)


def test_torch_tensors_are_taken_as_they_are(tmp_path: Path):
    weights = {
        "w": torch.nn.Parameter(torch.ones(2, 3)),
        "h": torch.full((2,), 1.0 + 2**-7, dtype=torch.bfloat16, requires_grad=True),
        "n": torch.tensor(3),
    }
    trace = recorded(tmp_path, weights, names={name: name for name in weights})
    assert trace.read_initial("weight/w").tolist() == [[1, 1, 1], [1, 1, 1]]
    half = trace.read_initial("weight/h")
    assert (half.dtype, float(half[0])) == (np.dtype(ml_dtypes.bfloat16), 1.0 + 2**-7)


CLASHES = [
    ({"names": {"a": "x"}, "permute": {"b": (0, 1)}}, "permute: 'b' is not in the name map"),
    ({"names": {"a": "x"}, "permute": {"a": (0, 2)}}, "permute: 'a': [0, 2] is not an order of the axes 0 to 1"),
    ({"names": {"a": "x"}, "permute": {"a": (1, 0)}, "transpose": ["a"]}, "'a' is in transpose and in permute"),
    ({"names": {"a": "x"}, "transpose": "a"}, "transpose is a text, 'a'; give a list of names"),
    ({"names": {"a": "x"}, "split": {"a": Split(("y", "z"))}}, "'a' is in more than one of the name map, split and join"),
    ({"names": {"a": "x"}, "split": {"b": Split(("x", "z"))}}, "gives 'x' to more than one weight"),
    ({"names": {}, "split": {"b": Split(("x",))}}, "split: 'b' has one part"),
    ({"names": {}, "split": {"b": Split(("x", "y"), sizes=(1,))}}, "split: 'b' has 2 names and 1 sizes"),
    ({"names": {}, "join": {"b": Join("x")}}, "join: 'b' has one part"),
]  # fmt: skip


@pytest.mark.parametrize(("maps", "says"), CLASHES)
def test_a_map_that_contradicts_itself_is_one_line(tmp_path: Path, maps: dict, says: str):
    with pytest.raises(TraceError, match=re.escape(says)) as error:
        Recorder(tmp_path, **maps)
    assert "\n" not in str(error.value)


PAIR = {"a": np.ones((2, 3)), "b": np.ones((4, 2))}
MISFITS = [
    (PAIR, {"names": {"a": "a", "b": "b"}, "permute": {"a": (2, 1, 0)}}, "'a' has 2 dimensions, its layout 3"),
    ({"a": np.ones((2, 3, 4))}, {"names": {"a": "a"}, "transpose": ["a"]}, "its layout 2; give its axes in permute"),
    ({"a": PAIR["a"]}, {"names": {}, "split": {"a": Split(("x", "y"), axis=1)}}, "has 3 entries along axis 1, its parts [1, 1]"),
    ({"a": PAIR["a"]}, {"names": {}, "split": {"a": Split(("x", "y"), axis=2)}}, "has 2 dimensions and no axis 2"),
    (PAIR, {"names": {}, "join": {"x": Join(("a", "b"))}}, "'x': [2, 3], [4, 2] do not join along axis 0"),
    ({"a": None}, {"names": {"a": "a"}}, "'a' is None; leave it out"),
    ({"a": "text"}, {"names": {"a": "a"}}, "'a' is of type str; give real numbers"),
    ({"a": [[1.0], [1.0, 2.0]]}, {"names": {"a": "a"}}, "'a' is not an array"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "maps", "says"), MISFITS)
def test_an_array_that_does_not_fit_its_map_is_one_line(tmp_path: Path, weights: dict, maps: dict, says: str):
    with pytest.raises(TraceError, match=re.escape(says)) as error:
        Recorder(tmp_path, **maps).initial(weights)
    assert "\n" not in str(error.value)


def test_half_of_a_joined_weight_is_an_error(tmp_path: Path):
    recorder = Recorder(tmp_path, names={}, join={"x": Join(("a", "b"))})
    recorder.initial({"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(TraceError, match="gradients: no 'b', which is joined with 'a' to 'x'"):
        recorder.step(
            batch={"x": np.ones(2)}, loss_sum=1.0, tokens=1, lr=0.1, gradients={"a": np.ones(2)}, weights={},
        )  # fmt: skip


def test_a_trace_is_not_written_over_by_accident(tmp_path: Path):
    recorded(tmp_path, {"a": np.ones(2)}, names={"a": "a"})
    with pytest.raises(TraceError, match="holds a trace; give another directory, or replace=True"):
        Recorder(tmp_path, names={"a": "a"})
    recorder = Recorder(tmp_path, names={"a": "a"}, replace=True)
    recorder.initial({"a": np.ones(2)})
    with pytest.raises(TraceError, match="initial: called before"):
        recorder.initial({"a": np.ones(2)})


def test_slots_that_are_given_wrongly_are_one_line(tmp_path: Path):
    one = {"a": np.ones(2)}
    recorder = Recorder(tmp_path, names={"a": "a"})
    recorder.initial(one)
    given = {
        "batch": {"x": np.ones(2)},
        "loss_sum": 1.0,
        "tokens": 1,
        "lr": 0.1,
        "gradients": one,
        "weights": one,
    }
    for slots, says in (
        ({"slots": {"a/b": one}}, "'a/b': a slot's name has no '/'"),
        ({"slots": {"moment1": one}, "moment1": one}, "moment1 is given by itself and in slots"),
        ({"slots": {"moment1": {"a": np.ones(3)}}}, "slots: moment1: 'a' has shape [3], its weight [2]"),
    ):
        with pytest.raises(TraceError, match=re.escape(says)):
            recorder.step(**given, **slots)
