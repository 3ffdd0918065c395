"""torch.nn.attention.varlen on CUDA: one launch for all branches, no host sync; torch 2.11 to 2.13.

`varlen_attn` is public; its backward is the private op that its own autograd calls, whose schema has not changed since.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from selm_fast.ops.attention_layout import Case, Layout, Scores
from selm_fast.ops.kv_gather import gather, gather_backward


def refusal(case: Case) -> str | None:
    """Why this back end cannot serve a case, or None."""
    return flash_refusal(case) or ("has no softcap" if case.softcap else None)


def flash_refusal(case: Case) -> str | None:
    """Why no flash attention kernel for CUDA can serve a case, or None."""
    if case.device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return f"needs an NVIDIA GPU; the tensors are on {case.device.type}"
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return f"needs a GPU of capability 8.0 or newer; {torch.cuda.get_device_name(case.device)} is older"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"serves bf16 and fp16; the tensors are {case.dtype}"
    if case.head_size > 256 or case.head_size % 8:
        return f"serves head sizes that are multiples of 8 up to 256; got {case.head_size}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> tuple[Tensor, Tensor]:
    """q (T, H, Dh), k and v (T, Hk, Dh) -> out (T, H, Dh), dtype of q, contiguous; logsumexp (H, T) fp32."""
    function, aux, gqa = _varlen_attn()
    # A tensor of its own: where both offsets are one, torch 2.15 takes cuDNN, and the backward pass here is flash's.
    cu_seqlens_k = layout.cu_seqlens_k.view(-1)
    out, lse = function(
        q, gather(k, layout.kv_index), gather(v, layout.kv_index), layout.cu_seqlens_q, cu_seqlens_k,
        layout.max_seqlen_q, layout.max_seqlen_k,
        return_aux=aux, scale=scores.scale, window_size=window_size(scores.window), **gqa,
    )  # fmt: skip
    return out.contiguous(), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by q, k and v, contiguous."""
    _varlen_attn()  # registers the op
    window = window_size(scores.window)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    with _deterministic():
        dq, dkeys, dvalues = torch.ops.torch_attn._varlen_attn_backward(
            grad, q, gather(k, layout.kv_index), gather(v, layout.kv_index), out, lse,
            layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k,
            window == (-1, 0), no_dropout, scores.scale, list(window),
        )  # fmt: skip
    dk, dv = gather_backward((dkeys, dvalues), layout.kv_index, k.shape[0], k.dtype)
    return dq.contiguous(), dk, dv


def window_size(window: int | None) -> tuple[int, int]:
    """Flash attention's (left, right): keys beside the query's own. Right 0 is causal, aligned bottom-right."""
    return -1 if window is None else window - 1, 0


@cache
def _varlen_attn() -> tuple[Callable[..., Any], Any, dict[str, bool]]:
    """`varlen_attn`, the request for its logsumexp, and what makes it accept fewer key heads than query heads.

    Imported here, for the module takes torch._dynamo along. Its kernel pairs heads in every version; the argument
    that says so came, and was then required, after 2.11.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    has_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, AuxRequest(lse=True), {"enable_gqa": True} if has_flag else {}


_switching = threading.Lock()  # autograd has a thread for each device


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let torch's flash kernels add up dq in a fixed order: they read this from the global switch alone.

    Not torch.use_deterministic_algorithms, which sets inductor's configuration, too.
    """
    with _switching:
        enabled = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory = filled and enabled  # type: ignore[attr-defined]
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
