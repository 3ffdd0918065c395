"""Attention over packed groups whose responses share one encoded prompt.

Each branch's queries are a run of consecutive rows; its keys are any rows, named by `kv_index`: the prompt's, encoded
once, followed by its own. The causal mask is aligned bottom-right: the last query sees the last key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def branch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One branch in plain torch, the reference: q (Lq, H, Dh), k and v (Lk, Hk, Dh), Lk >= Lq -> (Lq, H, Dh).

    scores = softcap * tanh(scale * q k^T / softcap), masked, softmax in fp32 (fp64 for fp64 inputs).
    """
    queries, keys, values = _high_heads_first(q, k, v)
    scores = _capped_scores(queries, keys, scale, softcap)
    weights = (scores + _mask(q.shape[0], k.shape[0], window, scores)).softmax(-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)


def branch_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `branch_attention` by q, k and v, in fp32 (fp64): a custom op may not call autograd.

    With weights P, dP = dO V^T and dS = P o (dP - rowsum(P o dP)) o (1 - (scores / softcap)^2):
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
    """
    queries, keys, values = _high_heads_first(q, k, v)
    d_out = grad.to(queries.dtype).transpose(0, 1)
    scores = _capped_scores(queries, keys, scale, softcap)
    weights = (scores + _mask(q.shape[0], k.shape[0], window, scores)).softmax(-1)
    d_weights = d_out @ values.transpose(1, 2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
    if softcap is not None:
        d_scores *= 1 - (scores / softcap).square()
    d_keys, d_values = (
        t.transpose(0, 1).unflatten(1, (k.shape[1], -1)).sum(2)
        for t in (d_scores.transpose(1, 2) @ queries, weights.transpose(1, 2) @ d_out)
    )
    return (d_scores @ keys).transpose(0, 1), d_keys, d_values


def _high_heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (H, L, Dh) in fp32 (fp64); each key head stands beside the query heads that it serves."""
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeats = q.shape[1] // k.shape[1]
    keys, values = (t.to(high).repeat_interleave(repeats, dim=1).transpose(0, 1) for t in (k, v))
    return q.to(high).transpose(0, 1), keys, values


