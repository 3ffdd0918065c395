"""Mutants of the Triton kernels."""

from __future__ import annotations

from tests.mutants.mutant import OPS, mutants_of

ROWS_TRITON = mutants_of(
    OPS + "rows_triton.py",
    "tests/ops/test_rows_triton.py",
    (
        "columns beyond the tile count",
        'tl.where(cols < V, _finish(z, scale, softcap, HAS_SOFTCAP), -float("inf"))',
        "_finish(z, scale, softcap, HAS_SOFTCAP)",
    ),
    (
        "the target is one column off",
        "tl.where(cols == target - v0, values * 0.0, values)",
        "tl.where(cols == target - v0 + 1, values * 0.0, values)",
    ),
    ("the target stays in the sum", "tl.where(cols == target - v0, values * 0.0, values)", "values"),
    ("a tile that is ruled out gives NaN", 'finite_top = tl.where(top == -float("inf"), 0.0, top)', "finite_top = top"),
    (
        "the running sum is not scaled to the new peak",
        "tl.load(total_ptr + row) * _weight_under(peak, higher)",
        "tl.load(total_ptr + row)",
    ),
    ("the tile's sum is not scaled to the peak", "others * _weight_under(top, higher)", "others"),
    (
        "two ruled out tiles give NaN",
        "return tl.where(top == higher, 1.0, tl.exp(top - higher))",
        "return tl.exp(top - higher)",
    ),
    ("the peak is that of the last tile", "tl.store(peak_ptr + row, higher)", "tl.store(peak_ptr + row, top)"),
    ("kept logits lose nothing of their tile's top", "shifted if HAS_TOPS else z, mask=cols < V)", "z, mask=cols < V)"),
    (
        "a program reads its neighbour's peak",
        "peak = tl.load(peak_ptr + row)\n    if HAS_TOPS",
        "peak = tl.load(peak_ptr)\n    if HAS_TOPS",
    ),
    ("the cap's slope has the wrong sign", "shares *= 1.0 - tanh * tanh", "shares *= 1.0 + tanh * tanh"),
    ("the scale is left out of the slope", "_without_target(shares * scale,", "_without_target(shares,"),
    ("a kept tile's top is subtracted", "above_peak = z + (top - peak)", "above_peak = z - (top - peak)"),
    (
        "the bias is left out of recomputed logits",
        "                z += tl.load(bias_ptr",
        "                z += 0 * tl.load(bias_ptr",
    ),
    (
        "only the first block of columns is written",
        "tl.store(out_ptr + row * V + cols, shares, mask=cols < V)",
        "tl.store(out_ptr + row * V + cols, shares, mask=(cols < V) & (cols < BLOCK_V))",
    ),
    (
        "the hidden gradient has the wrong sign",
        "tl.load(coef_ptr + row) - total) * tl.load(grad_ptr + row)",
        "tl.load(coef_ptr + row) + total) * tl.load(grad_ptr + row)",
    ),
    (
        "a row's upstream gradient is the first row's",
        "- total) * tl.load(grad_ptr + row)",
        "- total) * tl.load(grad_ptr)",
    ),
    (
        "the last of a token's rows is left out",
        "last = tl.load(bounds_ptr + v0 + v + 1).to(tl.int64)",
        "last = tl.load(bounds_ptr + v0 + v + 1).to(tl.int64) - 1",
    ),
    (
        "rows of the tile's first token go to all tiles",
        "first = tl.load(bounds_ptr + v0 + v).to(tl.int64)",
        "first = tl.load(bounds_ptr + v).to(tl.int64)",
    ),
    (
        "rows are read unsorted",
        "row = tl.load(order_ptr + start + nth, mask=here, other=0).to(tl.int64)",
        "row = (start + nth).to(tl.int64)",
    ),
    (
        "the dot product stops at its first block",
        "for start in range(0, D, BLOCK_D):",
        "for start in range(0, BLOCK_D, BLOCK_D):",
    ),
    (
        "hidden states are read as if rows were contiguous",
        "hidden_ptr + row * stride_hidden_row + cols * stride_hidden_col, mask=cols < D",
        "hidden_ptr + row * D + cols, mask=cols < D",
    ),
    ("tanh is wrong near 0", "tl.where(tl.abs(x) < 0.625,", "tl.where(tl.abs(x) < 3.0,"),
    ("tanh is positive for negative numbers", "tl.where(x < 0.0, -far, far)", "far"),
)

