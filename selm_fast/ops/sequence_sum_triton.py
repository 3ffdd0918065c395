"""Sums of token log-probs by sequence in Triton: one program a sequence, always in the same order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 1024
NUM_WARPS = 4


@triton.jit
def _sequence_sum_kernel(token_logps_ptr, cu_responses_ptr, out_ptr, stride_token, BLOCK_N: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_responses_ptr + sequence).to(tl.int64)
    last = tl.load(cu_responses_ptr + sequence + 1).to(tl.int64)
    sums = tl.zeros((BLOCK_N,), tl.float64)
    # Blocks begin at the sequence's own start, so its neighbours do not change which tokens are added to which.
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        sums += tl.load(token_logps_ptr + tokens * stride_token, mask=tokens < last, other=0.0).to(tl.float64)
    tl.store(out_ptr + sequence, tl.sum(sums, 0))


def sequence_sums(token_logps: Tensor, cu_responses: Tensor) -> Tensor:
    """Sum of each sequence, rounded as fp64 rounds: an empty one is 0, whatever stands beside it.

    token_logps: (N,) fp64|fp32|bf16|fp16.  cu_responses: (S+1,) int64|int32, from 0 to N.  Returns (S,) fp64.
    """
    num_sequences = cu_responses.shape[0] - 1
    out = torch.empty(num_sequences, dtype=torch.float64, device=token_logps.device)
    if num_sequences:
        with torch.cuda.device_of(token_logps):
            _sequence_sum_kernel[(num_sequences,)](
                token_logps, cu_responses.contiguous(), out, token_logps.stride(0), BLOCK_N=BLOCK_N, num_warps=NUM_WARPS
            )
    return out
