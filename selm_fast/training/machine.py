"""What this machine has, and whether it is enough: device, dtype, memory, disk."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selm_fast.errors import Refused

if TYPE_CHECKING:  # not needed at run time, and benchmarks measure where there is no pydantic
    from selm_fast.config import Config
    from selm_fast.training.room import Plan

log = logging.getLogger(__name__)

COMPILES_BF16 = "2.13"  # the first torch whose compiler obeys emulate_precision_casts on a CPU


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype a run uses. Raises Refused where the machine does not have them."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise Refused(
            "device is cuda and this machine has no usable NVIDIA GPU: set device to cpu, or see selm-fast doctor"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu and config.device != "cpu" and local > 0 and local >= torch.cuda.device_count():
        raise Refused(
            f"this is process {local + 1} on a machine of {torch.cuda.device_count()} GPUs; each takes one: start "
            "fewer (--nproc), or set device to cpu"
        )
    device = torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")
    if config.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise Refused(
            "dtype is bfloat16 and this GPU has none (compute capability 8.0 is the first that has): "
            "set dtype to float32"
        )
    if config.model.compile and dtype == torch.bfloat16 and device.type == "cpu" and torch.__version__ < COMPILES_BF16:
        raise Refused(
            f"model.compile in bfloat16 on a CPU needs torch {COMPILES_BF16} or newer and this is {torch.__version__}, "
            "which rounds otherwise with gradients than without, so that no first step would be exact: "
            "set model.compile to false or dtype to float32, or install a newer torch"
        )
    return device, dtype


def check_room(path: Path, count: int, device: torch.device, dtype: torch.dtype, plan: Plan | None = None) -> None:
    """Refuse a model of `count` weights that this machine cannot hold while it trains, or not save.

    plan: of the run where FSDP shards it; None: one process on a CPU, where memory is counted without activations:
    fp32 masters, gradients and two moments, and bf16 copies where compute is bf16.
    A plan is refused where its state alone is more than a device has, or its estimate is so by far; where it may be
    that it does not fit, that is said in a warning.
    Disk: one checkpoint (masters and moments) and the exported model; other processes' parts go to the same disk.
    """
    if plan is None:
        _check_state(count, device, dtype)
    else:
        _check_plan(plan, device)
    moments = 8 if plan is None else 2 * plan.model.moment_bytes
    needed = count * (4 + moments + dtype.itemsize)
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refused(
            f"output_dir {path} has {free / 2**30:.1f} GiB free; one checkpoint and the exported model "
            f"take {needed / 2**30:.1f} GiB: free space or choose another disk"
        )


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a bare matmul, FLOP/s: the best of three, measured once a process."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are left alone
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device)


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of three runs of some work (s)."""
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _check_state(count: int, device: torch.device, dtype: torch.dtype) -> None:
    copies = 0 if dtype == torch.float32 else dtype.itemsize
    needed, there = count * (16 + copies), memory_bytes(device)
    if there < needed:
        raise Refused(
            f"{device.type} has {there / 2**30:.1f} GiB of memory; weights, gradients and optimiser of this model "
            f"take {needed / 2**30:.1f} GiB: train a smaller model, or on a larger machine"
        )


def _check_plan(plan: Plan, device: torch.device) -> None:
    from selm_fast.training.room import SURELY, advise

    there = memory_bytes(device)
    if device.type == "cpu":
        there //= plan.ranks or 1  # the processes share it
    if plan.fits(there):
        return
    state = plan.phases["optimiser"].total
    changes, fits = advise(plan, there, most_ranks=plan.ranks or 1)
    remedy = (
        f"set {', '.join(f'{change.name} to {change.value}' for change in changes)}"
        if fits
        else "train a smaller model, or on more or larger devices"
    )
    message = (
        f"{device.type} has {there / 2**30:.1f} GiB of memory for each process, and this run is estimated to take "
        f"{plan.total / 2**30:.1f} GiB, {state / 2**30:.1f} GiB of them for weights, gradients and optimiser: "
        f"{remedy}; selm-fast estimate tells more"
    )
    if state > there or plan.total > SURELY * there:
        raise Refused(message)
    log.warning("%s", message)


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory of a device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
