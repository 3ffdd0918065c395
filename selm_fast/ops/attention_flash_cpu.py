"""torch's flash attention kernel for CPUs, branch by branch, in fp32.

What can be done once for all branches is. Inputs of 16 bits are widened: in bf16 the kernel's backward takes up to six
times as long (Zen 4, short branches), and would round each head's share of a key's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from selm_fast.ops.attention_layout import Case, Layout, Scores
from selm_fast.ops.kv_gather import gather, gather_backward

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def refusal(case: Case) -> str | None:
    """Why this back end cannot serve a case, or None."""
    if case.device.type != "cpu":
        return f"serves tensors on the CPU; they are on {case.device.type}"
    if case.dtype == torch.float64:
        return "computes in fp32; the tensors are fp64"
    return "has no softcap" if case.softcap else None


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> tuple[Tensor, Tensor]:
    """q (T, H, Dh), k and v (T, Hk, Dh) -> out (T, H, Dh), dtype of q, contiguous; logsumexp (H, T) fp32."""
    sizes = _sizes(layout)
    queries = _queries(q, k.shape[1]).split(sizes[0], 2)
    keys, values = (_keys(t, layout, q.shape[1]).split(sizes[1], 2) for t in (k, v))
    outs, lses = [], []
    for query, key, value, (is_causal, mask) in zip(queries, keys, values, _masks(*sizes, scores.window), strict=True):
        out, lse = _kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scores.scale)
        outs.append(out)
        lses.append(lse)
    return _joined(outs).flatten(1, 2).to(q.dtype), torch.cat(lses, 2).flatten(0, 1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by q, k and v, contiguous."""
    sizes = _sizes(layout)
    grads, queries, outs = (_queries(t, k.shape[1]).split(sizes[0], 2) for t in (grad, q, out))
    lses = lse.unflatten(0, (k.shape[1], -1)).split(sizes[0], 2)
    keys, values = (_keys(t, layout, q.shape[1]).split(sizes[1], 2) for t in (k, v))
    parts = [
        _kernel_backward(*tensors, 0.0, is_causal, attn_mask=mask, scale=scores.scale)
        for *tensors, (is_causal, mask) in zip(
            grads, queries, keys, values, outs, lses, _masks(*sizes, scores.window), strict=True
        )
    ]
    dq, dkeys, dvalues = zip(*parts, strict=True)
    copies = [_joined(t).sum(2) for t in (dkeys, dvalues)]
    dk, dv = gather_backward(copies, layout.kv_index, k.shape[0], k.dtype)
    return _joined(dq).flatten(1, 2).to(q.dtype), dk, dv


def _sizes(layout: Layout) -> tuple[list[int], list[int]]:
    """Queries and keys of every branch."""
    return layout.cu_seqlens_q.diff().tolist(), layout.cu_seqlens_k.diff().tolist()


def _queries(t: Tensor, key_heads: int) -> Tensor:
    """(T, H, Dh) -> (Hk, H / Hk, T, Dh) fp32, a view where it can be: to the kernel, each key head is a batch."""
    grouped: Tensor = t.float().unflatten(1, (key_heads, -1))
    return grouped.permute(1, 2, 0, 3)


def _keys(t: Tensor, layout: Layout, heads: int) -> Tensor:
    """(T, Hk, Dh) -> (Hk, H / Hk, Tk, Dh) fp32; the heads of a batch are one in memory."""
    rows = gather(t, layout.kv_index).float()
    return rows.transpose(0, 1).unsqueeze(1).expand(-1, heads // t.shape[1], -1, -1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(Hk, H / Hk, L, Dh) of every branch -> (sum of L, Hk, H / Hk, Dh), contiguous.

    The kernel lays its results out as (Hk, L, H / Hk, Dh), which are joined several times faster than their views.
    """
    joined: Tensor = torch.cat([part.transpose(1, 2) for part in parts], 1)
    return joined.transpose(0, 1).contiguous()


def _masks(queries: Sequence[int], keys: Sequence[int], window: int | None) -> Iterator[tuple[bool, Tensor | None]]:
    """is_causal and mask of every branch: the kernel's own causal mask is aligned top-left and serves square ones only.

    All other masks are corners of one: what a query sees depends on its distance from a key.
    """
    size, mask = max(keys), None
    for num_queries, num_keys in zip(queries, keys, strict=True):
        if num_queries == num_keys and (window is None or window >= num_keys):
            yield True, None
            continue
        if mask is None:
            mask = torch.full((size, size), -torch.inf).triu_(1)
            if window is not None:
                mask += torch.full((size, size), -torch.inf).tril_(-window)
        yield False, mask[num_keys - num_queries : num_keys, :num_keys]
