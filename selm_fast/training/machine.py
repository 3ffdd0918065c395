"""What this machine has, and whether it is enough: device, dtype, disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from selm_fast.config import Config
from selm_fast.errors import Refused
from selm_fast.model import Policy


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype a run uses. Raises Refused where the machine does not have them."""
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
    return device, dtype


def check_disk(path: Path, policy: Policy, dtype: torch.dtype) -> None:
    """Refuse where not even one checkpoint (fp32 masters and two moments) and the exported model fit."""
    count = sum(parameter.numel() for parameter in policy.parameters())
    needed = count * (12 + dtype.itemsize)
    there = path
    while not there.exists():
        there = there.absolute().parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise Refused(
            f"output_dir {path} has {free / 2**30:.1f} GiB free; one checkpoint and the exported model "
            f"take {needed / 2**30:.1f} GiB: free space or choose another disk"
        )
