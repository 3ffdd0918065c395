"""Errors of memory and of collectives become words that name a setting, from what it is to what it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.memory_table import MODELS
from selm_fast.config import Config
from selm_fast.errors import RunFailed
from selm_fast.roofline import Shape
from selm_fast.training.advice import INTACT, explained, explaining
from selm_fast.training.room import Plan, advise, assumed_group
from selm_fast.training.world import PATIENCE

GIB = 2**30
FULL = {"activation_checkpointing": "full"}
# As torch 2.13 words it.
OOM = (
    "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is "
    "free. Including non-PyTorch memory, this process has 78.06 GiB memory in use. Of the allocated memory 71.20 GiB "
    "is allocated by PyTorch, and {lost} is reserved by PyTorch but unallocated."
)


def plan_of(ranks: int | None = 8, device: Any = "cuda", **settings: Any) -> Plan:
    config = Config.model_validate(settings)
    return Plan(config, Shape.from_config(MODELS["Llama-3-8B"]), assumed_group(config), ranks, device)


def told(error: BaseException, phase: str, plan: Plan, *, memory: float = 80, gpus: int = 8) -> str:
    found = explained(error, phase, plan, memory=memory * GIB, gpus=gpus)
    assert found is not None and found.exit_code == 1
    assert INTACT in str(found)
    return str(found)


def oom(lost: str = "312.00 MiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(OOM.format(lost=lost))


def test_a_step_that_is_too_large() -> None:
    plan = plan_of()
    text = told(oom(), "step", plan)
    assert text.startswith("the GPU's memory (80.0 GiB) ran out in phase 'step'. Estimated were ")
    assert "Change --model.activation_checkpointing from none to selective (" in text
    assert "(CUDA out of memory. Tried to allocate 1.96 GiB." in text
    assert "expandable_segments" not in text


def test_memory_lost_in_fragments_is_named() -> None:
    text = told(oom("5.20 GiB"), "step", plan_of(model=FULL))
    assert "5.20 GiB of it are lost between tensors, which PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in text


def test_what_is_set_already_is_not_advised_again() -> None:
    """A plan that should have fitted is to take a tenth less at least."""
    plan = plan_of(model=FULL, optim={"moments": "bfloat16"}, head_mode="recompute")
    text = told(oom(), "step", plan)
    assert "--batch.max_tokens from 16384 to 8192 (" in text
    assert "moments" not in text and "checkpointing" not in text and "head_mode" not in text
    one = plan_of(1, model=FULL, optim={"moments": "bfloat16"}, head_mode="recompute", batch={"max_tokens": 4096})
    text = told(oom(), "step", one)
    assert "--nproc from 1 to 2 (" in text
    text = told(oom(), "step", one, gpus=1)
    assert "No setting makes it take less: train a smaller model, or on more or larger devices (--nproc)" in text


def test_settings_are_named_with_what_they_are_now() -> None:
    text = told(oom(), "step", plan_of(1, model=FULL), memory=128, gpus=1)
    assert "--optim.moments from float32 to bfloat16 (" in text


def test_changes_that_are_not_enough_are_called_so() -> None:
    text = told(oom(), "step", plan_of(1), memory=40, gpus=1)
    assert ", which may not be enough: a smaller model, or more or larger devices, will be" in text


def test_forward_passes_need_other_advice_than_steps() -> None:
    """No gradient, no moments: checkpointing would not help."""
    for phase in ("reference pass", "evaluation"):
        text = told(oom(), phase, plan_of(1), memory=36, gpus=1)
        assert "--batch.max_tokens from 16384 to " in text
        assert "checkpointing" not in text and "moments" not in text
    assert "--nproc from 1 to 2" in told(oom(), "model", plan_of(1), memory=30)


def test_the_same_advice_as_an_estimate_gives() -> None:
    plan = plan_of()
    changes, fits = advise(plan, 80 * GIB)
    assert fits
    text = told(oom(), "step", plan)
    assert all(f"({change.total / GIB:.1f} GiB)" in text for change in changes)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error\nCuda failure 2 'out of memory'",
    ],
)
def test_other_libraries_words_for_it(text: str) -> None:
    assert told(RuntimeError(text), "step", plan_of()).startswith("the GPU's memory (80.0 GiB) ran out")


def test_the_host_s_memory() -> None:
    text = told(MemoryError(), "checkpoint", plan_of())
    assert text.startswith(
        "the host's memory ran out in phase 'checkpoint'. Beside Python, all processes together take"
    )
    assert "about 8.0 GiB of it in this phase" in text and text.endswith("\n(MemoryError)")
    cpu = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"
    assert "about 15.7 GiB" in told(RuntimeError(cpu), "model", plan_of())
    text = told(RuntimeError(cpu), "step", plan_of(None, "cpu"), memory=200)
    assert "Change --model.activation_checkpointing from none to" in text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (
            "NCCL error: unhandled system error\nError while creating shared memory segment /dev/shm/nccl-x",
            "/dev/shm is too small for NCCL: give the container more, as docker's --shm-size 1g or --ipc host does",
        ),
        ("NCCL error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device", "--nproc 8"),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", "raise timeout_s"),
        ("NCCL error: remote process exited or there was a network error", "another process is gone"),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41", "another process is gone"),
        ("NCCL error: invalid argument", "NCCL or the driver may not suit this machine"),
    ],
)
def test_collectives(text: str, remedy: str) -> None:
    said = told(dist.DistBackendError(text), "step", plan_of())
    assert said.startswith("the processes lost each other in phase 'step': ")
    assert remedy in said
    assert "NCCL_DEBUG=INFO" in said and "selm-fast doctor" in said
    assert said.endswith(f"\n({text.splitlines()[0]})")


@pytest.mark.parametrize("phase", [*PATIENCE, "evaluation", "optimiser"])
def test_every_phase_has_words(phase: str) -> None:
    assert f"in phase {phase!r}" in told(oom(), phase, plan_of())


def test_the_error_is_raised_in_the_place_of_torch_s() -> None:
    plan = plan_of()
    with pytest.raises(RunFailed, match="ran out in phase 'step'") as failed, explaining("step", plan, memory=80 * GIB):
        raise oom()
    assert isinstance(failed.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), RunFailed("NCCL: rank 1 is gone"), ValueError("no such thing")]
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, explaining("step", plan_of(), memory=80 * GIB):
        raise error
    assert passed.value is error


def test_what_is_well_stays_well() -> None:
    with explaining("step", plan_of(), memory=80 * GIB):
        pass
