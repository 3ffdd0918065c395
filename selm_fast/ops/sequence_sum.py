"""Sums of token log-probs by sequence, in fp64: the order of addition depends on the sequence alone, not the pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selm_fast.ops.backend import Backend, resolve


def segment_sums(token_logps: Tensor, cu_responses: Tensor) -> Tensor:
    """The plain-torch reference: (N,), (S+1,) -> (S,) fp64."""
    # segment_reduce adds the tokens of a segment one after the other: deterministic, and blind to its neighbours.
    return torch.segment_reduce(token_logps.double(), "sum", offsets=cu_responses.long(), initial=0.0)


def sum_by_sequence(token_logps: Tensor, cu_responses: Tensor, backend: str) -> Tensor:
    """`segment_sums` by the back end that serves it: Triton, or else torch."""
    if resolve(backend, token_logps.device) == "triton":
        from selm_fast.ops.sequence_sum_triton import sequence_sums

        summed: Tensor = sequence_sums(token_logps, cu_responses)
        return summed
    return segment_sums(token_logps, cu_responses)


def spread(values: Tensor, cu_responses: Tensor, num_tokens: int) -> Tensor:
    """Each sequence's value for each of its tokens: (S,), (S+1,) -> (N,)."""
    return torch.repeat_interleave(values, cu_responses.long().diff(), output_size=num_tokens)


@torch.library.custom_op("selm_fast::sequence_sum", mutates_args=())
def _op(token_logps: Tensor, cu_responses: Tensor, backend: str) -> Tensor:
    check_covers(cu_responses, token_logps.shape[0])
    return sum_by_sequence(token_logps, cu_responses, backend)


@_op.register_fake
def _(token_logps: Tensor, cu_responses: Tensor, backend: str) -> Tensor:
    return token_logps.new_empty(cu_responses.shape[0] - 1, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    token_logps, cu_responses, _ = inputs
    ctx.save_for_backward(cu_responses)
    ctx.dtype, ctx.num_tokens = token_logps.dtype, token_logps.shape[0]


@once_differentiable
def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return spread(grad.to(ctx.dtype), ctx.saved_tensors[0], ctx.num_tokens), None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


def sequence_sum(token_logps: Tensor, cu_responses: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Sum of the token log-probs (nats) of each sequence.

    token_logps: (N,) floating point.
    cu_responses: (S+1,) integer; sequence s holds tokens cu_responses[s] to cu_responses[s+1], from 0 to N.
    backend: "auto" | "torch" | "triton" | "cpp"; torch and cpp are the same here.
    Returns (S,) fp64, deterministic, differentiable; an empty sequence sums to 0.
    Raises ValueError for shapes or dtypes that do not fit and for a back end that cannot run.
    """
    if token_logps.dim() != 1 or not token_logps.is_floating_point():
        raise ValueError(f"token_logps must be (N,) floating point; got {token_logps.dtype} {tuple(token_logps.shape)}")
    check_offsets(cu_responses)
    summed: Tensor = _op(token_logps, cu_responses, backend)
    return summed


def check_offsets(cu_responses: Tensor) -> None:
    """Raise ValueError for what is no list of offsets."""
    if cu_responses.dim() != 1 or cu_responses.shape[0] < 1 or cu_responses.is_floating_point():
        raise ValueError(f"cu_responses must be (S+1,) integer; got {cu_responses.dtype} {tuple(cu_responses.shape)}")


def check_covers(cu_responses: Tensor, size: int) -> None:
    """Raise ValueError for offsets on the CPU that do not rise from 0 to `size`."""
    if cu_responses.device.type != "cpu":
        return  # reading them would stop the device
    if int(cu_responses[0]) != 0 or int(cu_responses[-1]) != size or not bool((cu_responses.diff() >= 0).all()):
        raise ValueError(
            f"cu_responses must rise from 0 to N = {size}; got {cu_responses[:4].tolist()}..."
            f"{cu_responses[-1:].tolist()}"
        )
