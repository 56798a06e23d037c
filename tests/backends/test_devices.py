"""A GPU or TPU that is there and cannot be used ends a run with its reason; nothing falls back to the CPU unless told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from backend import NAME, PROGRAM, check_accelerators, default_devices, describe_devices
from small import ROOT

from trainspec.errors import PlanError
from trainspec.plans.plan import Plan

# Every program of these tests is told to stay on the CPU, or is one that has nothing else.
UNTOLD = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
TOLD = {"jax": {"JAX_PLATFORMS": "cpu"}, "torch": {"CUDA_VISIBLE_DEVICES": ""}}[NAME]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch) -> Path:
    """The root of a machine with no device, of which nobody said that the CPU is to be used."""
    root = tmp_path / "machine"
    (root / "dev").mkdir(parents=True)
    monkeypatch.setattr("trainspec.plans.accelerators.ROOT", root)
    for name in UNTOLD:
        monkeypatch.delenv(name, raising=False)
    if NAME == "jax":
        import jax

        before = jax.config.jax_platforms
        jax.config.update("jax_platforms", None)
        yield root
        jax.config.update("jax_platforms", before)
    else:
        yield root


def test_a_machine_without_any_needs_no_word(machine):
    check_accelerators()
    kind, count = default_devices()
    assert (kind, count > 0) == ("cpu", True)


def test_what_cannot_be_used_is_not_passed_over(machine):
    """A check that is told to take what is there must not take the cores instead."""
    (machine / "dev/nvidia0").touch()
    with pytest.raises(PlanError, match="cannot use it"):
        default_devices()


@pytest.mark.skipif(NAME == "torch", reason="its line is below")
def test_jax_says_why_it_cannot_use_what_is_there(machine):
    # JAX's own words; of a TPU they depend on whether its backends are there already.
    reasons = {
        "GPU": "Unknown backend cuda",
        "TPU": "(Backend 'tpu' failed to initialize|Unknown backend tpu)",
    }
    for file, kind, package in (("nvidia0", "GPU", "cuda13"), ("accel0", "TPU", "tpu")):
        (machine / "dev" / file).touch()
        with pytest.raises(PlanError) as raised:
            check_accelerators()
        said = str(raised.value)
        assert re.match(
            rf"this machine has a {kind} \(/dev/{file}\), and JAX cannot use it: {reasons[kind]}", said
        )
        assert f"pip install 'jax[{package}]==" in said
        assert "set JAX_PLATFORMS=cpu" in said
        (machine / "dev" / file).unlink()


@pytest.mark.skipif(NAME == "torch", reason="torch has no such warnings")
def test_warnings_of_xla_are_off_where_there_is_a_gpu(machine, monkeypatch):
    """Its page about full memory is one. JAX itself asks for level 1, which shows them."""
    from jaxtrain import commands

    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    commands._jax()
    assert "TF_CPP_MIN_LOG_LEVEL" not in os.environ
    (machine / "dev/nvidia0").touch()
    commands._jax()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    commands._jax()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


@pytest.mark.skipif(NAME == "jax", reason="its line is above")
def test_torch_says_why_it_cannot_use_what_is_there(machine, monkeypatch):
    import torch

    (machine / "dev/nvidia0").touch()
    if torch.version.cuda is None:
        with pytest.raises(PlanError, match="cannot use it: Torch not compiled with CUDA enabled; install"):
            check_accelerators()

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", too_old)
    with pytest.raises(
        PlanError, match=r"torch \S+ cannot use it: The NVIDIA driver .* too old .*set CUDA_VISIBLE"
    ):
        check_accelerators()
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(PlanError, match=r"it sees 0 \(CUDA_VISIBLE_DEVICES=7\)"):
        check_accelerators()
    (machine / "dev/nvidia0").unlink()
    (machine / "dev/accel0").touch()
    with pytest.raises(PlanError, match=r"a TPU .*, which torchtrain does not use; train with jaxtrain"):
        check_accelerators()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_accelerators()


def test_who_hides_the_gpus_is_not_asked_again(machine, monkeypatch):
    (machine / "dev/nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_accelerators()


def program(recipe_file: Path, out: Path, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`PROGRAM train` on a machine whose device files lie under `root`."""
    code = (
        "import sys\nfrom pathlib import Path\nimport trainspec.plans.accelerators as accelerators\n"
        f"accelerators.ROOT = Path({str(root)!r})\n"
        f"from {PROGRAM}.cli import main\nsys.exit(main({['train', str(recipe_file), '--out', str(out)]!r}))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in UNTOLD}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.full
def test_the_program_ends_with_the_reason_or_trains_where_it_was_told(make_recipe, tmp_path):
    file, root = tmp_path / "recipe.yaml", tmp_path / "machine"
    file.write_text(make_recipe(run={"steps": 1}).to_yaml())
    (root / "dev").mkdir(parents=True)
    (root / "dev/nvidia0").touch()
    untold = program(file, tmp_path / "untold", root)
    assert untold.returncode == 2
    assert untold.stderr.startswith(f"{PROGRAM}: this machine has a GPU (/dev/nvidia0), and ")
    assert untold.stderr.count("\n") == 1
    assert not (tmp_path / "untold").exists()
    told = program(file, tmp_path / "told", root, **TOLD)
    assert (told.returncode, told.stderr) == (0, "")
    versions, host, devices, plan, precision, writes, *_ = told.stdout.splitlines()
    assert versions.startswith(f"{PROGRAM} {version('twintrain')} with {NAME} {version(NAME)}, ")
    assert host.startswith("host: ")
    assert devices == "devices: 1 × cpu, 1 process"
    attention = {"jax": "blocks", "torch": "fused"}[NAME]
    assert plan == (
        f"plan: one device, shards nothing, remat none, attention {attention}, loss of whole rows"
    )
    assert precision == "precision: fp32, stored in float32, computed in float32, gradients summed in float32"
    assert writes == f"writes: {tmp_path / 'told'}"


@pytest.mark.skipif(NAME == "torch", reason="JAX's way to ask for one")
def test_a_platform_that_was_asked_for_and_is_not_there_is_one_line(make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(run={"steps": 1}).to_yaml())
    for platform in ("cuda", "tpu"):
        done = program(file, tmp_path / "run", tmp_path, JAX_PLATFORMS=platform)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.splitlines()
        assert line.startswith(f"jaxtrain: JAX_PLATFORMS={platform}: ")
        assert line.endswith("; set it to cpu to train on the cores")


def test_devices_are_described(make_recipe):
    devices = describe_devices(Plan())
    assert (devices.backend, devices.kind, devices.used, devices.processes) == (NAME, "cpu", 1, 1)
    assert devices.memory_bytes is None
    assert all(version(package) for package in devices.packages)
