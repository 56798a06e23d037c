"""`parity diff` on traces made by numpy: equal runs pass, every planted mistake fails at the right location."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file
from synthetic import Q1, SHAPES, Sim, start, write

from parity import read_results
from parity.cli import main

DEEPER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run that the others are compared with, in both precisions."""
    home = tmp_path_factory.mktemp("base")
    return {dtype: write(Sim(dtype=dtype), home / dtype) for dtype in ("float64", "float32")}


def diff(left, right, out, *flags):
    code = main(["diff", str(left), str(right), "--out", str(out), *flags])
    return code, json.loads((out / "verdict.json").read_text())


def test_equal_runs_pass_and_verdict_json_has_the_documented_keys(base, tmp_path, capsys):
    code, verdict = diff(base["float64"], base["float64"], tmp_path)
    assert code == 0
    assert list(verdict) == [
        "verdict",
        "precision",
        "steps",
        "left",
        "right",
        "worst",
        "first_divergence",
        "diagnosis",
        "unproven",
        "notes",
    ]
    assert (verdict["verdict"], verdict["precision"], verdict["steps"]) == ("pass", "fp64", 3)
    assert verdict["first_divergence"] is None
    for phase in (
        "initial",
        "batch",
        "loss",
        "tokens",
        "gradient",
        "grad_norm",
        "lr",
        "moment1",
        "moment2",
        "update",
    ):
        entry = verdict["worst"][phase]
        assert {"tensor", "step", "error", "bound", "bound_used"} <= set(entry), phase
        assert entry["error"] == 0
    said = capsys.readouterr().out
    assert said.startswith("PASS")
    assert str(tmp_path / "report.html") in said


def test_the_other_order_of_the_same_operations_passes(base, tmp_path):
    for dtype, precision in (("float64", "fp64"), ("float32", "fp32")):
        other = write(Sim(dtype=dtype, fused=True), tmp_path / dtype)
        code, verdict = diff(base[dtype], other, tmp_path / "out")
        assert (code, verdict["precision"]) == (0, precision), verdict["first_divergence"]
        assert verdict["worst"]["update"]["error"] > 0


MISTAKES = {
    "lr a millionth off": (Sim(lr_factor=1 + 1e-6), "lr", "lr", 1),
    "lr a millionth off, not logged": (Sim(lr_factor=1 + 1e-6, logs_true_lr=False), "update", None, 1),
    "eps inside the root": (Sim(eps_inside=True), "update", None, 1),
    "decay coupled": (Sim(coupled_decay=True), "moment1", None, 1),
    "decay left out": (Sim(no_decay=True), "update", None, 1),
    "no bias correction": (Sim(no_bias_correction=True), "update", None, 1),
    "another beta2": (Sim(betas=(0.9, 0.99)), "moment2", None, 1),
    "not clipped": (Sim(clip=1e9), "clip", "clip_factor", 1),
    "no update on one side": (Sim(frozen=True), "update", None, 1),
    "a mean of means": (Sim(loss_factor=1.05), "loss", "loss_sum", 1),
    "one gradient scaled": (Sim(gradient_factor=(Q1, 1.01)), "gradient", Q1, 1),
    "one gradient missing": (Sim(missing=(2, Q1)), "gradient", Q1, 2),
    "one gradient not a number": (Sim(not_a_number=DEEPER), "gradient", DEEPER, 2),
    "one token": (Sim(token=True), "batch", "input_ids", 1),
    "labels shifted": (Sim(label_shift=True), "batch", "labels", 1),
}


# Below the rounding of float32: only the proof can see these.
TOO_FINE = {("lr a millionth off, not logged", "float32")}


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in MISTAKES for d in ("float64", "float32") if (n, d) not in TOO_FINE]
)
def test_a_planted_mistake_fails_at_its_location(name, dtype, base, tmp_path):
    sim, phase, tensor, step = MISTAKES[name]
    code, verdict = diff(base[dtype], write(sim.but(dtype=dtype), tmp_path / "b"), tmp_path / "out")
    first = verdict["first_divergence"]
    assert (code, verdict["verdict"]) == (1, "fail")
    assert (first["phase"], first["step"]) == (phase, step), first
    assert tensor in (None, first["tensor"])
    assert set(SHAPES) | {"lr", "loss_sum", "input_ids", "labels", "clip_factor"} > {first["tensor"]}


