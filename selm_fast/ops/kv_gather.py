"""The gather of key and value rows that lets branches share a prompt, and its backward: a sum in fp32, in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selm_fast.ops.backend import resolve


def gather(rows: Tensor, kv_index: Tensor) -> Tensor:
    """rows[kv_index]: (T, Hk, Dh), (Tk,) int64 -> (Tk, Hk, Dh), contiguous."""
    return rows.index_select(0, kv_index)


def gather_backward(
    grads: Sequence[Tensor], kv_index: Tensor, num_rows: int, dtype: torch.dtype, *, backend: str = "auto"
) -> list[Tensor]:
    """Gradients of the gathered rows: the sums over their copies, in fp32 in the order of kv_index, rounded once.

    grads: (Tk, Hk, Dh) each, contiguous, fp32|bf16|fp16; fp64 is added in fp64.
    Returns (num_rows, Hk, Dh) each, in `dtype`; equal bits from run to run, and no host sync on CUDA.
    """
    device = kv_index.device
    backend = resolve(backend, device, grads[0].dtype)
    if device.type == "cpu" and backend != "triton":
        return [_index_sum(grad, kv_index, num_rows).to(dtype) for grad in grads]
    # Made anew in every layer: 20,000 indices sort in microseconds, and an order kept for the next layer would be
    # state that outlives its batch.
    in_order, order = torch.sort(kv_index, stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(num_rows + 1, device=device))
    if backend != "triton":
        return [_segment_sum(grad, order, bounds).to(dtype) for grad in grads]
    from selm_fast.ops.segment_sum_triton import segment_sum

    out = [grad.new_empty((num_rows, *grad.shape[1:]), dtype=dtype) for grad in grads]
    for grad, total in zip(grads, out, strict=True):
        segment_sum(grad, order, bounds, total)
    return out


def _high(grad: Tensor) -> Tensor:
    return grad if grad.dtype == torch.float64 else grad.float()


def _index_sum(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """On the CPU index_add_ walks the index in order; on a GPU it adds by atomics, in any order."""
    high = _high(grad)
    return high.new_zeros((num_rows, *high.shape[1:])).index_add_(0, index, high)


def _segment_sum(grad: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
    # unsafe: the check that it leaves out reads the bounds on the host.
    return torch.segment_reduce(
        _high(grad).index_select(0, order), "sum", offsets=bounds, axis=0, unsafe=True, initial=0.0
    )
