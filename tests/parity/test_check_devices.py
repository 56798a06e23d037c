"""`parity check --device`: which program computes where, in which environment, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_check import RECIPE, STAND_IN

from parity.assertion import assert_parity
from parity.cli import main
from parity.comparison.estimated_bounds import EstimatedBounds
from parity.judging.measure import Replay, ReplaySettings
from parity.runs.devices import ON_CORES, Placement, Program, environment, placed
from parity.runs.plans import runs_as
from parity.runs.sides import Side, parse_side
from trainspec.errors import UserError
from trainspec.plans import accelerators
from trainspec.plans.names import DEVICES
from trainspec.plans.plan import Plan

# What a side does first: it notes when it starts and ends, and what it was told.
NOTES = """
import atexit, os
def note(word):
    with open("notes.txt", "a") as file:
        print(word, *(os.environ.get(k, "-") for k in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE")), file=file)
note("begin")
atexit.register(note, "end")
"""
FINDS = 'def default_devices():\n    print("a library says hello")\n    return (%r, %d)\n'
FAILS = "from trainspec.errors import PlanError\ndef default_devices():\n    raise PlanError('the driver is too old')\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pretend that this machine has the devices with these files, such as dev/nvidia0."""

    def has(*files: str) -> None:
        root = tmp_path / "machine"
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        monkeypatch.setattr(accelerators, "ROOT", root)

    return has


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine):
    """Run `parity check` with stand-ins for both backends, which find what `finds` says."""

    def run(*flags: str, finds: str = FINDS % ("gpu", 1), files: tuple[str, ...] = ("dev/nvidia0",)) -> int:
        machine(*files)
        for program in ("jaxtrain", "torchtrain"):
            (tmp_path / program).mkdir()
            (tmp_path / program / "__init__.py").touch()
            (tmp_path / program / "cluster.py").write_text(finds)
            (tmp_path / program / "__main__.py").write_text(STAND_IN % (str(Path(__file__).parent), NOTES))
        (tmp_path / "demo.yaml").write_text(RECIPE)
        monkeypatch.chdir(tmp_path)
        return main(["check", "demo.yaml", *flags])

    return run


def found(kind: str, count: int = 1):
    return lambda backend, device: (kind, count)


def wanted(*devices: str, backends=("jax", "torch"), plan_devices: int = 1) -> list[Program]:
    sides = [
        Program(name, f"{name} ({backend})", backend, device, plan_devices, f"--{name} {backend}@cpu")
        for name, backend, device in zip(("left", "right"), backends, devices, strict=False)
    ]
    reference = [Program("reference", "the float64 reference (jax)", "jax", device) for device in devices[2:]]
    return sides + reference


def test_the_environment_of_each_device():
    user = {
        "JAX_PLATFORMS": "rocm",
        "CUDA_VISIBLE_DEVICES": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "HOME": "/h",
    }
    cpu, gpu, tpu = (environment(kind, user) for kind in ("cpu", "gpu", "tpu"))
    assert (cpu["JAX_PLATFORMS"], cpu["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    assert (tpu["JAX_PLATFORMS"], tpu["CUDA_VISIBLE_DEVICES"]) == ("tpu,cpu", "")
    # The user chooses among GPUs and how memory is taken; float32 means float32 whatever they say.
    assert (gpu["JAX_PLATFORMS"], gpu["CUDA_VISIBLE_DEVICES"]) == ("cuda,cpu", "3")
    assert gpu["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert environment("gpu", {"NVIDIA_TF32_OVERRIDE": "1"})["NVIDIA_TF32_OVERRIDE"] == "0"
    assert environment("gpu", {})["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "NVIDIA_TF32_OVERRIDE" not in cpu
    assert all(each["HOME"] == "/h" and "JAX_COMPILATION_CACHE_DIR" in each for each in (cpu, gpu, tpu))


def test_without_accelerators_nothing_is_asked_and_all_is_on_the_cores(machine):
    machine("dev/null")

    def never(backend, device):
        raise AssertionError(f"{backend} was asked for {device}")

    for device in ("cpu", "auto"):
        assert placed(wanted(device, device, device), float64=False, look=never) == ON_CORES
    assert ON_CORES.on_cores
    for device in ("gpu", "tpu"):
        with pytest.raises(
            UserError, match=f"this machine has no {device.upper()}; compute on the cores .--device cpu."
        ):
            placed(wanted(device, "cpu", device), float64=False, look=never)


def test_on_a_gpu_all_three_are_there_and_a_side_may_stay_on_the_cores(machine):
    machine("dev/nvidia0")
    everywhere = placed(wanted("gpu", "gpu", "gpu"), float64=False, look=found("gpu"))
    assert (
        everywhere
        == Placement("gpu", "gpu", "gpu")
        == placed(wanted("auto", "auto", "auto"), float64=False, look=found("gpu"))
    )
    assert not everywhere.on_cores
    assert placed(wanted("gpu", "cpu"), float64=True, look=found("gpu")) == Placement("gpu", "cpu", "cpu")
    # A machine with a GPU whose JAX has none: `auto` takes the cores, `gpu` is refused.
    assert placed(wanted("auto", "auto"), float64=True, look=found("cpu")) == ON_CORES
    with pytest.raises(UserError, match=r"left \(jax\): jaxtrain finds no GPU here, only the cores"):
        placed(wanted("gpu", "gpu"), float64=True, look=found("cpu"))


def test_a_plan_of_more_devices_than_there_are(machine):
    machine("dev/nvidia0")
    four = wanted("gpu", "gpu", plan_devices=4)
    assert placed(four, float64=True, look=found("gpu", 8)) == Placement("gpu", "gpu")
    with pytest.raises(
        UserError, match=r"left \(jax\): the plan takes 4 devices, and here are 2 GPUs; use a plan of 2, or"
    ):
        placed(four, float64=True, look=found("gpu", 2))
    with pytest.raises(UserError, match="here is 1 GPU; use a plan of 1"):
        placed(wanted("auto", "auto", plan_devices=2), float64=True, look=found("gpu", 1))
    # The cores are as many devices as are wanted.
    assert placed(wanted("cpu", "cpu", plan_devices=4), float64=True, look=found("gpu", 1)) == ON_CORES


def test_a_tpu_has_no_torch_and_no_float64(machine):
    machine("dev/accel0")
    assert placed(wanted("tpu", "cpu", "tpu"), float64=False, look=found("tpu", 4)) == Placement(
        "tpu", "cpu", "cpu", "a TPU has no float64, so the reference is computed on the cores"
    )
    of_auto = placed(wanted("auto", "auto", "auto"), float64=False, look=found("tpu", 4))
    assert (of_auto.left, of_auto.right, of_auto.reference) == ("tpu", "cpu", "cpu")
    assert of_auto.reason
    with pytest.raises(UserError, match=r"torchtrain does not run on a TPU; .*--right torch@cpu"):
        placed(wanted("tpu", "tpu", "tpu"), float64=False, look=found("tpu", 4))
    with pytest.raises(UserError, match="a TPU has no float64; use --precision fp32 or bf16, or"):
        placed(wanted("tpu", "cpu"), float64=True, look=found("tpu", 4))


def test_a_side_names_its_device():
    assert parse_side("jax@gpu plan.data=2") == Side("jax", ("plan.data=2",), "gpu")
    assert str(parse_side("torchtrain@cpu")) == "torch@cpu"
    assert str(parse_side("jax plan.data=2")) == "jax plan.data=2"
    with pytest.raises(UserError, match="after @ comes the device; did you mean 'gpu'"):
        parse_side("jax@gpus")
    with pytest.raises(UserError, match="after @ comes the device; known here: auto, cpu, gpu, tpu"):
        parse_side("jax@")
    assert set(DEVICES) == {"auto", "cpu", "gpu", "tpu"}


def test_programs_on_a_device_run_one_after_the_other(check, tmp_path, capsys):
    assert check("--device", "gpu", "--left", "jax", "--right", "torch run.seed=0") == 0
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert [line.split()[0] for line in notes] == ["begin", "end", "begin", "end"]
    assert all(line.split()[1] == "cuda,cpu" and line.split()[-1] == "0" for line in notes)
    verdict = json.loads((tmp_path / "runs/parity-demo/verdict.json").read_text())
    assert (verdict["left"], verdict["right"]) == ("jax on gpu", "torch run.seed=0 on gpu")
    assert "guess" not in capsys.readouterr().err
    # What the report says to run next is on the same device.
    assert "--device gpu" in (tmp_path / "runs/parity-demo/report.html").read_text()


def test_sides_may_differ_in_their_device(check, tmp_path):
    assert check("--device", "gpu", "--right", "torch@cpu") == 0
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert notes[0].split()[1] == "cuda,cpu"
    assert notes[2].split()[1] == "cpu"
    verdict = json.loads((tmp_path / "runs/parity-demo/verdict.json").read_text())
    assert (verdict["left"], verdict["right"]) == ("jax on gpu", "torch@cpu on cpu")


@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        (("--device", "gpu"), {"files": ("dev/null",)}, "left (jax): this machine has no GPU"),
        (("--device", "gpu"), {"finds": FAILS}, "jaxtrain cannot say what devices are here: the driver is too old"),
        (("--device", "gpu", "--left", "jax plan.data=2"), {}, "the plan takes 2 devices, and here is 1 GPU"),
        (("--device", "gpu", "--left", "jax plan.data=2"), {}, "this side alone (--left 'jax@cpu plan.data=2')"),
        (("--device", "tpu"), {"files": ("dev/accel0",), "finds": FINDS % ("tpu", 1)}, "torchtrain does not run on a TPU"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_one_line_before_anything_runs(
    flags, options, said, check, tmp_path, capsys
):
    assert check(*flags, **options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_reason_for_another_device_of_the_reference_is_in_the_verdict(
    check, tmp_path, monkeypatch, capsys
):
    asked = []

    def bounds(pair, settings, *, device, **_):
        asked.append(device)
        return EstimatedBounds(pair, settings.precision)

    monkeypatch.setattr("parity.check.measured_bounds", bounds)
    flags = ("--device", "tpu", "--right", "torch@cpu", "--precision", "fp32")
    assert check(*flags, files=("dev/accel0",), finds=FINDS % ("tpu", 1)) == 0
    assert asked == ["cpu"]
    why = "a TPU has no float64, so the reference is computed on the cores"
    assert why in json.loads((tmp_path / "runs/parity-demo/verdict.json").read_text())["notes"]
    assert f"note: {why}" in capsys.readouterr().out


def test_the_reference_computes_attention_by_its_definition(tmp_path: Path):
    """Whatever kernel the sides were asked for; a later override decides."""
    Replay([], ReplaySettings(tmp_path / "r.yaml", ["plan.attention=fused"], "fp32", tmp_path))
    overrides = json.loads((tmp_path / "measured/job.json").read_text())["overrides"]
    assert overrides[0] == "plan.attention=fused"
    assert overrides[-1] == "plan.attention=reference"


def test_one_line_of_a_test_suite_may_name_the_device():
    with pytest.raises(UserError, match="device 'gpus'; did you mean 'gpu'"):
        assert_parity("demo.yaml", device="gpus")  # pyright: ignore[reportArgumentType]


def test_a_backend_that_refuses_a_plan_keeps_what_is_no_part_of_its_devices():
    plan = Plan(fsdp=2, shards="params", remat="full", attention="fused", loss_chunk=64)
    alone = runs_as(plan, "fp64", "torch")
    assert alone == Plan(remat="full", attention="fused", loss_chunk=64)
    assert runs_as(plan, "fp64", "jax") == plan
