"""The recorder: what it writes, what its header states, and one line for each way to misuse it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from parity import Join, Recorder, Split
from parity.cli import main
from trainspec.errors import TraceError
from trainspec.trace import StepTrace, Trace, TraceWriter

NAMES = {"kernel": "fc.weight", "bias": "fc.bias", "table": "frozen.weight"}


def weights(**changes) -> dict[str, np.ndarray]:
    return {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.zeros(3), "table": np.ones(4)} | changes


def trained(value: float = 0.5, **changes) -> dict[str, np.ndarray]:
    return {"kernel": np.full((2, 3), value), "bias": np.full(3, value)} | changes


def step(recorder: Recorder, **changes) -> None:
    fields = {
        "batch": {"inputs": np.ones((4, 2)), "mask": np.array([True, False])},
        "loss_sum": 12.0,
        "tokens": 4,
        "lr": 1e-3,
        "gradients": trained(),
        "weights": weights(kernel=np.arange(6.0).reshape(2, 3) - 1),
        "moment1": trained(),
        "moment2": trained(),
    }
    recorder.step(**(fields | changes))


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    recorder = Recorder(tmp_path, names=NAMES, transpose=["kernel"])
    recorder.initial(weights())
    return recorder


def test_names_layout_update_and_norm(recorder: Recorder, tmp_path: Path):
    step(recorder)
    trace = Trace(tmp_path)
    assert trace.steps == [
        {"step": 1, "loss_sum": 12.0, "tokens": 4, "loss": 3.0, "grad_norm": 1.5, "lr": 1e-3}
    ]
    assert set(trace.initial_names()) == {"weight/fc.weight", "weight/fc.bias", "weight/frozen.weight"}
    assert trace.read_initial("weight/fc.weight").tolist() == [[0, 3], [1, 4], [2, 5]]
    np.testing.assert_array_equal(trace.read(1, "update/fc.weight"), -np.ones((3, 2)))
    assert trace.read(1, "batch/mask").tolist() == [1, 0]
    assert [name for name in trace.names(1) if "frozen" in name] == ["change/frozen.weight"]
    np.testing.assert_array_equal(trace.read(1, "change/frozen.weight"), np.zeros(4))


def test_weights_that_are_changed_in_place_do_no_harm(tmp_path: Path):
    recorder, mine = Recorder(tmp_path, names=NAMES), weights()
    recorder.initial(mine)
    mine["bias"] += 2.0
    step(recorder, weights=mine)
    mine["bias"] += 3.0
    step(recorder, weights=mine, grad_norm=7.0)
    trace = Trace(tmp_path)
    assert [trace.read(i, "update/fc.bias")[0] for i in (1, 2)] == [2.0, 3.0]
    assert trace.steps[1]["grad_norm"] == 7.0


def test_types_are_kept(tmp_path: Path):
    recorder = Recorder(tmp_path, names={"w": "w"})
    recorder.initial({"w": np.ones(2, np.float32)})
    one = {"w": np.ones(2, np.float32)}
    step(recorder, gradients=one, weights=one, moment1=one, moment2=one)
    assert Trace(tmp_path).read(1, "update/w").dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"gradients": trained(kernal=np.zeros(1))},
            "'kernal' is not in the name map; did you mean 'kernel'",
        ),
        ({"moment1": {"kernel": np.zeros((2, 3))}}, "moment1: no 'fc.bias', which has a gradient"),
        ({"gradients": trained(bias=np.zeros(2))}, "'fc.bias' has shape [2], its weight [3]"),
        ({"batch": {}}, "the batch is empty"),
        ({"weights": trained()}, "weights: no 'frozen.weight', which was there at the start"),
    ],
)
def test_what_does_not_fit_is_an_error(recorder: Recorder, changes, says: str):
    with pytest.raises(TraceError, match=re.escape(says)):
        step(recorder, **changes)


def test_a_bad_map_or_order_is_an_error(tmp_path: Path):
    with pytest.raises(TraceError, match="transpose: 'kernal'"):
        Recorder(tmp_path, names=NAMES, transpose=["kernal"])
    with pytest.raises(TraceError, match="'x' to more than one"):
        Recorder(tmp_path, names={"a": "x", "b": "x"})
    with pytest.raises(TraceError, match=r"call initial\(weights\)"):
        step(Recorder(tmp_path, names=NAMES))
    with pytest.raises(TraceError, match="initial: no 'table'"):
        Recorder(tmp_path, names=NAMES).initial(trained())


def test_a_batch_that_differs_is_the_first_divergence(tmp_path: Path):
    for side, value in (("a", 1.0), ("b", 1.0 + 1e-15)):
        recorder = Recorder(tmp_path / side, names=NAMES)
        recorder.initial(weights())
        step(recorder, batch={"inputs": np.full((4, 2), value)})
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 1
    first = json.loads((tmp_path / "verdict.json").read_text())["first_divergence"]
    assert (first["phase"], first["tensor"]) == ("batch", "inputs")


@pytest.mark.parametrize(
    "other", [{}, {"input_ids": np.ones((4, 2), np.int32)}, {"targets": np.ones((4, 2))}]
)
def test_a_batch_that_one_side_did_not_record_fails(tmp_path: Path, other: dict[str, np.ndarray]):
    batches = {"a": {"inputs": np.ones((4, 2))} if other else {}, "b": other}
    for side, batch in batches.items():
        writer = TraceWriter(tmp_path / side)
        writer.initial({"w": np.ones(2)})
        writer.step(StepTrace(1, batch, 1.0, 1, 1.0, 1.0, *({"w": np.ones(2)} for _ in range(4))))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 1
    first = json.loads((tmp_path / "verdict.json").read_text())["first_divergence"]
    assert first["phase"] == "batch"
    assert "missing in" in first["reason"]


def pair_of(tmp_path: Path, one: dict, other: dict) -> tuple[int, dict]:
    """The exit code and the verdict of two recordings, with what differs between them."""
    for side, changes in (("a", one), ("b", other)):
        recorder = Recorder(tmp_path / side, names=NAMES, replace=True)
        recorder.initial(weights())
        step(recorder, **changes)
    code = main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)])
    return code, json.loads((tmp_path / "verdict.json").read_text())


def test_token_ids_do_not_ask_for_positions_and_segments(tmp_path: Path):
    batch = {"batch": {"input_ids": np.ones((4, 2), np.int32)}}
    assert pair_of(tmp_path, batch, batch)[0] == 0
    longer = {"batch": {"input_ids": np.ones((4, 2), np.int32), "positions": np.ones((4, 2))}}
    code, verdict = pair_of(tmp_path, batch, longer)
    assert (code, verdict["first_divergence"]["tensor"]) == (1, "positions")


def test_batches_of_two_types_are_equal_or_say_their_types(tmp_path: Path):
    halves, tenths = np.full((4, 2), 0.5), np.full((4, 2), 0.1)
    other = {"batch": {"inputs": halves.astype(np.float32)}}
    assert pair_of(tmp_path, {"batch": {"inputs": halves}}, other)[0] == 0
    other = {"batch": {"inputs": tenths.astype(np.float32)}}
    code, verdict = pair_of(tmp_path, {"batch": {"inputs": tenths}}, other)
    assert code == 1
    assert verdict["first_divergence"]["reason"] == "8 of 8 entries differ; float64 in left, float32 in right"


def test_activations_of_one_side_are_named(tmp_path: Path):
    code, verdict = pair_of(tmp_path, {}, {"activations": {"pooled": np.ones(2), "hidden": np.ones(2)}})
    assert code == 0
    assert (
        "activations (pooled, hidden) are in right only at step 1: they are not compared" in verdict["notes"]
    )
    code, verdict = pair_of(
        tmp_path,
        {"activations": {"pooled": np.ones(2)}},
        {"activations": {"pooled": np.ones(2), "hidden": np.zeros(2)}},
    )
    assert code == 0
    assert "activations (hidden) are in right only at step 1: they are not compared" in verdict["notes"]
    differing = {"activations": {"pooled": np.zeros(2), "hidden": np.ones(2)}}
    code, verdict = pair_of(tmp_path, {"activations": {"pooled": np.ones(2)}}, differing)
    assert (code, verdict["first_divergence"]["tensor"]) == (1, "pooled")
    both = {"activations": {"pooled": np.ones(2)}}
    assert not any("pooled" in note for note in pair_of(tmp_path, both, both)[1]["notes"])


def test_queries_and_keys_that_are_turned_alike_are_no_difference(tmp_path: Path):
    """Rotated ones are the same but for an angle, if nothing after them differs."""

    def points(rotated: float, mixed: float) -> dict:
        values = {f"layers.0.rotated_{x}": np.full(2, rotated) for x in ("query", "key")}
        return {"activations": values | {"layers.0.mixed": np.full(2, mixed)}}

    code, verdict = pair_of(tmp_path, points(1.0, 1.0), points(2.0, 1.0))
    assert code == 0
    assert any("rotated_query and 1 more differ, and nothing after them does" in n for n in verdict["notes"])
    code, verdict = pair_of(tmp_path, points(1.0, 1.0), points(2.0, 2.0))
    assert (code, verdict["first_divergence"]["tensor"]) == (1, "layers.0.rotated_query")
    code, verdict = pair_of(tmp_path, points(1.0, 1.0), points(1.0, 2.0))
    assert (code, verdict["first_divergence"]["tensor"]) == (1, "layers.0.mixed")
    assert not any("differ, and nothing after" in n for n in verdict["notes"])


def test_tied_weights_that_are_given_twice_count_once_in_the_norm(tmp_path: Path):
    matrix, other = np.arange(4.0), np.arange(4.0) + 1
    for name, tied, gradient, norm in (
        ("tied", matrix, np.full(4, 2.0), 4.0),
        ("other", other, np.full(4, 2.0), 32**0.5),
        ("zeros", np.zeros(4), np.full(4, 2.0), 32**0.5),
    ):
        first = np.zeros(4) if name == "zeros" else matrix
        recorder = Recorder(tmp_path / name, names={"table": "table", "head": "head"})
        mine, gradients = {"table": first, "head": tied}, {"table": gradient, "head": gradient}
        recorder.initial(mine)
        step(recorder, gradients=gradients, weights=mine, moment1=gradients, moment2=gradients)
        assert Trace(tmp_path / name).steps[0]["grad_norm"] == norm


def test_the_header_says_what_the_recorder_was_told_and_what_it_saw(tmp_path: Path):
    recorder = Recorder(tmp_path, names=NAMES, program="mine", precision="fp64")
    recorder.initial(weights())
    step(recorder)
    before = Trace(tmp_path).header
    step(recorder)
    header = Trace(tmp_path).header
    assert (header.backend, header.policy, header.first_step, header.order) == ("mine", "fp64", 1, "names")
    assert header.versions["numpy"] == np.__version__
    assert header.identity["weights"] == before.identity["weights"]
    assert header.identity["data"] != before.identity["data"]


def test_digests_are_of_common_names_layout_and_values(tmp_path: Path):
    """A float32 kernel [in, out] under its own name has the digest of the same float64 weight [out, in]."""
    kernel = np.arange(6.0).reshape(2, 3)
    digests = []
    for name, array, batch, options in (
        ("a", kernel, np.ones(3), {}),
        ("b", kernel.T.astype(np.float32), np.ones(3, np.int32), {"transpose": ["k"]}),
        ("c", kernel + 1e-15, np.ones(3), {}),
        ("d", kernel, np.zeros(3), {}),
    ):
        recorder = Recorder(tmp_path / name, names={"k": "w"}, **options)
        recorder.initial({"k": array})
        recorder.step(
            batch={"x": batch}, loss_sum=1.0, tokens=1, lr=0.1, gradients={"k": array}, weights={"k": array}
        )
        digests.append(Trace(tmp_path / name).header.identity)
    assert digests[0] == digests[1]
    assert [digests[0][key] == digests[2][key] for key in ("weights", "data")] == [False, True]
    assert [digests[0][key] == digests[3][key] for key in ("weights", "data")] == [True, False]


def told(tmp_path: Path, one: dict, other: dict) -> Path:
    """Two recordings of the same step, with what the Recorders are told."""
    for side, options in (("a", one), ("b", other)):
        recorder = Recorder(tmp_path / side, names=NAMES, **options)
        recorder.initial(weights())
        step(recorder)
    return tmp_path


def test_the_precision_that_a_recorder_states_is_the_one_that_is_judged(tmp_path: Path, capsys):
    home = told(tmp_path, {"precision": "fp32"}, {"precision": "fp32"})
    main(["diff", str(home / "a"), str(home / "b"), "--out", str(home)])
    verdict = json.loads((home / "verdict.json").read_text())
    assert verdict["precision"] == "fp32"
    assert not any("states no policy" in note or "no header" in note for note in verdict["notes"])
    home = told(tmp_path / "two", {"precision": "fp64"}, {"precision": "bf16"})
    capsys.readouterr()
    assert main(["diff", str(home / "a"), str(home / "b")]) == 2
    assert "two precisions are not the same training" in capsys.readouterr().err


def test_a_recording_without_a_precision_is_judged_by_its_types_and_says_so(tmp_path: Path):
    home = told(tmp_path, {}, {"precision": "fp64"})
    assert main(["diff", str(home / "a"), str(home / "b"), "--out", str(home)]) == 0
    notes = json.loads((home / "verdict.json").read_text())["notes"]
    assert "trace.json states no policy in left: the type of the gradients stands for the precision" in notes


def test_other_batches_are_named_by_their_digests(tmp_path: Path):
    _, verdict = pair_of(tmp_path, {}, {"batch": {"inputs": np.zeros((4, 2))}})
    [note] = [note for note in verdict["notes"] if "the headers differ" in note]
    assert "data (digest)" in note
    assert "weights" not in note


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp23"}, "precision: 'fp23' is none of fp64, fp32, bf16; did you mean 'fp32'?"),
        ({"program": ""}, "program: '' is no name; give a text, or leave it out"),
        ({"first_step": 0}, "first_step: 0 is no step; give a whole number from 1 on"),
    ],
)
def test_a_statement_with_a_mistake_is_an_error(tmp_path: Path, options: dict, says: str):
    with pytest.raises(TraceError, match=re.escape(says)) as raised:
        Recorder(tmp_path / "trace", names=NAMES, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "trace").exists()


def resumed(home: Path, *, momentum: float = 0.5, **slots) -> Path:
    """A run that resumed after step 3."""
    recorder = Recorder(home, names=NAMES, first_step=4)
    recorder.initial(weights(), moment1=trained(momentum), moment2=trained())
    for _ in range(2):
        step(recorder, **slots)
    return home


def test_a_run_that_resumed_starts_at_its_first_step_with_its_moments(tmp_path: Path):
    trace = Trace(resumed(tmp_path / "a"))
    assert (trace.first_step, [record["step"] for record in trace.steps]) == (4, [4, 5])
    assert "moment1/fc.bias" in trace.initial_names()
    other = resumed(tmp_path / "b", momentum=0.6)
    assert main(["diff", str(tmp_path / "a"), str(other), "--out", str(tmp_path)]) == 1
    first = json.loads((tmp_path / "verdict.json").read_text())["first_divergence"]
    assert (first["step"], first["phase"]) == (0, "initial_moment1")


def test_slots_of_a_run_that_resumed_are_compared_in_float32_too(tmp_path: Path):
    slots = {"moment1": None, "moment2": None, "slots": {"momentum": trained()}}
    left, right = resumed(tmp_path / "a", **slots), resumed(tmp_path / "b", **slots)
    out = ["--precision", "fp32", "--out", str(tmp_path)]
    assert main(["diff", str(left), str(right), *out]) in (0, 1)
    assert "slot" in json.loads((tmp_path / "verdict.json").read_text())["worst"]


def test_moments_that_cannot_be_are_an_error(tmp_path: Path):
    with pytest.raises(TraceError, match="one moment without the other"):
        Recorder(tmp_path / "a", names=NAMES, first_step=2).initial(weights(), moment1=trained())
    with pytest.raises(TraceError, match="moments before step 1"):
        Recorder(tmp_path / "b", names=NAMES).initial(weights(), moment1=trained(), moment2=trained())


def test_the_parts_of_a_fused_weight_stand_where_it_was_recorded(tmp_path: Path):
    names = {"table": "table", "out": "out", "head": "head"}
    recorder = Recorder(
        tmp_path, names=names, split={"qkv": Split(("q", "k"))}, join={"up": Join(("g", "u"))}
    )
    mine = {name: np.ones(2) for name in ("table", "qkv", "out", "g", "u", "head")}
    recorder.initial(mine)
    step(recorder, gradients=mine, weights=mine, moment1=mine, moment2=mine)
    trace = Trace(tmp_path)
    assert [named.name for named in trace.causal_order()] == ["table", "q", "k", "out", "up", "head"]
    assert trace.header.order == "recording"


@pytest.mark.parametrize(("given", "first"), [("left", "a"), ("right", "a"), (None, "c")])
def test_an_order_that_is_given_goes_before_one_that_was_recorded(
    tmp_path: Path, given: str | None, first: str
):
    """The map says a, c, b; the user c, b, a. Gradients are walked backwards, and those of a and c differ."""
    for side, factor in (("left", 1.0), ("right", 1.5)):
        order = ["c", "b", "a"] if side == given else []
        recorder = Recorder(tmp_path / side, names={name: name for name in "acb"}, order=order)
        mine = {name: np.arange(1.0, 4.0) for name in "acb"}
        recorder.initial(mine)
        gradients = {name: np.full(3, 1.0 if name == "b" else factor) for name in "acb"}
        step(recorder, gradients=gradients, weights=mine, moment1=mine, moment2=mine)
    assert main(["diff", str(tmp_path / "left"), str(tmp_path / "right"), "--out", str(tmp_path)]) == 1
    divergence = json.loads((tmp_path / "verdict.json").read_text())["first_divergence"]
    assert (divergence["phase"], divergence["tensor"]) == ("gradient", first)
