"""Mutants of the optimiser."""

from __future__ import annotations

from tests.mutants.mutant import OPS, mutants_of

ADAMW = [
    *mutants_of(
        OPS + "adamw.py",
        "tests/ops/test_bf16_moments.py",
        ("moments are rounded to the nearest", "            round_(m, bits & 0xFFFF)\n            round_(v, (bits >> 16) & 0xFFFF)\n", ""),
        ("both moments are rounded to the nearest by integers", "bits = random_bits(scalars.key, settings.offset + start, indices[: end - start])", "bits = torch.full_like(indices[: end - start], 0x8000) * 0x10001"),
        ("each step has the same bits", "step_key(step, settings.salt)", "step_key(step * 0, settings.salt)"),
    ),
    *mutants_of(
        OPS + "adamw.py",
        "tests/ops/test_adamw.py",
        ("bias corrections in fp32", "step.double() * log_beta) for", "step * log_beta) for"),
        ("the second correction without its root", "(1.0 / bias2.sqrt())", "(1.0 / bias2)"),
        ("weights are decayed by the rate alone", "param * (settings.lr * settings.weight_decay)", "param * settings.weight_decay"),
        ("eps inside the root", ".mul_(scalars.by_bias2).add_(settings.eps)", ".add_(settings.eps).mul_(scalars.by_bias2)"),
        ("both moments use the same bits", "round_(v, (bits >> 16) & 0xFFFF)", "round_(v, bits & 0xFFFF)"),
        ("a shard's bits begin anew", "settings.offset + start, indices", "start, indices"),
        ("a chunk's bits begin anew", "settings.offset + start, indices", "settings.offset, indices"),
        ("a chunk runs into the next 2^32", "min(start + size, start + carry, numel)", "min(start + size, numel)"),
        ("a skipped step is taken", "elif skip is None or not bool(skip):", "else:"),
        ("a skipped step writes on a device", "new if skip is None else torch.where(skip.bool(), old, new)", "new"),
        ("the gradient is not scaled", "grad = grad if grad_scale is None else grad * grad_scale", "grad = grad + 0"),
        ("the fused kernel's gradient is not scaled", "g = torch.mul(g, grad_scale, out=scaled[: g.numel()])", "pass"),
        ("the caller's gradient is overwritten", "g = torch.mul(g, grad_scale, out=scaled[: g.numel()])", "g.mul_(grad_scale)"),
        ("only the first chunk is fused", "for start in range(0, numel, size):", "for start in range(0, size, size):"),
        ("strided tensors pass", "tensor.dtype not in dtypes or not tensor.is_contiguous()", "tensor.dtype not in dtypes"),
        ("step 0 passes", "and not step >= 1:", "and not step >= 0:"),
    ),
    *mutants_of(
        OPS + "adamw.py",
        "tests/ops/test_adamw_triton.py",
        ("the root of torch on a CPU", "v.double().sqrt_().float()", "v.sqrt()"),
    ),
    *mutants_of(
        OPS + "stochastic_rounding.py",
        "tests/ops/test_stochastic_rounding.py",
        ("a carry makes infinity", "x.clamp_(-BF16_MAX, BF16_MAX).view", "x.view"),
        ("the low bits stay", "encoding &= -0x10000", "encoding &= -1"),
        ("arithmetic shifts", "(x >> places).bitwise_and_((1 << (32 - places)) - 1)", "x >> places"),
        ("the high half of a position is left out", "high = (start >> 32) * 0x9E3779B9", "high = 0"),
        ("the high half of a position only shifts", "x ^= _int32(key ^ high)", "x ^= _int32(key)"),
        ("half of the key is left out", "x += _int32((key >> 32) + high)", "x += _int32(key * 0 + high)"),
        ("a hash of one round", "    x *= -2073254261  # 0x846CA68B\n", ""),
    ),
    *mutants_of(
        OPS + "adamw_triton.py",
        "tests/ops/test_adamw_triton.py",
        ("elements beyond the tensor are written", "    here = index < N\n", "    here = index < N + 1\n"),
        ("only one block is stepped", "tl.program_id(0).to(tl.int64) * BLOCK_N", "tl.program_id(0).to(tl.int64) * 0"),
        ("a skipped step is taken", "tl.where(tl.load(skip_ptr) != 0, 0, N)", "tl.where(tl.load(skip_ptr) != 0, N, N)"),
        ("half a flag does not skip", "tl.load(skip_ptr) != 0, 0, N)", "tl.load(skip_ptr).to(tl.int32) != 0, 0, N)"),
        ("the gradient is not scaled", "grad *= tl.load(grad_scale_ptr)", "grad *= 1.0"),
        ("the second correction without its root", "1.0 / tl.sqrt(bias2)", "1.0 / bias2"),
        ("bias corrections in fp32", "bias2 = 1.0 - tl.exp(step.to(tl.float64) * log_beta2)", "bias2 = 1.0 - tl.exp((step * log_beta2).to(tl.float32))"),
        ("decay and step are subtracted one by one", "param -= change + param * decay", "param = (param - param * decay) - change"),
        ("the square before its weight", "(grad * rest2) * grad", "(grad * grad) * rest2"),
        ("moments are rounded to the nearest", "bits = _random_bits(_step_key(step, salt), offset + index)", "bits = (index * 0 + 0x80008000).to(tl.uint32)"),
        ("both moments use the same bits", "v = _round(v, bits >> 16, LARGEST)", "v = _round(v, bits & 0xFFFF, LARGEST)"),
        ("a shard's bits begin anew", "offset + index)", "index)"),
        ("positions of 32 bits", "high = tl.mul((position >> 32).to(tl.uint32)", "high = tl.mul((position * 0).to(tl.uint32)"),
        ("a carry makes infinity", "x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)", "x = x + 0.0"),
    ),
]  # fmt: skip
