"""The row kernels of the log-prob head in Triton; `rows_torch` says what each function does.

A row of a tile fits the registers of one program, so `fold` reads each tile once. Targets are found by comparing column
numbers: no scatter, no atomics, and nothing here waits for the device.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a program holds of a row at most: wider tiles would spill.
MAX_TILE_VOCAB = 16384
# Elements a thread holds of a row: 16 fp32 and what is computed from them stay far from the 255 registers it may have.
ELEMENTS_PER_THREAD = 16
SOFTMAX_BLOCK_V = 2048
SOFTMAX_ELEMENTS_PER_THREAD = 8  # with 16, triton 3.7 keeps 8 bytes of a ragged bf16 row on the stack for sm_100
MAX_BLOCK_D = 1024
# Rows of a frequent token that `weight_gradient` asks for at once; one at a time, each would wait for memory.
ROWS_IN_FLIGHT = 8


@triton.jit
def _tanh(x):
    """tanh of fp32; near 0, where the difference cancels, by the polynomial of Cephes' tanhf."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)  # an IEEE division here takes twice the registers
    return tl.where(tl.abs(x) < 0.625, series * square * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _finish(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = softcap * tanh(scale * x / softcap)."""
    z = x * scale
    if HAS_SOFTCAP:
        z = _tanh(tl.div_rn(z, softcap)) * softcap
    return z


@triton.jit
def _weight_under(top, higher):
    """exp(top - higher), and 1 where both are -inf."""
    return tl.where(top == higher, 1.0, tl.exp(top - higher))


@triton.jit
def _without_target(values, cols, target, v0):
    """0 at the target's column; its product with 0, so that a NaN stays one."""
    return tl.where(cols == target - v0, values * 0.0, values)


@triton.jit
def _target_logits_kernel(
    hidden_ptr, weight_ptr, targets_ptr, bias_ptr, out_ptr,
    stride_hidden_row, stride_hidden_col, stride_weight_row, stride_weight_col, stride_bias, D, scale, softcap,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D).to(tl.int64)
        h = tl.load(hidden_ptr + row * stride_hidden_row + cols * stride_hidden_col, mask=cols < D, other=0.0)
        w = tl.load(weight_ptr + target * stride_weight_row + cols * stride_weight_col, mask=cols < D, other=0.0)
        products += h.to(tl.float32) * w.to(tl.float32)
    x = tl.sum(products, 0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + target * stride_bias).to(tl.float32)
    tl.store(out_ptr + row, _finish(x, scale, softcap, HAS_SOFTCAP))


@triton.jit(do_not_specialize=["v0"])
def _fold_kernel(
    tile_ptr, targets_ptr, peak_ptr, total_ptr, bias_ptr, kept_ptr, tops_ptr, stride_bias, V, v0, scale, softcap,
    BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    KEEPS: tl.constexpr, HAS_TOPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    z = tl.load(tile_ptr + row * V + cols, mask=cols < V, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols.to(tl.int64) * stride_bias, mask=cols < V, other=0.0).to(tl.float32)
    # Columns beyond the tile leave only here: a bias, a negative scale or a cap would bring a -inf back to life.
    z = tl.where(cols < V, _finish(z, scale, softcap, HAS_SOFTCAP), -float("inf"))
    top = tl.max(z, 0)
    finite_top = tl.where(top == -float("inf"), 0.0, top)  # a bias of -inf may rule a whole tile out
    shifted = z - finite_top
    if KEEPS:
        tl.store(kept_ptr + row * V + cols, shifted if HAS_TOPS else z, mask=cols < V)
    if HAS_TOPS:
        tl.store(tops_ptr + row, finite_top)
    others = tl.sum(_without_target(tl.exp(shifted), cols, tl.load(targets_ptr + row), v0), 0)
    peak = tl.load(peak_ptr + row)
    higher = tl.maximum(peak, top)
    total = tl.load(total_ptr + row) * _weight_under(peak, higher) + others * _weight_under(top, higher)
    tl.store(total_ptr + row, total)
    tl.store(peak_ptr + row, higher)


@triton.jit(do_not_specialize=["v0"])
def _softmax_kernel(
    tile_ptr, targets_ptr, peak_ptr, log_total_ptr, bias_ptr, tops_ptr, out_ptr, stride_bias, V, v0, scale, softcap,
    BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TOPS: tl.constexpr, FINISHED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(tile_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
    peak = tl.load(peak_ptr + row)
    if HAS_TOPS:
        top = tl.load(tops_ptr + row)
        above_peak = z + (top - peak)  # two large numbers meet first: z, a small one, keeps its digits
        z += top
    else:
        if not FINISHED:
            if HAS_BIAS:
                z += tl.load(bias_ptr + cols.to(tl.int64) * stride_bias, mask=cols < V, other=0.0).to(tl.float32)
            z = _finish(z, scale, softcap, HAS_SOFTCAP)
        above_peak = z - peak
    shares = tl.exp(above_peak - tl.load(log_total_ptr + row))
    if HAS_SOFTCAP:
        tanh = tl.div_rn(z, softcap)
        shares *= 1.0 - tanh * tanh
    shares = _without_target(shares * scale, cols, tl.load(targets_ptr + row), v0)
    tl.store(out_ptr + row * V + cols, shares, mask=cols < V)


@triton.jit
def _hidden_gradient_kernel(
    total_ptr, weight_ptr, targets_ptr, coef_ptr, grad_ptr, out_ptr,
    stride_total_row, stride_total_col, stride_weight_row, stride_weight_col, stride_out_row, stride_out_col, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(targets_ptr + row).to(tl.int64)
    w = tl.load(weight_ptr + target * stride_weight_row + cols * stride_weight_col, mask=cols < D, other=0.0)
    total = tl.load(total_ptr + row * stride_total_row + cols * stride_total_col, mask=cols < D, other=0.0)
    gradient = (w.to(tl.float32) * tl.load(coef_ptr + row) - total) * tl.load(grad_ptr + row)
    tl.store(out_ptr + row * stride_out_row + cols * stride_out_col, gradient, mask=cols < D)


@triton.jit(do_not_specialize=["v0"])
def _weight_gradient_kernel(
    total_ptr, hidden_ptr, coef_ptr, order_ptr, bounds_ptr, out_ptr,
    stride_total_row, stride_total_col, stride_hidden_row, stride_hidden_col, stride_out_row, stride_out_col, v0, D,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(bounds_ptr + v0 + v).to(tl.int64)
    last = tl.load(bounds_ptr + v0 + v + 1).to(tl.int64)
    total = tl.load(total_ptr + v * stride_total_row + cols * stride_total_col, mask=cols < D, other=0.0)
    for start in range(first, last, ROWS):
        for nth in tl.static_range(ROWS):
            here = start + nth < last
            row = tl.load(order_ptr + start + nth, mask=here, other=0).to(tl.int64)
            coef = tl.load(coef_ptr + row, mask=here, other=0.0)
            offsets = row * stride_hidden_row + cols * stride_hidden_col
            h = tl.load(hidden_ptr + offsets, mask=cols < tl.where(here, D, 0), other=0.0)
            total += coef * h.to(tl.float32)
    tl.store(out_ptr + v * stride_out_row + cols * stride_out_col, total, mask=cols < D)


def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """See `rows_torch.target_logits`."""
    out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    if not hidden.shape[0]:
        return out
    block = _block_d(hidden.shape[1])
    with torch.cuda.device_of(hidden):
        _target_logits_kernel[(hidden.shape[0],)](
            hidden, weight, targets.contiguous(), bias, out,
            *hidden.stride(), *weight.stride(), _stride(bias), hidden.shape[1], float(scale), softcap,
            BLOCK_D=block, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, num_warps=_warps(block, 8),
        )  # fmt: skip
    return out


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
    """See `rows_torch.fold`; the tile is left as it is, unless `kept` is the tile."""
    rows, width = tile.shape
    if not rows:
        return
    assert tile.is_contiguous() and peak.is_contiguous() and total.is_contiguous() and width <= MAX_TILE_VOCAB
    assert kept is None or kept.is_contiguous()
    if kept is None:
        tops = None
    elif kept.data_ptr() == tile.data_ptr() and tops is None and bias is None and scale == 1.0 and softcap is None:
        kept = None  # it holds z already
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(tile):
        _fold_kernel[(rows,)](
            tile, targets.contiguous(), peak, total, bias, kept, tops, _stride(bias), width, v0, float(scale), softcap,
            BLOCK_V=block, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            KEEPS=kept is not None, HAS_TOPS=tops is not None, num_warps=_warps(block, ELEMENTS_PER_THREAD),
        )  # fmt: skip


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
    """See `rows_torch.softmax`; the tile is left as it is."""
    rows, width = tile.shape
    if not rows:
        return
    assert tile.is_contiguous() and out.is_contiguous()
    if finished:
        bias = None
    else:
        tops = None
    block = min(triton.next_power_of_2(width), SOFTMAX_BLOCK_V)
    with torch.cuda.device_of(tile):
        _softmax_kernel[(rows, triton.cdiv(width, block))](
            tile, targets.contiguous(), peak.contiguous(), log_total.contiguous(), bias, tops, out,
            _stride(bias), width, v0, float(scale), softcap,
            BLOCK_V=block, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            HAS_TOPS=tops is not None, FINISHED=finished, num_warps=_warps(block, SOFTMAX_ELEMENTS_PER_THREAD),
        )  # fmt: skip


def hidden_gradient(total: Tensor, weight: Tensor, targets: Tensor, coef: Tensor, grad: Tensor, out: Tensor) -> None:
    """See `rows_torch.hidden_gradient`."""
    rows, size = total.shape
    if not rows:
        return
    block = _block_d(size)
    with torch.cuda.device_of(total):
        _hidden_gradient_kernel[(rows, triton.cdiv(size, block))](
            total, weight, targets.contiguous(), coef.contiguous(), grad.contiguous(), out,
            *total.stride(), *weight.stride(), *out.stride(), size, BLOCK_D=block, num_warps=_warps(block, 8),
        )  # fmt: skip


def weight_gradient(
    total: Tensor, v0: int, hidden: Tensor, coef: Tensor, order: Tensor, bounds: Tensor, out: Tensor
) -> None:
    """See `rows_torch.weight_gradient`."""
    width, size = total.shape
    block = _block_d(size)
    with torch.cuda.device_of(total):
        _weight_gradient_kernel[(width, triton.cdiv(size, block))](
            total, hidden, coef.contiguous(), order.contiguous(), bounds.contiguous(), out,
            *total.stride(), *hidden.stride(), *out.stride(), v0, size,
            BLOCK_D=block, ROWS=ROWS_IN_FLIGHT, num_warps=_warps(block, 8),
        )  # fmt: skip


def _block_d(size: int) -> int:
    return int(min(max(triton.next_power_of_2(size), 32), MAX_BLOCK_D))


def _warps(block: int, elements_per_thread: int) -> int:
    return min(max(block // (32 * elements_per_thread), 1), 32)


def _stride(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)
