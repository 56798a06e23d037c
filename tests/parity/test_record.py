"""The recorder, and the two example programs of docs/record-a-trace.md: they pass clean and fail with a planted mistake."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity import Recorder
from parity.cli import main, parser
from trainspec.errors import TraceError
from trainspec.trace import StepTrace, Trace, TraceWriter

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mlp")
    for program, name, *flags in (
        ("jax", "jax"),
        ("torch", "torch"),
        ("jax", "jax-wrong", "--divide-by-examples"),
        ("torch", "torch-wrong", "--eps-inside"),
    ):
        script = str(ROOT / f"docs/examples/twin_mlp_{program}.py")
        subprocess.run([sys.executable, script, str(root / name), *flags], check=True, cwd=ROOT)
    return root


@pytest.mark.parametrize(
    ("left", "right", "phase"),
    [("jax", "torch", None), ("jax", "torch-wrong", "update"), ("jax-wrong", "torch", "gradient")],
)
def test_the_examples_agree_and_the_planted_difference_is_found(
    examples: Path, tmp_path: Path, left: str, right: str, phase: str | None
):
    code = main(["diff", str(examples / left), str(examples / right), "--out", str(tmp_path)])
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["steps"] == 5
    if phase is None:
        assert code == 0, verdict["first_divergence"]
        assert 0 < verdict["worst"]["update"]["error"] < 1e-9
    else:
        assert code == 1
        assert (verdict["first_divergence"]["step"], verdict["first_divergence"]["phase"]) == (1, phase)


def test_the_pages_commands_are_those_that_exist():
    text = (ROOT / "docs/record-a-trace.md").read_text()
    commands = [
        shlex.split(c, comments=True) for c in re.findall(r"```sh\n(.*?)```", text, re.S)[0].splitlines()
    ]
    assert len(commands) == 7
    for program, *argv in commands:
        if program == "parity":
            parser().parse_args(argv)
        else:
            source = (ROOT / argv[0]).read_text()
            assert all(f'"{flag}"' in source for flag in argv if flag.startswith("--"))