def test_an_element_whose_gradient_is_rounding_alone_is_no_difference(tmp_path):
    """In float64, as of a bias of keys that do not rotate: Adam's quotient makes an update of the rounding. Its mistakes still show."""
    noisy = Sim(noiseless_zero=True, noise=1e-15)
    left, right = write(noisy, tmp_path / "a"), write(noisy.but(noise_seed=1), tmp_path / "b")
    assert diff(left, right, tmp_path / "out")[1]["verdict"] == "pass"
    tensors = [load_file(side / "step-000001.safetensors")[f"update/{Q1}"] for side in (left, right)]
    assert (
        abs(tensors[0] - tensors[1])[0, 0] > 2e-9 * abs(tensors[0]).max()
    )  # more than the bound of the others
    for mistake in ({"eps_inside": True}, {"no_decay": True}, {"lr_factor": 1 + 1e-6}, {"eps": 1.1e-8}):
        wrong = write(noisy.but(noise_seed=1, **mistake), tmp_path / str(mistake))
        assert diff(left, wrong, tmp_path / "out")[1]["first_divergence"]["phase"] in ("update", "lr")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("both", [False, True])
def test_not_a_number_fails_on_whichever_side_it_stands(dtype, both, base, tmp_path):
    broken = write(Sim(dtype=dtype, not_a_number=Q1), tmp_path / "a")
    code, verdict = diff(broken, broken if both else base[dtype], tmp_path / "out")
    first = verdict["first_divergence"]
    assert (code, first["phase"], first["tensor"], first["step"]) == (1, "gradient", Q1, 2)
    where = "64 of 64 entries, first at [0, 0]"
    alike = "; both sides overflow here, so it is no difference between them"
    said = f"left and right alike: {where}{alike}" if both else f"left: {where}"
    assert first["reason"] == f"not finite in {said}"


def test_a_scalar_that_is_not_a_number_fails_in_its_phase(base, tmp_path):
    for key, phase in (("grad_norm", "grad_norm"), ("loss_sum", "loss"), ("lr", "lr")):
        broken = write(Sim(dtype="float32"), tmp_path / key)
        records = [json.loads(line) for line in (broken / "trace.jsonl").read_text().splitlines()]
        records[1][key] = float("nan")
        (broken / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        code, verdict = diff(broken, base["float32"], tmp_path / "out")
        assert (code, verdict["first_divergence"]["phase"], verdict["first_divergence"]["step"]) == (
            1,
            phase,
            2,
        )


def test_no_update_on_either_side_is_no_agreement(tmp_path):
    left = write(Sim(frozen=True), tmp_path / "a")
    code, verdict = diff(left, left, tmp_path / "out")
    assert code == 1
    assert verdict["first_divergence"]["phase"] == "update"
    assert "nothing was trained" in verdict["first_divergence"]["reason"]


def test_learning_rate_zero_is_not_called_untrained(tmp_path, capsys):
    left = write(Sim(steps=1, lr_factor=0.0), tmp_path / "a")
    assert main(["diff", str(left), str(left)]) == 0
    assert "compare more steps" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "code"), [(1 + 1e-10, 0), (1 + 1e-8, 1)])
def test_the_proof_stands_at_a_billionth(factor, code, base, tmp_path):
    other = write(Sim(gradient_factor=(Q1, factor)), tmp_path / "b")
    assert diff(base["float64"], other, tmp_path / "out")[0] == code


