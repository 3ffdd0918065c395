"""AdamW in one Triton kernel: `adamw.py` says what it computes, and its plain-torch reference gives the same bits.

Weights and moments are read once and written once, the gradient is read once. Nothing is fused to a multiply-add, and
divisions and roots are IEEE's: the kernel waits for memory, not for them.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selm_fast.ops.adamw import Settings, Tensors
from selm_fast.ops.stochastic_rounding import BF16_MAX

BLOCK_N = 1024  # 8 elements a thread: 16 bytes of bf16
NUM_WARPS = 4


@triton.jit
def _step_key(step, salt):
    """`stochastic_rounding.step_key`, as uint64."""
    x = step.to(tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15 + salt.to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _random_bits(key, position):
    """`stochastic_rounding.random_bits`; Triton's interpreter would refuse what wraps unless told."""
    high = tl.mul((position >> 32).to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    late = tl.add(high, (key >> 32).to(tl.uint32), sanitize_overflow=False)
    x = position.to(tl.uint32) ^ key.to(tl.uint32) ^ high
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.add(x ^ (x >> 15), late, sanitize_overflow=False)
    x = tl.mul(x, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _round(x, bits, LARGEST: tl.constexpr):
    """`stochastic_rounding.round_`, to bf16; by its encoding, for the interpreter converts subnormals wrongly."""
    x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    encoding = tl.add(x.to(tl.uint32, bitcast=True), bits, sanitize_overflow=False)
    return (encoding >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["salt", "offset"])
def _adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, grad_scale_ptr, skip_ptr, N,
    lr: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    beta1: tl.float32, rest1: tl.float32, beta2: tl.float32, rest2: tl.float32, eps: tl.float32, decay: tl.float32,
    salt: tl.int64, offset: tl.int64,
    HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr, IS_ROUNDED: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = index < N
    param = tl.load(param_ptr + index, mask=here, other=0.0)
    grad = tl.load(grad_ptr + index, mask=here, other=0.0)
    m = tl.load(exp_avg_ptr + index, mask=here, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + index, mask=here, other=0.0).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(grad_scale_ptr)
    step = tl.load(step_ptr)
    bias1 = 1.0 - tl.exp(step.to(tl.float64) * log_beta1)
    bias2 = 1.0 - tl.exp(step.to(tl.float64) * log_beta2)
    step_size = (lr / bias1).to(tl.float32)
    by_bias2 = (1.0 / tl.sqrt(bias2)).to(tl.float32)

    m = m * beta1 + grad * rest1
    v = v * beta2 + (grad * rest2) * grad
    change = tl.div_rn(m, tl.sqrt_rn(v) * by_bias2 + eps) * step_size
    param -= change + param * decay
    if IS_ROUNDED:
        bits = _random_bits(_step_key(step, salt), offset + index)
        m = _round(m, bits & 0xFFFF, LARGEST)
        v = _round(v, bits >> 16, LARGEST)
    if HAS_SKIP:
        here = index < tl.where(tl.load(skip_ptr) != 0, 0, N)
    tl.store(param_ptr + index, param, mask=here)
    tl.store(exp_avg_ptr + index, m, mask=here)
    tl.store(exp_avg_sq_ptr + index, v, mask=here)


def adamw_step(
    tensors: Tensors, step: Tensor, settings: Settings, grad_scale: Tensor | None, skip: Tensor | None
) -> None:
    """One step in place, one launch; nothing waits for the host.

    step, grad_scale: () fp32.  skip: () bool|fp32.
    """
    assert all(t.is_contiguous() for t in tensors)
    numel = tensors.param.numel()
    log_beta1, log_beta2 = settings.log_betas()
    with torch.cuda.device_of(tensors.param):
        _adamw_kernel[(triton.cdiv(numel, BLOCK_N),)](
            *tensors, step, grad_scale, skip, numel,
            float(settings.lr), log_beta1, log_beta2,
            float(settings.beta1), 1.0 - settings.beta1, float(settings.beta2), 1.0 - settings.beta2,
            float(settings.eps), float(settings.lr * settings.weight_decay), settings.salt, settings.offset,
            HAS_SCALE=grad_scale is not None, HAS_SKIP=skip is not None,
            IS_ROUNDED=tensors.exp_avg.dtype == torch.bfloat16, LARGEST=BF16_MAX,
            BLOCK_N=BLOCK_N, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
