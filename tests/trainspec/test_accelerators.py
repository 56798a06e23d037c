"""Which GPUs and TPUs a machine shows, by the files of a machine that was made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainspec.plans.accelerators import Devices, accelerators, hides_gpus

GPU = "this machine has a GPU (/dev/nvidia0)"
MACHINES = {
    "nothing": ([], {}, []),
    "a GPU": (["dev/nvidia0", "dev/nvidiactl", "dev/nvidia-uvm"], {}, [GPU]),
    "GPUs": (["dev/nvidia10", "dev/nvidia2"], {}, ["this machine has a GPU (/dev/nvidia2 and 1 more)"]),
    "a driver without a GPU": (
        ["dev/nvidiactl", "dev/nvidia-modeset", "dev/nvidia-caps/nvidia-cap1"],
        {},
        [],
    ),
    "graphics": (["dev/dri/card0", "dev/kfd", "dev/dxg"], {}, []),
    "a TPU v4": (["dev/accel0", "dev/accel1"], {}, ["this machine has a TPU (/dev/accel0 and 1 more)"]),
    # The kernel's own accelerators, such as Intel's NPU, are in a folder.
    "another accelerator": (["dev/accel/accel0"], {}, []),
    "a TPU v5e": (
        ["dev/vfio/vfio", "dev/vfio/0"],
        {"0x1ae0": "0x0063"},
        ["this machine has a TPU (/dev/vfio/0)"],
    ),
    "a TPU that a container was not given": (["dev/vfio/vfio"], {"0x1ae0": "0x0063"}, []),
    "what is passed to a guest": (["dev/vfio/vfio", "dev/vfio/12"], {"0x10de": "0x2330"}, []),
    "Google's network card": (["dev/vfio/12"], {"0x1ae0": "0x0042"}, []),
    "both": (["dev/nvidia0", "dev/accel0"], {}, [GPU, "this machine has a TPU (/dev/accel0)"]),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_machine_shows(name, tmp_path: Path, monkeypatch):
    files, devices, found = MACHINES[name]
    contents = {file: "" for file in files}
    for number, (vendor, device) in enumerate(devices.items()):
        home = f"sys/bus/pci/devices/0000:00:0{number}.0"
        contents |= {f"{home}/vendor": f"{vendor}\n", f"{home}/device": f"{device}\n"}
    for file, text in contents.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr("trainspec.plans.accelerators.ROOT", tmp_path)
    assert [str(accelerator) for accelerator in accelerators()] == found


def test_who_hides_the_gpus_has_said_so():
    assert all(hides_gpus({"CUDA_VISIBLE_DEVICES": said}) for said in ("", " ", "-1"))
    assert not any(
        hides_gpus(said) for said in ({}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1,2"})
    )


def test_devices_in_words():
    assert str(Devices("torch", "cpu", 1, 1, 1, ())) == "1 × cpu, 1 process"
    assert (
        str(Devices("jax", "TPU v5 lite", 4, 8, 2, (), 16 * 2**30))
        == "4 of 8 × TPU v5 lite with 16.0 GiB each, 2 processes"
    )
