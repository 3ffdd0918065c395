"""Who computes the layers: plain torch, and the C++ kernels of every instruction set that the processor has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from selm_fast.ops import extension
from tests.ops.triton_cases import poisoned_memory

REQUIRED = os.environ.get("SELM_FAST_EXTENSION") == "1"
CPP = pytest.mark.skipif(not (extension.available() or REQUIRED), reason=extension.status())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", *(pytest.param(name, marks=CPP) for name in ("avx512", "avx2", "any"))])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """A back end, with the kernels of one instruction set; what nobody wrote holds NaN."""
    with poisoned_memory():
        if request.param == "torch":
            yield "torch"
            return
        usable = torch.ops.selm_fast_cpp.variants()
        if request.param not in usable:
            pytest.skip("this processor lacks it")
        torch.ops.selm_fast_cpp.set_variant(request.param)
        yield "cpp"
        torch.ops.selm_fast_cpp.set_variant(usable[0])


def in_dtype(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Copies that gradients are asked for."""
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