def _capped_scores(queries: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = queries @ keys.transpose(1, 2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _mask(num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
    """Additive causal mask (Lq, Lk), bottom-right aligned; with a window a query sees its own key and window - 1
    before."""
    query = torch.arange(num_keys - num_queries, num_keys, device=like.device).unsqueeze(1)
    key = torch.arange(num_keys, device=like.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def _branches(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:], strict=False):
        yield slice(q0, q1), slice(k0, k1)


def _uses_flash(q: Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and softcap == 0.0


def _heads_first(t: Tensor, repeats: int = 1) -> Tensor:
    """(L, Hk, Dh) -> (1, Hk * repeats, L, Dh); each key head stands beside the query heads that it serves."""
    return t.repeat_interleave(repeats, dim=1).transpose(0, 1).unsqueeze(0)


def _flash_mask(q: Tensor, k: Tensor, window: int) -> tuple[bool, Tensor | None]:
    """is_causal and mask: the kernel's own causal mask is aligned top-left, so it serves square branches only."""
    if q.shape[0] == k.shape[0] and (window < 0 or window >= k.shape[0]):
        return True, None
    return False, _mask(q.shape[0], k.shape[0], window if window >= 0 else None, q)


@torch.library.custom_op("selm_fast::shared_prefix_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (T, H, Dh) and, where flash ran, logsumexp (H, T) fp32. window -1: none; softcap 0: none."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]) if _uses_flash(q, softcap) else (0, 0), dtype=torch.float32)
    keys, values = k[kv_index], v[kv_index]
    for rows, cols in _branches(cu_seqlens_q, cu_seqlens_k):
        qb, kb, vb = q[rows], keys[cols], values[cols]
        if _uses_flash(q, softcap):
            repeats = q.shape[1] // k.shape[1]
            is_causal, mask = _flash_mask(qb, kb, window)
            ob, lb = _flash_cpu(
                _heads_first(qb),
                _heads_first(kb, repeats),
                _heads_first(vb, repeats),
                0.0,
                is_causal,
                attn_mask=mask,
                scale=scale,
            )
            out[rows], lse[:, rows] = ob.squeeze(0).transpose(0, 1), lb.squeeze(0)
        else:
            out[rows] = branch_attention(
                qb, kb, vb, scale=scale, window=window if window >= 0 else None, softcap=softcap or None
            )
    return out, lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_shape = (q.shape[1], q.shape[0]) if _uses_flash(q, softcap) else (0, 0)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("selm_fast::shared_prefix_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    keys, values = k[kv_index], v[kv_index]
    dkeys, dvalues = torch.empty_like(keys, dtype=torch.float32), torch.empty_like(values, dtype=torch.float32)
    repeats = q.shape[1] // k.shape[1]
    for rows, cols in _branches(cu_seqlens_q, cu_seqlens_k):
        qb, kb, vb, gb = q[rows], keys[cols], values[cols], grad[rows]
        if _uses_flash(q, softcap):
            is_causal, mask = _flash_mask(qb, kb, window)
            dqb, dkb, dvb = _flash_cpu_backward(
                _heads_first(gb), _heads_first(qb), _heads_first(kb, repeats), _heads_first(vb, repeats),
                _heads_first(out[rows]), lse[:, rows].unsqueeze(0), 0.0, is_causal, attn_mask=mask, scale=scale,
            )  # fmt: skip
            dq[rows] = dqb.squeeze(0).transpose(0, 1)
            dkeys[cols], dvalues[cols] = (
                t.squeeze(0).transpose(0, 1).unflatten(1, (-1, repeats)).sum(2, dtype=torch.float32) for t in (dkb, dvb)
            )
        else:
            dq[rows], dkeys[cols], dvalues[cols] = branch_attention_backward(
                gb, qb, kb, vb, scale=scale, window=window if window >= 0 else None, softcap=softcap or None
            )
    return dq, _segment_sum(dkeys, kv_index, k), _segment_sum(dvalues, kv_index, v)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _segment_sum(source: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Backward of like[index]: rows of `source` (fp32) added up by index in a fixed order, rounded once."""
    if source.device.type == "cpu":
        return torch.zeros_like(like, dtype=torch.float32).index_add_(0, index, source).to(like.dtype)
    order = torch.argsort(index, stable=True)  # index_add_ on a GPU adds by atomics, in any order
    lengths = torch.bincount(index, minlength=like.shape[0])
    return torch.segment_reduce(source[order], "sum", lengths=lengths, axis=0, initial=0.0).to(like.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_index, cu_seqlens_q, cu_seqlens_k, scale, window, softcap = inputs
    ctx.save_for_backward(q, k, v, *output, kv_index, cu_seqlens_q, cu_seqlens_k)
    ctx.settings = (scale, window, softcap)


@once_differentiable
def _autograd(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None, None)


_attention.register_autograd(_autograd, setup_context=_setup_context)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of B branches over T packed rows, in one call; prompts shared by branches are stored once.

    q: (T, H, Dh).  k, v: (T, Hk, Dh), H a multiple of Hk; fp32|bf16|fp16.
    kv_index: (Tk,) int64, which of the T rows each key row is; branch b owns entries cu_seqlens_k[b] to
    cu_seqlens_k[b+1].
    cu_seqlens_q, cu_seqlens_k: (B+1,) int32.  A branch has at least as many keys as queries and its last query sees
    all.
    max_seqlen_q, max_seqlen_k: the longest branch (what variable-length GPU kernels size their grid by).
    scale: multiplies q k^T.  window: keys a query sees, its own among them (None: all).  softcap: of the scores, or
    None.
    Returns (T, H, Dh), dtype of q; differentiable in q, k, v. The gradients of shared rows are summed in fp32, in
    order.
    Raises ValueError for shapes that do not fit.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be (T, H, Dh) and k, v (T, Hk, Dh) with H a multiple of Hk; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.dim() != 1:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must both be (B+1,); got {tuple(cu_seqlens_q.shape)} and "
            f"{tuple(cu_seqlens_k.shape)}"
        )
    if max_seqlen_q > max_seqlen_k:
        raise ValueError(
            f"a branch has at least as many keys as queries; got max_seqlen_q {max_seqlen_q} > max_seqlen_k "
            f"{max_seqlen_k}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None; got {window}")
    out, _ = _attention(
        q,
        k,
        v,
        kv_index,
        cu_seqlens_q,
        cu_seqlens_k,
        scale,
        -1 if window is None else window,
        0.0 if softcap is None else softcap,
    )
    return out  # type: ignore[no-any-return]
