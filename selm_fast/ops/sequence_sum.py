"""Sums of token log-probs by sequence, in fp64: the order of addition is that of the tokens, whatever the pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_logps: Tensor, cu_responses: Tensor) -> Tensor:
        ctx.save_for_backward(cu_responses)
        ctx.dtype, ctx.num_tokens = token_logps.dtype, token_logps.shape[0]
        # segment_reduce adds the tokens of a segment one after the other: deterministic, and blind to its neighbours.
        return torch.segment_reduce(token_logps.double(), "sum", offsets=cu_responses.long(), initial=0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_responses,) = ctx.saved_tensors
        lengths = cu_responses.long().diff()
        return torch.repeat_interleave(grad.to(ctx.dtype), lengths, output_size=ctx.num_tokens), None


def sequence_sum(token_logps: Tensor, cu_responses: Tensor) -> Tensor:
    """Sum of the token log-probs (nats) of each sequence.

    token_logps: (N,) floating point.
    cu_responses: (S+1,) integer; sequence s holds tokens cu_responses[s] to cu_responses[s+1], from 0 to N.
    Returns (S,) fp64, deterministic, differentiable; an empty sequence sums to 0.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    if token_logps.dim() != 1 or not token_logps.is_floating_point():
        raise ValueError(f"token_logps must be (N,) floating point; got {token_logps.dtype} {tuple(token_logps.shape)}")
    if cu_responses.dim() != 1 or cu_responses.shape[0] < 1 or cu_responses.is_floating_point():
        raise ValueError(f"cu_responses must be (S+1,) integer; got {cu_responses.dtype} {tuple(cu_responses.shape)}")
    if cu_responses.device.type == "cpu" and not _covers(cu_responses, token_logps.shape[0]):
        raise ValueError(
            f"cu_responses must rise from 0 to N = {token_logps.shape[0]}; got "
            f"{cu_responses[:4].tolist()}...{cu_responses[-1:].tolist()}"
        )
    summed: Tensor = _SequenceSum.apply(token_logps, cu_responses)  # type: ignore[no-untyped-call]
    return summed


def _covers(cu_responses: Tensor, size: int) -> bool:
    return int(cu_responses[0]) == 0 and int(cu_responses[-1]) == size and bool((cu_responses.diff() >= 0).all())
