"""Attention in the C++ of csrc/, for the CPU: all branches in one call, in fp32; keys are read where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from selm_fast.ops import extension
from selm_fast.ops.attention_layout import Case, Layout, Scores


def refusal(case: Case) -> str | None:
    """Why this back end cannot serve a case, or None."""
    if case.device.type != "cpu":
        return f"serves tensors on the CPU; they are on {case.device.type}"
    if case.dtype == torch.float64:
        return "computes in fp32; the tensors are fp64"
    return None if extension.available() else f"needs the extension of csrc/: {extension.status()}"


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores) -> tuple[Tensor, Tensor]:
    """q (T, H, Dh), k and v (T, Hk, Dh) -> out (T, H, Dh), dtype of q, contiguous; logsumexp (H, T) fp32.

    Raises ValueError for tensors that do not fit, IndexError for a key that is no row.
    """
    out, lse = torch.ops.selm_fast_cpp.attention(q, k, v, *layout[:3], *_numbers(scores))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by q, k and v, contiguous; equal bits from run to run and for any number of threads.

    Raises as `forward` does.
    """
    dq, dk, dv = torch.ops.selm_fast_cpp.attention_backward(grad, q, k, v, out, lse, *layout[:3], *_numbers(scores))
    return dq, dk, dv


def _numbers(scores: Scores) -> tuple[float, int, float]:
    """Scale, window (-1: none) and softcap (0: none)."""
    return scores.scale, -1 if scores.window is None else scores.window, scores.softcap or 0.0
