"""Out of memory is one line: what was asked for, what there is, what helps. The texts are those of real reports."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from trainspec.errors import DataError, MachineError
from trainspec.failures import explained, outcome
from trainspec.plans.accelerators import Devices
from trainspec.recipe import Recipe
from trainspec.runs.memory import (
    GIB,
    MemoryShortage,
    describe_shortage,
    host_memory,
    memory_shortage,
    what_helps,
)
from trainspec.runs.run import Run, resolve

MIB = 2**20
CPU = Devices("jax", "cpu", 1, 1, 1, ())
GPU = Devices("torch", "NVIDIA H100 80GB HBM3", 1, 1, 1, (), 79 * GIB)


class JaxRuntimeError(RuntimeError):
    pass


TORCH_GPU = (
    "CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB of which 12.73 GiB is free. "
    "Including non-PyTorch memory, this process has 18.73 GiB memory in use. Of the allocated memory 9.08 GiB is allocated "
    "by PyTorch, and 9.35 GiB is reserved by PyTorch but unallocated."
)
TORCH_FULL_GPU = "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 8.00 GiB of which 0 bytes is free."
TORCH_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "70368744177664 bytes. Error code 12 (Cannot allocate memory)"
)
XLA_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM Debugging.\nTotal 1GiB"
TPU_COMPILE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm. "
    "Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:\n    reserved        530.00M"
)
TPU_BUFFER = (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 15.65G. That was not possible. "
    "There are 11.08G free.; (0x0x0_HBM0)"
)
TPU_PROGRAM = (
    "RESOURCE_EXHAUSTED: Attempting to reserve 6.48G at the bottom of memory. That was not possible. "
    "There are 6.78G free, 0B reserved, and 3.33G reservable."
)
SHAPES = {
    "torch on a GPU": (RuntimeError(TORCH_GPU), MemoryShortage("device", 22.78 * GIB, 31.47 * GIB, 12.73 * GIB)),
    "torch on a full GPU": (RuntimeError(TORCH_FULL_GPU), MemoryShortage("device", 64 * MIB, 8 * GIB, 0)),
    "torch on a CPU": (RuntimeError(TORCH_CPU), MemoryShortage("machine", 2**46)),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryShortage("device")),
    "the driver": (RuntimeError("CUDA error: out of memory"), MemoryShortage("device")),
    "XLA on a GPU": (JaxRuntimeError(XLA_GPU), MemoryShortage("device", 4770354232)),
    "XLA's allocator": (JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0"), MemoryShortage("device", 2.99 * GIB)),
    "XLA on a CPU": (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8796093022208 bytes."), MemoryShortage("device", 2**43)),
    "a TPU's compiler": (JaxRuntimeError(TPU_COMPILE), MemoryShortage("device", 21.95 * GIB, 15.48 * GIB)),
    "a TPU's buffer": (JaxRuntimeError(TPU_BUFFER), MemoryShortage("device", 15.65 * GIB, None, 11.08 * GIB)),
    "a TPU's program": (JaxRuntimeError(TPU_PROGRAM), MemoryShortage("device", 6.48 * GIB, None, 6.78 * GIB)),
    "numpy": (MemoryError("Unable to allocate 128. TiB for an array with shape (17592186044416,) and data type float64"), MemoryShortage("machine", 2**47)),
    "Python": (MemoryError(), MemoryShortage("machine")),
    "the kernel": (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryShortage("machine")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_way_to_say_it_is_understood(name):
    error, lack = SHAPES[name]
    found = memory_shortage(error)
    assert found is not None
    assert found.where == lack.where
    for field in ("asked", "there", "free"):
        assert getattr(found, field) == pytest.approx(getattr(lack, field)), field
    assert outcome(error)[0] == 3


@pytest.mark.parametrize(
    "error",
    [
        JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (5 vs. 4)"),
        JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.1M of 16.0M vmem."
        ),
        RuntimeError("shape [2, 3] is invalid for input of size 7"),
        DataError("line 3: out of memory, said the elephant"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
    ],
)
def test_what_is_no_lack_of_memory_is_not_taken_for_one(error):
    assert memory_shortage(error) is None


def test_the_line_says_what_was_asked_for_what_there_is_and_what_helps(make_recipe):
    recipe = make_recipe(batch={"global_examples": 8, "accumulation": 2}, data={"sequence_tokens": 4096})
    run = resolve(recipe)
    helps = (
        "what helps, in this order: plan.remat=full, batch.accumulation=4 or more, plan.shards=params with plan.fsdp=2 or more, "
        "data.sequence_tokens below 4096"
    )
    lack = MemoryShortage("device", 22.78 * GIB, 31.47 * GIB, 12.73 * GIB)
    assert describe_shortage(lack, devices=GPU, run=run) == (
        f"out of device memory: asked for 22.78 GiB, a device has 31.47 GiB, 12.73 GiB of it free; {helps}"
    )
    # What the error does not tell is what the device says of itself.
    bare = describe_shortage(MemoryShortage("device"), devices=GPU, run=run)
    assert bare == f"out of device memory: a device has 79.00 GiB; {helps}"
    # On a CPU the device's memory is the machine's.
    size, whose = host_memory()
    on_cpu = describe_shortage(MemoryShortage("device", GIB), devices=CPU, run=run)
    assert on_cpu == f"out of memory: asked for 1.00 GiB, {whose} {size / GIB:,.2f} GiB; {helps}"
    # Where the machine's own is full, a device's settings do not help.
    beside = describe_shortage(MemoryShortage("machine", GIB), devices=GPU, run=run)
    assert beside.endswith("what helps: fewer processes on this machine, or one with more memory")
    assert describe_shortage(MemoryShortage("device", GIB)) == "out of device memory: asked for 1.00 GiB"
    assert describe_shortage(MemoryShortage("device")) == "out of device memory"


def test_only_what_is_not_there_already_helps(make_recipe):
    full = {"remat": "full"}
    batch = {"global_examples": 8, "accumulation": 4}
    assert what_helps(resolve(make_recipe(plan=full, batch=batch)), "jax") == [
        "batch.accumulation=8 or more",
        "plan.shards=params with plan.fsdp=2 or more",
        "data.sequence_tokens below 160",
    ]
    # Two replicas of one row each: there is nothing more to accumulate.
    sharded = full | {"fsdp": 2, "shards": "params"}
    assert what_helps(resolve(make_recipe(plan=sharded, batch=batch)), "jax") == [
        "plan.fsdp above 2",
        "data.sequence_tokens below 160",
    ]
    one_part = full | {"fsdp": 2, "shards": "optimizer"}
    assert what_helps(resolve(make_recipe(plan=one_part, batch=batch)), "torch")[0] == "plan.shards=params"
    # What costs nothing comes first. In fp64 there is no other attention.
    dear = {"attention": "reference", "loss_chunk": 4096}
    free = ["plan.attention=auto", "plan.loss_chunk=auto", "plan.remat=full"]
    assert what_helps(many_logits(make_recipe(plan=dear, batch=batch)), "jax")[:3] == free
    exact = make_recipe(plan=dear, batch=batch, precision={"policy": "fp64"})
    assert what_helps(many_logits(exact), "jax")[:2] == free[1:]
    # DeepSpeed has no float64: no advice that would be refused.
    fp64 = make_recipe(plan=full, batch=batch, precision={"policy": "fp64"})
    assert not any("shards" in line for line in what_helps(resolve(fp64), "torch"))
    assert any("shards" in line for line in what_helps(resolve(fp64), "jax"))


def many_logits(recipe: Recipe) -> Run:
    """The run with a vocabulary of which `plan.loss_chunk=auto` takes 32 of 160 positions, where a pass has two rows."""
    run = resolve(recipe)
    return replace(run, spec=replace(run.spec, vocab=2**20))


def test_the_loss_in_chunks_of_auto_is_advised_only_where_they_are_smaller(make_recipe):
    for chunk, helps in ((33, True), (32, False), (16, False), ("auto", False)):
        recipe = make_recipe(plan={"loss_chunk": chunk}, batch={"global_examples": 8, "accumulation": 4})
        assert ("plan.loss_chunk=auto" in what_helps(many_logits(recipe), "jax")) == helps, chunk
        # Of a small vocabulary `auto` makes the logits of the whole row at once.
        assert "plan.loss_chunk=auto" not in what_helps(resolve(recipe), "jax")
        # One row in a pass: 64 positions.
        one = make_recipe(plan={"loss_chunk": chunk}, batch={"global_examples": 8, "accumulation": 8})
        assert "plan.loss_chunk=auto" not in what_helps(many_logits(one), "jax")


def test_limits_below_the_machine_s_memory_are_named(monkeypatch):
    size, whose = host_memory()
    monkeypatch.setattr("resource.getrlimit", lambda which: (size // 2, size))
    assert host_memory() == (size // 2, "this process may have (ulimit -v)")
    assert whose in ("this machine has", "this container has", "this process may have (ulimit -v)")


def test_a_run_s_lack_of_memory_becomes_that_line(make_recipe, tmp_path):
    with (
        pytest.raises(MachineError) as raised,
        explained(resolve(make_recipe()), lambda: replace(GPU, backend="jax"), out=tmp_path),
    ):
        raise SHAPES["XLA on a GPU"][0]
    assert str(raised.value).startswith(
        "out of device memory: asked for 4.44 GiB, a device has 79.00 GiB; what helps"
    )
    assert raised.value.__notes__ == ["nothing was saved yet"]
