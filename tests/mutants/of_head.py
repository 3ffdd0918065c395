"""Mutants of the head, the loss and their plain-torch references."""

from __future__ import annotations

from tests.mutants.mutant import OPS, mutants_of

HEAD = [
    *mutants_of(
        OPS + "head.py",
        "tests/ops/test_linear_logprob.py tests/ops/test_head_backends.py tests/ops/test_head_memory.py -k 'not triton'",
        ("1 - p is that of all tokens", "self.total.log().add_(self.peak - self.z_target)", "self.log_total().add_(self.peak - self.z_target)"),
        ("the target is left out of the softmax", "(self.total + torch.exp(self.z_target - self.peak)).log_()", "self.total.log()"),
        ("the hidden gradient forgets earlier tiles", "d_hidden[r0:r1], accumulate=nth > 0", "d_hidden[r0:r1], accumulate=False"),
        ("the weight gradient forgets earlier rows", "dw, accumulate=r0 > 0", "dw, accumulate=False"),
        ("the weight gradient has the wrong sign", "hidden * grad.neg().unsqueeze(1)", "hidden * grad.unsqueeze(1)"),
        ("the bias gradient has the wrong sign", "db -= share[s0:s1].t()", "db += share[s0:s1].t()"),
        ("the slope at the cap is 1", "_slope(state.z_target, head)\n", "1.0\n"),
        ("kept tiles lie a row off", "kept[r0 * vocab + (r1 - r0) * v0 :]", "kept[r0 * vocab + r0 * v0 :]"),
        ("targets are searched to their right", "torch.arange(head.vocab + 1, device=targets.device))", "torch.arange(head.vocab + 1, device=targets.device), right=True)"),
        ("the budget is ignored", "num_rows * weight.shape[0] * weight.itemsize <= KEEP_BUDGET_BYTES", "num_rows >= 0"),
    ),
    *mutants_of(
        OPS + "rows_torch.py",
        "tests/ops/test_head_backends.py -k torch",
        ("the maximum begins at 0", "top = z.amax(1)", "top = z.amax(1).clamp(min=0)"),
        ("the cap's slope is that of raw logits", "shares *= 1 - (z / softcap).square()", "shares *= 1 - (z / softcap).tanh().square()"),
        ("the bias comes after the cap", "    if bias is not None:\n        x += bias\n    if scale != 1.0:\n        x *= scale\n    if softcap is not None:\n        x.div_(softcap).tanh_().mul_(softcap)\n", "    if scale != 1.0:\n        x *= scale\n    if softcap is not None:\n        x.div_(softcap).tanh_().mul_(softcap)\n    if bias is not None:\n        x += bias\n"),
        ("targets of other tiles are zeroed too", "inside = (targets >= v0) & (targets < v0 + width)", "inside = targets >= v0"),
    ),
    *mutants_of(
        OPS + "linear_logprob.py",
        "tests/ops/test_linear_logprob.py tests/ops/test_head_memory.py tests/ops/test_head_backends.py -k 'not triton'",
        ("zeros as large as the kept logits are made", "    ctx.set_materialize_grads(False)", "    ctx.set_materialize_grads(True)"),
        ("ignored rows keep their log-prob", "state.logps().masked_fill_(ignored, 0.0)", "state.logps()"),
        ("ignored rows keep their gradient", "grad = accurate(grad).masked_fill(ignored, 0.0)", "grad = accurate(grad)"),
        ("targets are not checked", "    elif bad.any():", "    elif False:"),
        ("autocast is not followed", "if not torch.is_autocast_enabled(device):", "if True:"),
        ("logits are kept without a gradient to come", "wants_gradient(hidden, weight, bias) and keeps(mode", "keeps(mode"),
    ),
    *mutants_of(
        OPS + "fused_preference_loss.py",
        "tests/ops/test_fused_preference_loss.py -k 'not triton'",
        ("the upstream gradient is ignored", "spread((grad * slopes).to(", "spread(slopes.to("),
        ("groups may share a sequence", "if (uses > 1).any():", "if (uses > 2).any():"),
        ("the number of groups of the step is ignored", "divisor_of(pairs, num_groups)", "divisor_of(pairs, None)"),
    ),
    *mutants_of(
        OPS + "preference_loss.py",
        "tests/ops/test_preference_loss.py tests/ops/test_fused_preference_loss.py -k 'not triton'",
        ("a slope's pull has the wrong sign", "slopes.index_add_(0, chosen, -pull).index_add_(0, rejected, pull)", "slopes.index_add_(0, chosen, pull).index_add_(0, rejected, -pull)"),
        ("the exploration's slope lacks the divisor", "exploration_weight / divisor, 0.0)", "exploration_weight, 0.0)"),
        ("smoothing is left out of the slope", "- label_smoothing * torch.sigmoid(logits)", "- 0 * torch.sigmoid(logits)"),
    ),
    *mutants_of(
        OPS + "sequence_sum.py",
        "tests/ops/test_sequence_sum.py",
        ("sums are fp32", "torch.segment_reduce(token_logps.double(),", "torch.segment_reduce(token_logps.float(),"),
    ),
]  # fmt: skip
