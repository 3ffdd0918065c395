"""Attention over packed groups whose responses share one encoded prompt.

Each branch's queries are a run of consecutive rows; its keys are any rows, named by `kv_index`: the prompt's, encoded
once, followed by its own. The causal mask is aligned bottom-right: the last query sees the last key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selm_fast.ops.attention_choice import Backend, check_name, choose, serving
from selm_fast.ops.attention_layout import Case, Layout, Scores


@torch.library.custom_op("selm_fast::shared_prefix_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, window: int, softcap: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (T, H, Dh), logsumexp (H, T) fp32. window -1: none; softcap 0: none."""
    layout = Layout(kv_index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_layout(layout, q.shape[0])
    if not q.shape[0]:
        return torch.empty_like(q), q.new_empty((q.shape[1], 0), dtype=torch.float32)
    scores = _scores(scale, window, softcap)
    with torch.autocast(q.device.type, enabled=False):  # it would round what is meant to be fp32
        return _chosen(backend, q, k, scores).forward(_rows(q), k, v, layout, scores)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, window: int, softcap: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("selm_fast::shared_prefix_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, window: int, softcap: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = Layout(kv_index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not q.shape[0]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scores = _scores(scale, window, softcap)
    with torch.autocast(q.device.type, enabled=False):
        return _chosen(backend, q, k, scores).backward(_rows(grad), _rows(q), k, v, out, lse, layout, scores)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, window: int, softcap: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _rows(t: Tensor) -> Tensor:
    """With a head's numbers side by side, as kernels for GPUs want them; keys and values are gathered so."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _scores(scale: float, window: int, softcap: float) -> Scores:
    return Scores(scale, None if window < 0 else window, softcap or None)


def _chosen(backend: str, q: Tensor, k: Tensor, scores: Scores) -> Backend:
    """The back end for these tensors, tested on its first use: within the op, where nothing is traced."""
    case = Case(
        q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], scores.window is not None, scores.softcap is not None
    )
    return serving(backend, case)


def _check_layout(layout: Layout, num_rows: int) -> None:
    """Raises ValueError for a layout on the CPU that does not fit; for one on a GPU the host would have to wait."""
    if layout.cu_seqlens_q.device.type != "cpu":
        return
    branches = layout.branches()
    for nth, (_, num_queries, _, num_keys) in enumerate(branches):
        if not 1 <= num_queries <= min(num_keys, layout.max_seqlen_q) or num_keys > layout.max_seqlen_k:
            raise ValueError(
                f"branch {nth} has {num_queries} queries and {num_keys} keys; expected at least one query, no fewer "
                f"keys, and at most max_seqlen_q = {layout.max_seqlen_q} and max_seqlen_k = {layout.max_seqlen_k}"
            )
    for name, offsets, size in (
        ("cu_seqlens_q", layout.cu_seqlens_q, num_rows),
        ("cu_seqlens_k", layout.cu_seqlens_k, layout.kv_index.shape[0]),
    ):
        if (int(offsets[0]), int(offsets[-1])) != (0, size):
            raise ValueError(f"{name} must rise from 0 to {size}; got {int(offsets[0])} to {int(offsets[-1])}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_index, cu_seqlens_q, cu_seqlens_k, *settings = inputs
    ctx.save_for_backward(q, k, v, *output, kv_index, cu_seqlens_q, cu_seqlens_k)
    ctx.settings = settings


@once_differentiable
def _autograd(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None,) * (3 + len(ctx.settings)))


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
    backend: str = "auto",
) -> Tensor:
    """Causal attention of B branches over T packed rows, in one call; prompts shared by branches are stored once.

    q: (T, H, Dh).  k, v: (T, Hk, Dh), H a multiple of Hk; fp32|bf16|fp16, fp64 by the reference; autocast casts them.
    kv_index: (Tk,) int64, which of the T rows each key row is; branch b owns entries cu_seqlens_k[b] to
    cu_seqlens_k[b+1].
    cu_seqlens_q, cu_seqlens_k: (B+1,) int32.  A branch has at least one query and as many keys as queries, or more,
    and its last query sees all.
    max_seqlen_q, max_seqlen_k: the longest branch (what variable-length GPU kernels size their grid by).
    scale: multiplies q k^T.  window: keys a query sees, its own among them (None: all).  softcap: of the scores, or
    None.
    backend: "auto" or a name of `attention_choice.BACKENDS`; each is tested against the reference on its first use.
    Returns (T, H, Dh), dtype of q; differentiable in q, k, v, deterministic. The gradients of shared rows are summed in
    fp32, in order.
    Raises ValueError for arguments that do not fit or a back end that cannot serve them, RuntimeError for a back end
    asked for by name that fails its test.
    """
    check_name(backend)
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which knows no such device
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be (T, H, Dh) and k, v (T, Hk, Dh) with H a multiple of Hk; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None; got {softcap}")
    out, _ = _attention(
        q,
        k,
        v,
        kv_index,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        -1 if window is None else window,
        0.0 if softcap is None else softcap,
        backend,
    )
    return out  # type: ignore[no-any-return]


def attention_backend(
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    heads: int = 32,
    key_heads: int = 8,
    head_size: int = 128,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> str:
    """The name of the back end that serves a model's attention on a device, after its self-test there.

    dtype: default bf16 on CUDA, fp32 on the CPU.  Raises as `shared_prefix_attention` does.
    """
    device = torch.device(device)
    if str(device) == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it: one test serves both
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return choose(backend, Case(device, dtype, heads, key_heads, head_size, window is not None, softcap is not None))
