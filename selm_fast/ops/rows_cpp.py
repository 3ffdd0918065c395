"""The row kernels of the log-prob head in the C++ of csrc/, for the CPU; `rows_torch` says what each of them does."""

from __future__ import annotations

import torch
from torch import Tensor

from selm_fast.ops.rows_torch import hidden_gradient, target_logits, weight_gradient

__all__ = ["fold", "hidden_gradient", "softmax", "target_logits", "weight_gradient"]


def fold(
    tile: Tensor,
    targets: Tensor,
    v0: int,
    peak: Tensor,
    total: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    kept: Tensor | None,
    tops: Tensor | None,
) -> None:
    """As `rows_torch.fold`; the tile is read from memory once. Raises ValueError for tensors that do not fit."""
    torch.ops.selm_fast_cpp.fold(tile, targets, v0, peak, total, bias, scale, softcap, kept, tops)


def softmax(
    tile: Tensor,
    targets: Tensor,
    v0: int,
    peak: Tensor,
    log_total: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    tops: Tensor | None,
    finished: bool,
) -> None:
    """As `rows_torch.softmax`, but that the tile is left as it is. Raises ValueError for tensors that do not fit."""
    torch.ops.selm_fast_cpp.softmax(tile, targets, v0, peak, log_total, out, bias, scale, softcap, tops, finished)
