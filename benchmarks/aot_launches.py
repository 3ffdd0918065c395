"""What `aot.py` compiles: every kernel of the package in the configurations it has by default on CUDA.

Block sizes, warps and variants are the package's own, for its functions are called here. Only what they derive these
from is chosen: dtypes, widths, and which options of the head are on. Rows are few, for they only set the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from selm_fast.ops import adamw_triton, preference_loss_triton, rows_triton, segment_sum_triton, sequence_sum_triton
from selm_fast.ops.adamw import Settings, Tensors
from selm_fast.ops.head import TILE_VOCAB

HIDDEN = 4096
RAGGED_VOCAB = 50257 % TILE_VOCAB["cuda"]  # GPT-2's last tile: its rows begin at no multiple of 16 bytes
ROWS = 2
TARGETS = torch.zeros(ROWS, dtype=torch.int64)
PER_ROW = torch.zeros(ROWS)


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each configuration by name, and a call that launches it."""
    plain: dict[str, Any] = {"bias": None, "scale": 1.0, "softcap": None}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        bias = torch.zeros(TILE_VOCAB["cuda"], dtype=dtype)
        capped = {"bias": bias, "scale": 0.5, "softcap": 30.0}
        yield from _rows(name, dtype, TILE_VOCAB["cuda"], plain)
        yield from _rows(f"{name}, bias, softcap", dtype, TILE_VOCAB["cuda"], capped)
        yield from _gradients(name, dtype)
        yield name, partial(_segment_sum, dtype, dtype)
    yield from _rows("bfloat16, ragged", torch.bfloat16, RAGGED_VOCAB, plain)
    yield "float32 to bfloat16", partial(_segment_sum, torch.float32, torch.bfloat16)
    yield "float32", partial(sequence_sum_triton.sequence_sums, torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32))
    yield "plain", partial(_group_losses, 0.0)
    yield "label smoothing", partial(_group_losses, 0.1)
    for moments in (torch.float32, torch.bfloat16):
        name = f"{str(moments).removeprefix('torch.')} moments"
        yield name, partial(_adamw, moments, 4096, None, None)
        yield f"{name}, scale, skip", partial(_adamw, moments, 4096, PER_ROW[0], PER_ROW[0] > 0)
        yield f"{name}, scale, skip, ragged", partial(_adamw, moments, 4095, PER_ROW[0], PER_ROW[0] > 0)


def _rows(
    name: str, dtype: torch.dtype, width: int, settings: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """fold, softmax and target_logits of one kind of head, as the modes of `linear_logprob` call them."""
    tile, kept = torch.zeros(ROWS, width), torch.zeros(ROWS, width, dtype=dtype)
    weight = torch.zeros(ROWS, HIDDEN, dtype=dtype)
    args = (TARGETS, 0, PER_ROW, PER_ROW)
    tops = None if dtype == torch.float32 else PER_ROW
    keep: dict[str, Any] = settings | {"kept": tile if dtype == torch.float32 else kept, "tops": tops}
    yield f"{name}, recompute", partial(rows_triton.fold, tile, *args, **settings, kept=None, tops=None)
    yield f"{name}, keep", partial(rows_triton.fold, tile, *args, **keep)
    yield f"{name}, recompute", partial(rows_triton.softmax, tile, *args, kept, **settings, tops=None, finished=False)
    yield f"{name}, keep", partial(rows_triton.softmax, kept, *args, kept, **settings, tops=tops, finished=True)
    yield name, partial(rows_triton.target_logits, weight, weight, TARGETS, **settings)


def _gradients(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    total, weight = torch.zeros(ROWS, HIDDEN), torch.zeros(ROWS, HIDDEN, dtype=dtype)
    bounds = torch.zeros(ROWS + 1, dtype=torch.int64)
    yield name, partial(rows_triton.hidden_gradient, total, weight, TARGETS, PER_ROW, PER_ROW, weight)
    yield name, partial(rows_triton.weight_gradient, total, 0, weight, PER_ROW, TARGETS, bounds, weight)
    ones = torch.ones(1, 1, dtype=dtype).expand(ROWS, 1)
    yield (
        f"{name}, of a bias",
        partial(rows_triton.weight_gradient, total[:, :1], 0, ones, PER_ROW, TARGETS, bounds, weight[:, :1]),
    )


def _segment_sum(source_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    source, out = (torch.zeros(ROWS, 8, 128, dtype=dtype) for dtype in (source_dtype, out_dtype))
    segment_sum_triton.segment_sum(source, TARGETS, torch.zeros(ROWS + 1, dtype=torch.int64), out)


def _group_losses(label_smoothing: float) -> None:
    logps = torch.zeros(ROWS, dtype=torch.float64)
    preference_loss_triton.group_losses(
        logps, logps, TARGETS, TARGETS, TARGETS,
        beta=0.1, exploration_weight=0.01, label_smoothing=label_smoothing, divisor=1,
    )  # fmt: skip


def _adamw(moments: torch.dtype, numel: int, grad_scale: torch.Tensor | None, skip: torch.Tensor | None) -> None:
    weights, state = torch.zeros(numel), torch.zeros(numel, dtype=moments)
    tensors = Tensors(weights, weights, state, state)
    settings = Settings(lr=5e-7, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, salt=1 << 62, offset=1 << 40)
    adamw_triton.adamw_step(tensors, PER_ROW[0] + 1, settings, grad_scale, skip)