def test_bound_used_is_the_share_that_is_used_not_what_is_left(base, tmp_path):
    out, other = tmp_path / "out", write(Sim(gradient_factor=(Q1, 1 + 1e-10)), tmp_path / "b")
    _, verdict = diff(base["float64"], other, out)
    entry = verdict["worst"]["gradient"]
    assert entry["error"] == pytest.approx(1e-10, rel=1e-3)
    assert entry["bound_used"] == pytest.approx(entry["error"] / entry["bound"])
    assert entry["bound_used"] == pytest.approx(0.1, rel=1e-3)


def test_a_file_of_before_bound_used_had_its_name_is_read_as_what_it_said(base, tmp_path):
    _, verdict = diff(base["float64"], write(Sim(gradient_factor=(Q1, 1 + 1e-10)), tmp_path / "b"), tmp_path)
    file = tmp_path / "verdict.json"
    assert read_results(file) == verdict
    file.write_text(file.read_text().replace('"bound_used"', '"headroom"'))
    assert "bound_used" not in file.read_text()
    assert read_results(file) == verdict


def test_an_update_lost_in_its_weight_is_not_held_to_a_billionth_of_itself(tmp_path):
    """At lr 1e-11 an update is a few units in the last place of its weight, and is rounded accordingly."""
    sim = Sim(lr=1e-11)
    left, right = write(sim, tmp_path / "a"), write(sim.but(fused=True), tmp_path / "b")
    code, verdict = diff(left, right, tmp_path / "out")
    assert (code, verdict["worst"]["update"]["error"] > 1e-9) == (0, True)
    assert diff(left, write(sim.but(frozen=True), tmp_path / "c"), tmp_path / "out")[0] == 1


def test_gradients_are_judged_from_the_last_layer_back(base, tmp_path):
    """A mistake in several layers' gradients is located where the backward pass first meets it."""
    other = write(Sim(not_a_number=Q1, missing=(2, "model.layers.0.mlp.down_proj.weight")), tmp_path / "b")
    assert diff(base["float64"], other, tmp_path / "out")[1]["first_divergence"]["tensor"] == Q1


def test_a_run_that_ends_early_fails_where_it_ended(base, tmp_path):
    code, verdict = diff(base["float64"], write(Sim(steps=2), tmp_path / "b"), tmp_path / "out")
    assert (code, verdict["first_divergence"]["step"]) == (1, 3)
    assert verdict["first_divergence"]["reason"] == "left made 3 updates, right 2"


def test_float32_is_no_proof_in_fp64(base, tmp_path):
    code, verdict = diff(base["float32"], base["float32"], tmp_path, "--precision", "fp64")
    assert code == 1
    assert "fp64 wants float64" in verdict["first_divergence"]["reason"]


def test_a_trace_cut_short_is_one_line_and_exit_code_two(base, tmp_path, capsys):
    broken = write(Sim(), tmp_path / "b")
    file = broken / "step-000002.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["diff", str(base["float64"]), str(broken)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(file) in said


def test_traces_of_other_models_share_no_name(base, tmp_path, capsys):
    """One line, not a thousand missing tensors."""
    other = shutil.copytree(base["float64"], tmp_path / "other")
    renamed = {f"weight/net.{name}": array for name, array in start().items()}
    save_file(renamed, other / "initial.safetensors")
    assert main(["diff", str(base["float64"]), str(other)]) == 2
    said = capsys.readouterr().err
    assert "no weight has the same name in both ('lm_head.weight', 'net.lm_head.weight')" in said
    assert said.count("\n") == 1


def test_a_check_s_directory_is_no_trace(base, tmp_path, capsys):
    for name in ("left", "right"):
        shutil.copytree(base["float64"], tmp_path / "check" / name / "trace")
    assert main(["diff", str(tmp_path / "check"), str(base["float64"])]) == 2
    said = capsys.readouterr().err
    assert f"compare {tmp_path / 'check/left/trace'} with {tmp_path / 'check/right/trace'}" in said
    assert said.count("\n") == 1


