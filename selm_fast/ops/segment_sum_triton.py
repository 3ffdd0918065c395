"""The backward of a gather of rows in Triton: rows that were read several times get their gradients summed in order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_W = 1024
NUM_WARPS = 4
# A prompt's rows are read by the two or three responses of its group: this many reads wait for memory together.
ROWS_IN_FLIGHT = 4


@triton.jit
def _segment_sum_kernel(
    source_ptr, order_ptr, bounds_ptr, out_ptr, W, BLOCK_W: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    first = tl.load(bounds_ptr + t).to(tl.int64)
    last = tl.load(bounds_ptr + t + 1).to(tl.int64)
    total = tl.zeros((BLOCK_W,), tl.float32)
    for start in range(first, last, ROWS):
        for nth in tl.static_range(ROWS):
            here = start + nth < last
            row = tl.load(order_ptr + start + nth, mask=here, other=0).to(tl.int64)
            mask = cols < tl.where(here, W, 0)
            total += tl.load(source_ptr + row * W + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * W + cols, total, mask=cols < W)


def segment_sum(source: Tensor, order: Tensor, bounds: Tensor, out: Tensor) -> None:
    """out[t] = the sum of source[order[j]] for bounds[t] <= j < bounds[t+1], in order, in fp32, rounded once.

    source: (Tk, H, Dh) fp32|bf16|fp16, contiguous.  order: (Tk,) int64.  bounds: (T+1,) int64|int32.
    out: (T, H, Dh) fp32|bf16|fp16, contiguous.
    """
    width = source.shape[1] * source.shape[2]
    if not out.numel():
        return
    assert source.is_contiguous() and out.is_contiguous()
    block = min(triton.next_power_of_2(width), MAX_BLOCK_W)
    with torch.cuda.device_of(source):
        _segment_sum_kernel[(out.shape[0], triton.cdiv(width, block))](
            source, order.contiguous(), bounds.contiguous(), out, width,
            BLOCK_W=block, ROWS=ROWS_IN_FLIGHT, num_warps=NUM_WARPS,
        )  # fmt: skip
