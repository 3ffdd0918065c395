"""The mutants of `run.py`: what is broken, how, and which tests must see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of one file: `old`, which occurs once, becomes `new`, and one of `tests` (pytest's arguments) fails."""

    file: str
    why: str
    old: str
    new: str
    tests: str


def _of(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(file, why, old, new, tests) for why, old, new in changes]


OPS = "selm_fast/ops/"

ROWS_TRITON = _of(
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
        "tl.store(out_ptr + row * V + cols, shares, mask=cols < BLOCK_V)",
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

LOSS_TRITON = _of(
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
LOSS_TRITON += _of(
    OPS + "preference_loss_triton.py",
    "tests/ops/test_aot.py",
    (
        "settings are fp32",
        "beta: tl.float64, exploration_weight: tl.float64,",
        "beta: tl.float32, exploration_weight: tl.float64,",
    ),
)

SUMS_TRITON = [
    *_of(
        OPS + "sequence_sum_triton.py",
        "tests/ops/test_sequence_sum_triton.py",
        ("sums are fp32", "sums = tl.zeros((BLOCK_N,), tl.float64)", "sums = tl.zeros((BLOCK_N,), tl.float32)"),
        ("a sequence runs into the next", "mask=tokens < last, other=0.0)", "mask=tokens <= last, other=0.0)"),
        ("the first token is left out", "for start in range(first, last, BLOCK_N):", "for start in range(first + 1, last, BLOCK_N):"),
    ),
    *_of(
        OPS + "segment_sum_triton.py",
        "tests/ops/test_segment_sum_triton.py",
        ("rows are read unsorted", "row = tl.load(order_ptr + start + nth, mask=here, other=0).to(tl.int64)", "row = (start + nth).to(tl.int64)"),
        ("a row too many", "here = start + nth < last", "here = start + nth <= last"),
        ("columns beyond the row are written", "tl.store(out_ptr + t * W + cols, total, mask=cols < W)", "tl.store(out_ptr + t * W + cols, total, mask=cols < W - 1)"),
    ),
]  # fmt: skip

HEAD = [
    *_of(
        OPS + "head.py",
        "tests/ops/test_linear_logprob.py tests/ops/test_head_backends.py tests/ops/test_head_memory.py -k 'not triton'",
        ("1 - p is that of all tokens", "self.total.log().add_(self.peak - self.z_target)", "self.log_total().add_(self.peak - self.z_target)"),
        ("the target is left out of the softmax", "(self.total + torch.exp(self.z_target - self.peak)).log_()", "self.total.log()"),
        ("the hidden gradient forgets earlier tiles", "d_hidden[r0:r1], accumulate=nth > 0", "d_hidden[r0:r1], accumulate=False"),
        ("the weight gradient forgets earlier rows", "dw, accumulate=r0 > 0", "dw, accumulate=False"),
        ("the weight gradient has the wrong sign", "hidden * grad.neg().unsqueeze(1)", "hidden * grad.unsqueeze(1)"),
        ("the bias gradient has the wrong sign", "db -= share.t()", "db += share.t()"),
        ("the slope at the cap is 1", "_slope(state.z_target, head)\n", "1.0\n"),
        ("kept tiles lie a row off", "kept[r0 * vocab + (r1 - r0) * v0 :]", "kept[r0 * vocab + r0 * v0 :]"),
        ("targets are searched to their right", "torch.arange(head.vocab + 1, device=targets.device))", "torch.arange(head.vocab + 1, device=targets.device), right=True)"),
        ("the budget is ignored", "num_rows * weight.shape[0] * weight.itemsize <= KEEP_BUDGET_BYTES", "num_rows >= 0"),
    ),
    *_of(
        OPS + "rows_torch.py",
        "tests/ops/test_head_backends.py -k torch",
        ("the maximum begins at 0", "top = z.amax(1)", "top = z.amax(1).clamp(min=0)"),
        ("the cap's slope is that of raw logits", "shares *= 1 - (z / softcap).square()", "shares *= 1 - (z / softcap).tanh().square()"),
        ("the bias comes after the cap", "    if bias is not None:\n        x += bias\n    if scale != 1.0:\n        x *= scale\n    if softcap is not None:\n        x.div_(softcap).tanh_().mul_(softcap)\n", "    if scale != 1.0:\n        x *= scale\n    if softcap is not None:\n        x.div_(softcap).tanh_().mul_(softcap)\n    if bias is not None:\n        x += bias\n"),
        ("targets of other tiles are zeroed too", "inside = (targets >= v0) & (targets < v0 + width)", "inside = targets >= v0"),
    ),
    *_of(
        OPS + "linear_logprob.py",
        "tests/ops/test_linear_logprob.py tests/ops/test_head_memory.py tests/ops/test_head_backends.py -k 'not triton'",
        ("zeros as large as the kept logits are made", "    ctx.set_materialize_grads(False)", "    ctx.set_materialize_grads(True)"),
        ("ignored rows keep their log-prob", "state.logps().masked_fill_(ignored, 0.0)", "state.logps()"),
        ("ignored rows keep their gradient", "grad = accurate(grad).masked_fill(ignored, 0.0)", "grad = accurate(grad)"),
        ("targets are not checked", "    elif bad.any():", "    elif False:"),
        ("autocast is not followed", "if not torch.is_autocast_enabled(device):", "if True:"),
        ("logits are kept without a gradient to come", "wants_gradient(hidden, weight, bias) and keeps(mode", "keeps(mode"),
    ),
    *_of(
        OPS + "fused_preference_loss.py",
        "tests/ops/test_fused_preference_loss.py -k 'not triton'",
        ("the upstream gradient is ignored", "spread((grad * slopes).float(), cu_responses", "spread(slopes.float(), cu_responses"),
        ("groups may share a sequence", "if (uses > 1).any():", "if (uses > 2).any():"),
        ("the number of groups of the step is ignored", "divisor_of(pairs, num_groups)", "divisor_of(pairs, None)"),
    ),
    *_of(
        OPS + "preference_loss.py",
        "tests/ops/test_preference_loss.py tests/ops/test_fused_preference_loss.py -k 'not triton'",
        ("a slope's pull has the wrong sign", "slopes.index_add_(0, chosen, -pull).index_add_(0, rejected, pull)", "slopes.index_add_(0, chosen, pull).index_add_(0, rejected, -pull)"),
        ("the exploration's slope lacks the divisor", "exploration_weight / divisor, 0.0)", "exploration_weight, 0.0)"),
        ("smoothing is left out of the slope", "- label_smoothing * torch.sigmoid(logits)", "- 0 * torch.sigmoid(logits)"),
    ),
    *_of(
        OPS + "sequence_sum.py",
        "tests/ops/test_sequence_sum.py",
        ("sums are fp32", "torch.segment_reduce(token_logps.double(),", "torch.segment_reduce(token_logps.float(),"),
    ),
]  # fmt: skip

ATTENTION = [
    *_of(
        OPS + "attention_reference.py",
        "tests/ops/test_attention.py",
        ("a query does not see itself", "hidden = key > query", "hidden = key >= query"),
        ("the window is one key too long", "key <= query - window", "key < query - window"),
        ("the mask is aligned top-left", "torch.arange(num_keys - num_queries, num_keys,", "torch.arange(0, num_queries,"),
        ("the cap's slope is 1", "d_scores *= 1 - (capped", "d_scores *= 1 + 0 * (capped"),
        ("heads are paired wrongly", "repeat_interleave(repeats, dim=1)", "repeat(1, repeats, 1)"),
        ("the scale is left out of the gradient", ".sum(-1, keepdim=True)) * scores.scale", ".sum(-1, keepdim=True))"),
    ),
    *_of(
        OPS + "attention_flash_cpu.py",
        "tests/ops/test_attention_choice.py tests/ops/test_attention.py",
        ("a query sees the next key", "triu_(1)", "triu_(2)"),
        ("the mask is that of the first queries", "mask[num_keys - num_queries : num_keys, :num_keys]", "mask[:num_queries, :num_keys]"),
        ("shorter queries take the kernel's top-left mask", "num_queries == num_keys and (", "("),
    ),
    *_of(
        OPS + "kv_gather.py",
        "tests/ops/test_attention_gather.py tests/ops/test_attention.py",
        ("rows are summed in another order", "torch.sort(kv_index, stable=True)", "torch.sort(kv_index, stable=True, descending=True)"),
        ("bounds are one row off", "torch.arange(num_rows + 1, device=device)", "torch.arange(num_rows + 1, device=device) + 1"),
        ("the last reader's gradient is the only one", "index_add_(0, index, high)", "index_copy_(0, index, high)"),
    ),
    *_of(
        OPS + "attention_varlen.py",
        "tests/ops/test_attention_varlen.py",
        ("the window is one key too long", "window - 1, 0", "window, 0"),
        ("a backward pass that may differ from run to run", "with _deterministic():", "if True:"),
        ("the flag of 2.13 is missing", '{"enable_gqa": True} if has_flag else {}', "{}"),
    ),
    *_of(
        OPS + "attention_choice.py",
        "tests/ops/test_attention_choice.py",
        ("a back end that gives NaN passes", "if not distance <= TOL", "if distance > TOL"),
        ("the self-test has no window", "WINDOW if case.window else None", "None"),
        ("the self-test has no softcap", "SOFTCAP if case.softcap else None", "None"),
    ),
    *_of(
        OPS + "attention.py",
        "tests/ops/test_attention_refused.py",
        ("branches of no queries pass", "1 <= num_queries", "0 <= num_queries"),
    ),
]  # fmt: skip

MUTANTS = [*ROWS_TRITON, *LOSS_TRITON, *SUMS_TRITON, *HEAD, *ATTENTION]