LOSS_TRITON = mutants_of(
    OPS + "preference_loss_triton.py",
    "tests/ops/test_preference_loss_triton.py",
    ("chosen and rejected change places", "logits = beta * (chosen_ratio - rejected_ratio)", "logits = beta * (rejected_ratio - chosen_ratio)"),
    ("ln 2 is not exact at 0", "tl.log(0.5 + 0.5 * tl.exp(-tl.abs(x)))", "tl.log(1.0 + tl.exp(-tl.abs(x))) - 0.6931471805599452"),
    ("exploration has the wrong sign", "sums += excess + exploration", "sums += excess - exploration"),
    ("exploration pushes the other way", "tl.where(index == explored, by_explored, 0.0)", "tl.where(index == explored, -by_explored, 0.0)"),
    ("an alias loses its second role", "slope + tl.where(index == explored, by_explored, 0.0)", "slope + tl.where((index == explored) & (index != chosen), by_explored, 0.0)"),
    ("smoothing has the wrong sign", "by_logits += label_smoothing * _sigmoid(logits)", "by_logits -= label_smoothing * _sigmoid(logits)"),
    ("equal pairs count as won", "(logits > 0.0).to(tl.float64)", "(logits >= 0.0).to(tl.float64)"),
    ("absent explored responses have a reward", "tl.where(has_explored, beta * explored_ratio, nan)", "beta * explored_ratio"),
    ("the divisor is left out", "tl.sum(sums, 0) / divisor + baseline", "tl.sum(sums, 0) + baseline"),
    ("groups beyond the first block are lost", "for start in range(0, G, BLOCK_G):", "for start in range(0, BLOCK_G, BLOCK_G):"),
    ("slopes of unused sequences are not zero", "slopes = torch.zeros_like(policy, memory_format=torch.contiguous_format)", "slopes = torch.ones_like(policy, memory_format=torch.contiguous_format)"),
)  # fmt: skip

# The interpreter computes in the types that it is given; what is compiled shows the types that are declared.
LOSS_TRITON += mutants_of(
    OPS + "preference_loss_triton.py",
    "tests/ops/test_aot.py",
    (
        "settings are fp32",
        "beta: tl.float64, exploration_weight: tl.float64,",
        "beta: tl.float32, exploration_weight: tl.float64,",
    ),
)

SUMS_TRITON = [
    *mutants_of(
        OPS + "sequence_sum_triton.py",
        "tests/ops/test_sequence_sum_triton.py",
        ("sums are fp32", "tl.store(out_ptr + sequence, tl.sum(sums, 0))", "tl.store(out_ptr + sequence, tl.sum(sums.to(tl.float32), 0))"),
        ("a sequence runs into the next", "mask=tokens < last, other=0.0)", "mask=tokens <= last, other=0.0)"),
        ("the first token is left out", "for start in range(first, last, BLOCK_N):", "for start in range(first + 1, last, BLOCK_N):"),
    ),
    *mutants_of(
        OPS + "segment_sum_triton.py",
        "tests/ops/test_segment_sum_triton.py",
        ("rows are read unsorted", "row = tl.load(order_ptr + start + nth, mask=here, other=0).to(tl.int64)", "row = (start + nth).to(tl.int64)"),
        ("a row too many", "here = start + nth < last", "here = start + nth <= last"),
        ("columns beyond the row are written", "tl.store(out_ptr + t * W + cols, total, mask=cols < W)", "tl.store(out_ptr + t * W + cols, total, mask=cols < W - 1)"),
    ),
]  # fmt: skip


TRITON = [*ROWS_TRITON, *LOSS_TRITON, *SUMS_TRITON]
