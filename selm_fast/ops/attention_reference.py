"""Attention branch by branch in plain torch, forward and backward: the reference that other back ends are held to.

Serves every device and dtype, fp64 among them; reads the layout on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selm_fast.ops.attention_layout import Case, Layout, Scores
from selm_fast.ops.kv_gather import gather, gather_backward


def refusal(_: Case) -> None:
    """It serves every case."""


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> tuple[Tensor, Tensor]:
    """q (T, H, Dh), k and v (T, Hk, Dh) -> out (T, H, Dh), dtype of q, contiguous; logsumexp (H, T) fp32."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    keys, values = gather(k, layout.kv_index), gather(v, layout.kv_index)
    for q0, nq, k0, nk in layout.branches():
        rows, cols = slice(q0, q0 + nq), slice(k0, k0 + nk)
        out[rows], lse[:, rows] = branch_forward(q[rows], keys[cols], values[cols], scores)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by q, k and v, contiguous; out and lse, which other back ends need, are computed anew."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    keys, values = gather(k, layout.kv_index), gather(v, layout.kv_index)
    dkeys, dvalues = (torch.empty_like(t, dtype=_high(t)) for t in (keys, values))
    for q0, nq, k0, nk in layout.branches():
        rows, cols = slice(q0, q0 + nq), slice(k0, k0 + nk)
        dq[rows], dkeys[cols], dvalues[cols] = branch_backward(grad[rows], q[rows], keys[cols], values[cols], scores)
    dk, dv = gather_backward((dkeys, dvalues), layout.kv_index, k.shape[0], k.dtype)
    return dq, dk, dv


def branch_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """One branch: q (Lq, H, Dh), k and v (Lk, Hk, Dh), Lk >= Lq -> out (Lq, H, Dh), logsumexp (H, Lq).

    Scores as in `Scores`, masked; softmax in fp32 (fp64 for fp64 inputs).
    """
    queries, keys, values = _high_heads_first(q, k, v)
    capped = _capped(queries, keys, scores) + causal_mask(q.shape[0], k.shape[0], scores.window, queries)
    return (capped.softmax(-1) @ values).transpose(0, 1).to(q.dtype), capped.logsumexp(-1)


def branch_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one branch by q, k and v, in fp32 (fp64): a custom op may not call autograd.

    With weights P, dP = dO V^T and dS = P o (dP - rowsum(P o dP)) o (1 - (scores / softcap)^2):
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
    """
    queries, keys, values = _high_heads_first(q, k, v)
    d_out = grad.to(queries.dtype).transpose(0, 1)
    capped = _capped(queries, keys, scores)
    weights = (capped + causal_mask(q.shape[0], k.shape[0], scores.window, queries)).softmax(-1)
    d_weights = d_out @ values.transpose(1, 2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scores.scale
    if scores.softcap is not None:
        d_scores *= 1 - (capped / scores.softcap).square()
    d_keys, d_values = (
        t.transpose(0, 1).unflatten(1, (k.shape[1], -1)).sum(2)
        for t in (d_scores.transpose(1, 2) @ queries, weights.transpose(1, 2) @ d_out)
    )
    return (d_scores @ keys).transpose(0, 1), d_keys, d_values


def causal_mask(num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor:
    """Additive causal mask (Lq, Lk), bottom-right aligned; with a window a query sees its own key and window - 1
    before."""
    query = torch.arange(num_keys - num_queries, num_keys, device=like.device).unsqueeze(1)
    key = torch.arange(num_keys, device=like.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def _high(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _high_heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (H, L, Dh) in fp32 (fp64); each key head stands beside the query heads that it serves."""
    high, repeats = _high(q), q.shape[1] // k.shape[1]
    keys, values = (t.to(high).repeat_interleave(repeats, dim=1).transpose(0, 1) for t in (k, v))
    return q.to(high).transpose(0, 1), keys, values


def _capped(queries: Tensor, keys: Tensor, scores: Scores) -> Tensor:
    plain = queries @ keys.transpose(1, 2) * scores.scale
    return plain if scores.softcap is None else scores.softcap * torch.tanh(plain / scores.softcap)
