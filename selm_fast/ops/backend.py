"""The one place that decides which back end serves an op."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from selm_fast.ops import extension

Backend = Literal["auto", "torch", "triton", "cpp"]
BACKENDS = ("auto", "torch", "triton", "cpp")


def resolve(backend: str, device: torch.device, dtype: torch.dtype = torch.float32, *, triton: bool = True) -> str:
    """The back end for tensors on a device: "auto" is Triton on CUDA, csrc's C++ on the CPU where it is built.

    fp64 is served by plain torch alone.  triton: False for an op that has no kernels in Triton.

    Raises ValueError for a back end that is unknown or cannot run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if dtype == torch.float64 and backend not in ("auto", "torch"):
        raise ValueError(f"backend {backend!r} serves fp32, bf16 and fp16; got fp64 tensors, which need 'torch'")
    if backend == "auto":
        if dtype == torch.float64:
            return "torch"
        if triton and device.type == "cuda" and _has_triton():
            return "triton"
        return "cpp" if device.type == "cpu" and extension.available() else "torch"
    if backend == "triton" and not triton:
        raise ValueError("backend 'triton' does not serve this op; 'auto', 'torch' and 'cpp' do")
    if backend == "triton" and not (_has_triton() and (device.type == "cuda" or interpreted())):
        raise ValueError(
            "backend 'triton' needs the package triton and tensors on CUDA (or TRITON_INTERPRET=1, set before its "
            f"first use); the tensors are on {device.type}"
        )
    if backend == "cpp" and not (device.type == "cpu" and extension.available()):
        raise ValueError(
            f"backend 'cpp' needs tensors on the CPU, got {device.type}, and the extension of csrc/: "
            f"{extension.status()}"
        )
    return backend


def interpreted() -> bool:
    """Does Triton run its kernels in Python, on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
