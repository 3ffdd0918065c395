"""The one place that multiplies matrices: products of 16-bit operands come out in fp32 wherever a GEMM can do it."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, backend: str) -> None:
    """out = a b, or out += a b: a (M, K), b (K, N) of one dtype, any strides; out (M, N) fp32 (fp64 for fp64).

    Products and sums are fp32 ones. On a CPU, 16-bit operands need the C++ back end and a processor for it; otherwise
    the product is rounded to their dtype once, by 2^-9 (bf16), before it is written or added.
    """
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    elif backend == "cpp" and torch.ops.selm_fast_cpp.mm_serves(a.dtype):
        torch.ops.selm_fast_cpp.mm_(out, a, b, accumulate)
    elif accumulate:
        out += torch.mm(a, b)
    else:
        out.copy_(torch.mm(a, b))
