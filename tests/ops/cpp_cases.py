"""Who computes: plain torch, and the C++ kernels of every instruction set that the processor has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from selm_fast.ops import extension
from tests.ops.triton_cases import poisoned_memory

REQUIRED = os.environ.get("SELM_FAST_EXTENSION") == "1"
CPP = pytest.mark.skipif(not (extension.available() or REQUIRED), reason=extension.status())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


VARIANTS = ("avx512", "avx2", "any")


@contextmanager
def running(variant: str) -> Iterator[None]:
    """The kernels of one instruction set, where the processor has it; what nobody wrote holds NaN."""
    usable = torch.ops.selm_fast_cpp.variants()
    if variant not in usable:
        pytest.skip("this processor lacks it")
    torch.ops.selm_fast_cpp.set_variant(variant)
    with poisoned_memory():
        yield
    torch.ops.selm_fast_cpp.set_variant(usable[0])


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, whose kernels run."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=["torch", *(pytest.param(name, marks=CPP) for name in VARIANTS)])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """A back end, with the kernels of one instruction set."""
    with poisoned_memory() if request.param == "torch" else running(request.param):
        yield "torch" if request.param == "torch" else "cpp"


def in_dtype(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Copies that gradients are asked for."""
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