def test_a_trace_that_is_not_there_is_one_line_and_exit_code_two(base, tmp_path, capsys):
    assert main(["diff", str(base["float64"]), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def with_header(trace, home, **stated):
    """A copy of a trace with a header."""
    copied = shutil.copytree(trace, home)
    (copied / "trace.json").write_text(json.dumps(stated))
    return copied


def test_the_precision_is_what_the_headers_state(base, tmp_path):
    """bf16 runs have float32 gradients: their type alone would have them judged in fp32."""
    left, right = (with_header(base["float32"], tmp_path / n, policy="bf16", reduce="fp32") for n in "ab")
    code, verdict = diff(left, right, tmp_path / "out")
    assert (code, verdict["precision"]) == (0, "bf16")
    assert not any("no header" in note and "left" not in note for note in verdict["notes"])
    code, verdict = diff(left, base["float32"], tmp_path / "out")
    assert (code, verdict["precision"]) == (0, "bf16")  # the coarser of the two
    assert any(
        "no header (trace.json) states policy and identity in left and right" in n for n in verdict["notes"]
    )


def test_traces_of_two_precisions_are_refused_unless_one_is_asked_for(base, tmp_path, capsys):
    left = with_header(base["float32"], tmp_path / "a", policy="bf16")
    right = with_header(base["float32"], tmp_path / "b", policy="fp32")
    assert main(["diff", str(left), str(right)]) == 2
    said = capsys.readouterr().err
    assert f"{left} was made in bf16, {right} in fp32" in said
    assert (said.count("\n"), "give --precision" in said) == (1, True)
    code, verdict = diff(left, right, tmp_path / "out", "--precision", "fp32")
    assert (code, verdict["precision"]) == (0, "fp32")
    assert "the headers differ: policy bf16 and fp32" in verdict["notes"]


def test_headers_that_differ_are_named(base, tmp_path):
    stated = {"policy": "fp64", "method": {"kind": "lora", "alpha": 8, "adapter": "here"}}
    stated["identity"] = {"data": "0123456789", "weights": "random"}
    other = {"policy": "fp64", "method": {"kind": "lora", "alpha": 9, "adapter": "there"}}
    other["identity"] = {"data": "9876543210", "weights": "random"}
    left, right = (with_header(base["float64"], tmp_path / n, **s) for n, s in (("a", stated), ("b", other)))
    _, verdict = diff(left, right, tmp_path / "out")
    assert verdict["notes"] == [
        "the headers differ: method.alpha 8 and 9, data (digest) 01234567 and 98765432"
    ]
    assert diff(left, left, tmp_path / "out")[1]["notes"] == []


def test_an_estimated_bound_says_what_it_shows(base, tmp_path):
    _, verdict = diff(base["float32"], base["float32"], tmp_path)
    [note] = [note for note in verdict["notes"] if "estimated" in note]
    finest = float(note.split("shows from ")[1].split()[0])
    for factor, code in ((1 + 10 * finest, 1), (1 + finest / 10, 0)):
        other = write(Sim(dtype="float32", gradient_factor=(Q1, factor)), tmp_path / f"{factor}")
        found, verdict = diff(base["float32"], other, tmp_path / "out")
        assert found == code
        assert code == 0 or verdict["first_divergence"]["phase"] == "gradient"
    assert not any(
        "estimated" in note for note in diff(base["float64"], base["float64"], tmp_path)[1]["notes"]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"polcy": "fp32"}', "'polcy' is no key of a header; did you mean 'policy'?"),
        ('{"policy": "fp8"}', "policy is 'fp8'; give fp64 or fp32 or bf16, or leave it out"),
        ('{"identity": 3}', "identity is 3; give an object, or leave it out"),
        ('{"order": "mine"}', "order is 'mine'; give given or names or recording, or leave it out"),
        ('{"policy"', "not JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_header_with_a_mistake_is_one_line_and_exit_code_two(text, said, base, tmp_path, capsys):
    broken = shutil.copytree(base["float64"], tmp_path / "b")
    (broken / "trace.json").write_text(text)
    assert main(["diff", str(base["float64"]), str(broken)]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), said in error) == (1, True), error
