"""What this machine has, and whether it is enough: device, dtype, memory, disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from selm_fast.errors import Refused

if TYPE_CHECKING:  # not needed at run time, and benchmarks measure where there is no pydantic
    from selm_fast.config import Config


COMPILES_BF16 = "2.13"  # the first torch whose compiler obeys emulate_precision_casts on a CPU


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype a run uses. Raises Refused where the machine does not have them."""
    processes = os.environ.get("WORLD_SIZE", "1")  # what torchrun and its like set
    if processes != "1":
        raise Refused(
            f"started as one of {processes} processes (WORLD_SIZE); training runs in one: start it without torchrun"
        )
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise Refused(
            "device is cuda and this machine has no usable NVIDIA GPU: set device to cpu, or see selm-fast doctor"
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


def check_room(path: Path, count: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model of `count` weights that this machine cannot hold while it trains, or not save.

    Memory: fp32 masters, gradients and two moments, and bf16 copies where compute is bf16; activations come on top.
    Disk: one checkpoint (masters and moments) and the exported model.
    """
    copies = 0 if dtype == torch.float32 else dtype.itemsize
    needed, there = count * (16 + copies), memory_bytes(device)
    if there < needed:
        raise Refused(
            f"{device.type} has {there / 2**30:.1f} GiB of memory; weights, gradients and optimiser of this model "
            f"take {needed / 2**30:.1f} GiB: train a smaller model, or on a larger machine"
        )
    needed = count * (12 + dtype.itemsize)
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refused(
            f"output_dir {path} has {free / 2**30:.1f} GiB free; one checkpoint and the exported model "
            f"take {needed / 2**30:.1f} GiB: free space or choose another disk"
        )


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory of a device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
