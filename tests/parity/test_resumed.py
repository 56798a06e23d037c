"""A resumed run is held to one that was never stopped: it passes, and each mistake of resuming shows where it is made."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import SHAPES, Sim, write

from parity.check import check
from parity.cli import main
from parity.comparison.compare import Comparison, compare
from parity.comparison.pair import Pair
from parity.comparison.tolerance import ProofBounds
from parity.diagnosis import diagnose
from parity.faults.fault import setup_recipe
from parity.runs.edit import Edit
from parity.runs.fixture import TinySetup, write_tiny
from parity.runs.join import join
from parity.runs.launch_many import Case, run_cases
from parity.runs.sides import parse_resumption, parse_side
from trainspec.checkpoints.manifest import read_manifest
from trainspec.errors import TraceError
from trainspec.plans.plan import Backend
from trainspec.trace import Trace
from trainspec.trace_header import TraceHeader

AFTER, STEPS = 2, 4
NAME = "model.layers.0.self_attn.q_proj.weight"
READS_AGAIN = Edit(
    "trainspec.training.loop:follow",
    "data.train.batch(step, examples)",
    "data.train.batch(step - bool(steps.start), examples)",
)
COUNT: dict[str, Edit] = {
    "torch": Edit(
        "torchtrain.step:restore", "set_steps(__optimizer, checkpoint.step)", "set_steps(__optimizer, 0)"
    ),
    "jax": Edit(
        "jaxtrain.step:train_step",
        "rates(__optimizer, lr=lr, step=state.step)",
        f"rates(__optimizer, lr=lr, step=state.step - {AFTER})",
    ),
}
RATE = Edit(
    "trainspec.training.loop:follow",
    "learning_rate(__s, peak=__p, step=state.step, steps=__n)",
    f"learning_rate(__s, peak=__p, step=state.step - {AFTER}, steps=__n)",
)


def older(part: str, name: str = NAME) -> Callable[[Path], None]:
    """Puts a tensor of the checkpoint before into the newest one, its digest with it."""

    def alter(run: Path) -> None:
        before, newest = (run / f"checkpoints/step-{step:06d}" for step in (AFTER - 1, AFTER))
        file = newest / f"{part}.safetensors"
        save_file(load_file(file) | {name: load_file(before / file.name)[name]}, file)
        manifest, digest = read_manifest(newest), hashlib.sha256(file.read_bytes()).hexdigest()
        sizes = {**manifest.sizes, file.name: file.stat().st_size}
        replace(manifest, digests={**manifest.digests, file.name: digest}, sizes=sizes).write(newest)

    return alter


# The edit or the damage, and where it must show: step, phase and tensor (any, where it is None).
def mistakes(
    backend: Backend,
) -> dict[str, tuple[Edit | Callable[[Path], None], tuple[int, str, str | None]]]:
    return {
        "a batch is read again": (READS_AGAIN, (AFTER + 1, "batch", "input_ids")),
        "Adam's count starts again": (COUNT[backend], (AFTER + 1, "update", None)),
        "the schedule starts again": (RATE, (AFTER + 1, "lr", "lr")),
        "an older first moment": (older("moment1"), (AFTER + 1, "resume", f"moment1/{NAME}")),
        "an older second moment": (older("moment2"), (AFTER + 1, "resume", f"moment2/{NAME}")),
        "an older weight": (older("weights"), (AFTER + 1, "resume", f"weight/{NAME}")),
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySetup:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def judged(whole: Path, home: Path) -> Comparison:
    """The run in two parts under `home`, against the whole one."""
    joined = join(Trace(home / "part-1"), Trace(home / "part-2"), home / "trace")
    pair = Pair(Trace(whole), joined)
    return compare(pair, ProofBounds(pair))


@pytest.mark.full  # the registry of faults has these, too: one of them is in its sample
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_mistake_of_a_resume_shows_where_it_is_made(backend: Backend, tiny, tmp_path: Path):
    recipe = setup_recipe(tiny, "full", "fp64", backend)
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every_steps": 1})})
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())

    def case(home: Path, trace: str, steps: int, *more: str, edits: tuple[Edit, ...] = ()) -> Case:
        argv = ["train", str(file), "--out", str(home / "run"), "--trace", str(home / trace)]
        return Case((*argv, "--set", f"run.stop_after_steps={steps}", *more), edits=edits)

    whole, first = tmp_path / "whole", tmp_path / "first"
    for result in run_cases(
        backend, [case(whole, "trace", STEPS), case(first, "part-1", AFTER)], home=tmp_path / "1"
    ):
        assert result.wrong is None
    planted = {"no mistake": ((), (0, "", None))} | mistakes(backend)
    cases = []
    for name, (mistake, _) in planted.items():
        shutil.copytree(first, tmp_path / name)
        if callable(mistake):
            mistake(tmp_path / name / "run")
        edits = (mistake,) if isinstance(mistake, Edit) else ()
        cases.append(case(tmp_path / name, "part-2", STEPS, "--resume", edits=edits))
    for name, result in zip(planted, run_cases(backend, cases, home=tmp_path / "2"), strict=True):
        assert result.wrong is None, name
    for name, (_, (step, phase, tensor)) in planted.items():
        found = judged(whole / "trace", tmp_path / name).first_divergence
        if not phase:
            assert found is None
            continue
        assert found is not None, name
        assert (found.location.step, found.location.phase) == (step, phase), (name, found)
        assert tensor in (None, found.location.tensor), (name, found)
        if phase == "resume":
            assert found.names == ("right restored", f"right after step {AFTER}")


def checked(tiny: TinySetup, home: Path, left: str, right: str, at: str, *, other: bool, precision="fp64"):
    home.mkdir(exist_ok=True)
    policy = {"policy": precision, "reduce": precision}
    (home / "r.yaml").write_text(tiny.recipe(precision=policy, run={"stop_after_steps": STEPS}).to_yaml())
    return check(
        home / "r.yaml", left=parse_side(left), right=parse_side(right), precision=precision, steps=STEPS,
        overrides=(), out=home / "out", resumption=parse_resumption(at, from_other=other),
    )  # fmt: skip


@pytest.mark.full
def test_one_side_continues_from_the_other_s_checkpoint(tiny, tmp_path: Path):
    verdict = checked(tiny, tmp_path, "torch", "torch batch.accumulation=1", "right:2", other=True)
    assert verdict.holds, verdict.comparison.first_divergence
    assert (
        verdict.right == "torch batch.accumulation=1, resumed after step 2 from the other side's checkpoint"
    )
    assert {f.location.step for f in verdict.comparison.findings if f.location.phase == "resume"} == {3}
    right = Trace(tmp_path / "out/right/trace")
    assert [record["step"] for record in right.steps] == [1, 2, 3, 4]
    assert Trace(tmp_path / "out/right/part-2").first_step == 3


@pytest.mark.full
@pytest.mark.parametrize(
    ("at", "other", "precision"),
    [("2", False, "fp64"), ("left:2", True, "fp64"), ("right:2", True, "fp32"), ("1", False, "bf16")],
)
def test_two_backends_pass_in_two_parts(at, other, precision, tiny, tmp_path: Path):
    verdict = checked(tiny, tmp_path, "jax", "torch", at, other=other, precision=precision)
    assert verdict.holds, verdict.comparison.first_divergence


def later(trace: Path, home: Path, first: int) -> Path:
    """The steps of a trace from `first` on, as a run that resumed writes them; its weights are those of the start."""
    shutil.copytree(trace, home)
    whole = Trace(trace)
    lines = (trace / "trace.jsonl").read_text().splitlines(keepends=True)
    (home / "trace.jsonl").write_text("".join(lines[first - 1 :]))
    start = {f"weight/{n}": whole.read_initial(f"weight/{n}") for n in SHAPES}
    for step in range(1, first):
        (home / f"step-{step:06d}.safetensors").unlink()
        for name in SHAPES:
            start[f"weight/{name}"] = start[f"weight/{name}"] + whole.read(step, f"update/{name}")
    for key in ("moment1", "moment2"):
        start |= {f"{key}/{n}": whole.read(first - 1, f"{key}/{n}") for n in SHAPES}
    save_file(start, home / "initial.safetensors")
    TraceHeader(first_step=first).write(home)
    return home


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_two_traces_of_a_resume_are_compared_from_there(dtype, tmp_path: Path, capsys):
    whole = write(Sim(dtype=dtype, steps=4), tmp_path / "whole")
    part = later(whole, tmp_path / "part", 3)
    assert main(["diff", str(part), str(part)]) == 0
    assert "starting first moments" in capsys.readouterr().out
    wrong = {
        "moment": (lambda d: alter(d / "initial.safetensors", f"moment1/{NAME}"), "step 0, initial_moment1, " + NAME),
        "gradient": (lambda d: alter(d / "step-000004.safetensors", f"gradient/{NAME}"), f"step 4, gradient, {NAME}"),
    }  # fmt: skip
    for name, (mistake, place) in wrong.items():
        other = shutil.copytree(part, tmp_path / name)
        mistake(other)
        assert main(["diff", str(part), str(other)]) == 1
        assert f"first divergence: {place}" in capsys.readouterr().out
    other = later(write(Sim(dtype=dtype, steps=4, eps_inside=True), tmp_path / "e"), tmp_path / "eps", 3)
    assert main(["diff", str(part), str(other)]) == 1
    far = [alter_all(shutil.copytree(part, tmp_path / f"{far}"), 1 + far) for far in (1e-7, 1e-12)]
    assert [main(["diff", str(part), str(each)]) for each in far] == [1, 0]
    assert ("from two checkpoints" in capsys.readouterr().out) == (dtype == "float32")
    short = shutil.copytree(part, tmp_path / "short")
    (short / "trace.jsonl").write_text((part / "trace.jsonl").read_text().splitlines(keepends=True)[0])
    assert main(["diff", str(part), str(short)]) == 1
    assert "step 4, batch, every tensor: left made 2 updates, right 1" in capsys.readouterr().out
    assert main(["diff", str(whole), str(part)]) == 2
    said = capsys.readouterr().err
    assert f"{whole} starts at step 1" in said
    assert (said.count("\n"), f"{part} at step 3" in said) == (1, True)


def alter_all(trace: Path, factor: float) -> Path:
    """What the trace starts from, a little off: as another run of the same training has it."""
    file = trace / "initial.safetensors"
    save_file({key: (array * factor).astype(array.dtype) for key, array in load_file(file).items()}, file)
    return trace


def alter(file: Path, key: str) -> None:
    arrays = load_file(file)
    arrays[key] = arrays[key] * arrays[key].dtype.type(1.01)
    save_file(arrays, file)


def test_a_joined_trace_is_the_whole_run_and_a_gap_is_refused(tmp_path: Path):
    whole = write(Sim(steps=4), tmp_path / "whole")
    second = Trace(later(whole, tmp_path / "second", 3))
    joined = join(Trace(whole), second, tmp_path / "joined")
    pair = Pair(Trace(whole), joined)
    comparison = compare(pair, ProofBounds(pair))
    assert comparison.holds
    assert len([f for f in comparison.findings if f.location.phase == "resume"]) == 3 * len(SHAPES)
    assert np.array_equal(joined.read_resumed(3, f"weight/{NAME}"), second.read_initial(f"weight/{NAME}"))
    first = write(Sim(steps=1), tmp_path / "first")
    with pytest.raises(TraceError, match="does not follow"):
        join(Trace(first), second, tmp_path / "gap")


def test_what_was_not_restored_or_not_there_before_fails(tmp_path: Path):
    whole = write(Sim(steps=4), tmp_path / "whole")
    for name, drop in (("moment", f"moment2/{NAME}"), ("weight", f"weight/{NAME}")):
        second = later(whole, tmp_path / name, 3)
        arrays = load_file(second / "initial.safetensors")
        del arrays[drop]
        save_file(arrays, second / "initial.safetensors")
        pair = Pair(Trace(whole), join(Trace(whole), Trace(second), tmp_path / "joined"))
        first = compare(pair, ProofBounds(pair)).first_divergence
        assert first is not None
        assert (str(first.location), first.reason) == (f"step 3, resume, {drop}", "missing in right restored")


@pytest.mark.parametrize(
    ("kind", "fact", "cause"),
    [
        ("other moment", "other-moment", "swapped-moments"),
        ("step before", "older-state", "resume-state"),
        ("half of the step before", "older-state", "resume-state"),
        ("start", "start-state", "resume-names"),
        ("zero", "lost-state", "resume-state"),
        ("noise", None, None),
    ],
)
def test_what_was_restored_instead_is_seen(kind: str, fact: str | None, cause: str | None, tmp_path: Path):
    trace = Trace(write(Sim(steps=4), tmp_path / "whole"))
    second = later(tmp_path / "whole", tmp_path / "second", 3)
    arrays, key = load_file(second / "initial.safetensors"), f"moment1/{NAME}"
    older = trace.read(1, key)
    match kind:
        case "other moment":
            arrays[key] = trace.read(2, f"moment2/{NAME}")
        case "step before":
            arrays[key] = older
        case "half of the step before":
            arrays[key][4:] = older[4:]
        case "start":
            key = f"weight/{NAME}"
            arrays[key] = trace.read_initial(key)
        case "zero":
            arrays[key] = np.zeros_like(older)
        case _:
            arrays[key] = arrays[key] * (1 + 0.1 * np.random.default_rng(0).standard_normal(older.shape))
    save_file(arrays, second / "initial.safetensors")
    joined = join(trace, Trace(second), tmp_path / "joined")
    pair = Pair(trace, joined)
    comparison = compare(pair, ProofBounds(pair))
    assert (
        str(comparison.first_divergence and comparison.first_divergence.location) == f"step 3, resume, {key}"
    )
    found = diagnose(comparison, (trace, joined))
    assert found is not None
    special = {"other-moment", "older-state", "start-state", "lost-state", "rounded-state"}
    assert {each.kind for each in found.facts} & special == ({fact} if fact else set())
    assert cause is None or found.alike[0].name == cause
    halves = [each.words for each in found.facts if "in 32 of 64 elements" in each.words]
    assert bool(halves) == (kind == "half of the step before")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume-at", "lef:2"], "--resume-at lef:2: the word before the colon is a side; did you mean 'left'?"),
        (["--resume-at", "0"], "--resume-at 0: '0' is not a step; write it like 2, left:2 or right:2"),
        (["--resume-at", "2", "--continue-from", "other"], "write left:2 or right:2"),
        (["--continue-from", "other"], "give --resume-at as well"),
        (["--resume-at", "left:3", "--steps", "3"], "--resume-at 3: 3 updates are compared; resume after an earlier one"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_options_is_one_line_and_exit_code_two(flags, said, tiny, tmp_path: Path, capsys):
    (tmp_path / "r.yaml").write_text(tiny.recipe().to_yaml())
    assert main(["check", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), said in error) == (1, True), error
