"""AdamW: one step on one parameter or one shard of it, with moments in fp32 or stochastically rounded to bf16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from selm_fast.ops.backend import Backend, resolve
from selm_fast.ops.stochastic_rounding import random_bits, round_, step_key

# Elements at a time: on a CPU the work space stays in the caches; elsewhere launches are few and it is some 100 MiB.
CPU_CHUNK = 1 << 16
FUSED_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 22


class Tensors(NamedTuple):
    """What a step reads and, but for the gradient, writes: (N,) each, fp32, the moments fp32 or bf16."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Settings(NamedTuple):
    """The numbers of AdamW and the source of its random bits, as `adamw_` describes them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    salt: int
    offset: int

    def log_betas(self) -> tuple[float, float]:
        """ln beta1 and ln beta2."""
        beta1, beta2 = (math.log(beta) if beta else -math.inf for beta in (self.beta1, self.beta2))
        return beta1, beta2


class _Scalars(NamedTuple):
    """What a step's number and the settings come to, () each."""

    step_size: Tensor  # lr / (1 - beta1^step), fp32
    by_bias2: Tensor  # 1 / sqrt(1 - beta2^step), fp32
    key: Tensor  # int64


def _scalars(step: Tensor, settings: Settings) -> _Scalars:
    """In fp64: in fp32, 1 - .999^step has lost four digits at step 1."""
    bias1, bias2 = (1.0 - torch.exp(step.double() * log_beta) for log_beta in settings.log_betas())
    return _Scalars((settings.lr / bias1).float(), (1.0 / bias2.sqrt()).float(), step_key(step, settings.salt))


def by_torch(
    tensors: Tensors, step: Tensor, settings: Settings, grad_scale: Tensor | None, skip: Tensor | None
) -> None:
    """The plain-torch reference, chunk by chunk."""
    numel, device = tensors.param.numel(), tensors.param.device
    scalars = _scalars(step, settings)
    size = CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK
    indices = torch.arange(min(size, numel), dtype=torch.int32, device=device)
    for start, end in _chunks(numel, size, settings.offset):
        part = Tensors(*(t[start:end] for t in tensors))
        param, m, v = _updated(part, grad_scale, scalars, settings)
        if part.exp_avg.dtype == torch.bfloat16:
            bits = random_bits(scalars.key, settings.offset + start, indices[: end - start])
            round_(m, bits & 0xFFFF)
            round_(v, (bits >> 16) & 0xFFFF)
        for old, new in ((part.param, param), (part.exp_avg, m), (part.exp_avg_sq, v)):
            old.copy_(new if skip is None else torch.where(skip.bool(), old, new))


def _updated(
    tensors: Tensors, grad_scale: Tensor | None, scalars: _Scalars, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The new weights and moments, fp32.

    Multiplications and additions are separate operations, and decay and step are subtracted as one: each rounds once,
    as in the Triton kernel, to the same bits.
    """
    param, grad, exp_avg, exp_avg_sq = tensors
    grad = grad if grad_scale is None else grad * grad_scale
    m = exp_avg.float() * settings.beta1
    m += grad * (1 - settings.beta1)
    v = exp_avg_sq.float() * settings.beta2
    v += (grad * (1 - settings.beta2)).mul_(grad)
    root = v.double().sqrt_().float()  # on a CPU, torch's own fp32 root is off by an ulp for one number in five
    denominator = root.mul_(scalars.by_bias2).add_(settings.eps)
    change = torch.div(m, denominator, out=denominator).mul_(scalars.step_size)
    change += param * (settings.lr * settings.weight_decay)
    return param - change, m, v


def _chunks(numel: int, size: int, offset: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` elements; positions in one have the same high 32 bits."""
    start = 0
    while start < numel:
        carry = (1 << 32) - (offset + start) % (1 << 32)
        end = min(start + size, start + carry, numel)
        yield start, end
        start = end


def by_fused_torch(tensors: Tensors, step: Tensor, settings: Settings, grad_scale: Tensor | None) -> None:
    """torch.optim.AdamW(fused=True) on a CPU, to the bit, with fp32 moments.

    It takes a scale itself, but divides by it, and overwrites the gradient.
    """
    numel = tensors.param.numel()
    size = numel if grad_scale is None else min(numel, FUSED_CHUNK * torch.get_num_threads())
    scaled = torch.empty(0 if grad_scale is None else size)
    for start in range(0, numel, size):
        p, g, m, v = (t[start : start + size] for t in tensors)
        if grad_scale is not None:
            g = torch.mul(g, grad_scale, out=scaled[: g.numel()])
        torch._fused_adamw_(
            [p], [g], [m], [v], [], [step], lr=settings.lr, beta1=settings.beta1, beta2=settings.beta2,
            weight_decay=settings.weight_decay, eps=settings.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    salt: int = 0,
    offset: int = 0,
    backend: Backend = "auto",
) -> None:
    """One step of AdamW in place (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, as torch.optim.AdamW).

    With g = grad_scale * grad:  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    param -= lr (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay param).

    bf16 moments are computed in fp32, used so, and rounded stochastically when stored. Rounding to the nearest would
    keep v from falling: at beta2 = .999 it falls by less than half the gap between bf16 numbers. The stored moments
    have the right mean. One rounding has a variance of at most gap^2/4, gap^2/6 on average over where x lies in its
    gap: an rms of at most .39% of x, .23% on average over where x lies between powers of two. Of earlier roundings, the
    moment that a step uses holds beta^2 / (1 - beta^2) times that variance where moments keep their size: .48% of m at
    beta1 = .9, 5.2% of v at beta2 = .999. A step then differs from that of exact moments by an rms of sqrt(.48^2 +
    (5.2 / 2)^2) = 2.7% of its size, 4.5% wherever moments lie, and is .1% longer on average, for 1/sqrt(v) is convex.
    Where gradients fall, older and larger roundings count for more: v after k steps without any is off by .23%
    sqrt(500 + k).

    param, grad: fp32, contiguous, of one shape, any rank, any number of elements.
    exp_avg, exp_avg_sq: m and v, of the same shape, contiguous, both fp32 or both bf16.
    step: () fp32, the number of this step, from 1. It is not changed.
    grad_scale: () fp32, the gradient's factor, as clipping needs one; 1 if None.
    skip: () bool or fp32; where true or not 0, param and moments stay as they are to the bit, whatever grad holds.
    salt, offset: of the random bits of bf16 moments: an int64 for the parameter, and the position of the first element
        in the whole parameter. An element's bits depend on salt, position and step alone.
    backend: "auto" | "torch" | "triton" | "cpp"; torch and cpp are the same here. Triton gives the bits of the plain
        torch reference. On a CPU fp32 moments are served by torch's fused kernel; in the last numel % 16 elements of
        a tensor it may round exp_avg_sq the other way, so shards of another size can differ from the whole there.
    Raises ValueError for tensors or numbers that do not fit, and for a back end that cannot run.
    """
    settings = Settings(lr, beta1, beta2, eps, weight_decay, salt, offset)
    tensors = Tensors(param, grad, exp_avg, exp_avg_sq)
    _check_tensors(tensors)
    _check_scalars(param, step, grad_scale, skip)
    _check_settings(settings)
    chosen = resolve(backend, param.device)
    if param.numel() == 0:
        return
    tensors = Tensors(*(t.view(-1) for t in tensors))
    if chosen == "triton":
        from selm_fast.ops.adamw_triton import adamw_step

        adamw_step(tensors, step, settings, grad_scale, skip)
    elif param.device.type != "cpu":
        by_torch(tensors, step, settings, grad_scale, skip)
    elif skip is None or not bool(skip):
        if exp_avg.dtype == torch.float32:
            by_fused_torch(tensors, step, settings, grad_scale)
        else:
            by_torch(tensors, step, settings, grad_scale, None)


def _check_tensors(tensors: Tensors) -> None:
    shape, device = tensors.param.shape, tensors.param.device
    for name, tensor in tensors._asdict().items():
        dtypes = (torch.float32, torch.bfloat16) if name.startswith("exp_avg") else (torch.float32,)
        if tensor.dtype not in dtypes or not tensor.is_contiguous():
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name} must be contiguous {expected}; got {tensor.dtype}, strides {tensor.stride()}")
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{name} must have param's shape {tuple(shape)} on {device}; got {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if tensors.exp_avg.dtype != tensors.exp_avg_sq.dtype:
        raise ValueError(
            f"exp_avg_sq must have exp_avg's dtype {tensors.exp_avg.dtype}; got {tensors.exp_avg_sq.dtype}"
        )


def _check_scalars(param: Tensor, step: Tensor, grad_scale: Tensor | None, skip: Tensor | None) -> None:
    for name, tensor, dtypes in (
        ("step", step, (torch.float32,)),
        ("grad_scale", grad_scale, (torch.float32,)),
        ("skip", skip, (torch.bool, torch.float32)),
    ):
        if tensor is None:
            continue
        if tensor.dim() or tensor.dtype not in dtypes or tensor.device != param.device:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(
                f"{name} must be () {expected} on {param.device}; got {tuple(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
    if step.device.type == "cpu" and not step >= 1:  # elsewhere, reading it would stop the device
        raise ValueError(f"step must be the number of this step, from 1; got {step.item()}")


def _check_settings(settings: Settings) -> None:
    for name, beta in (("beta1", settings.beta1), ("beta2", settings.beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {beta}")
    for name, number in (("lr", settings.lr), ("eps", settings.eps), ("weight_decay", settings.weight_decay)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and not negative; got {number}")
    if not -(1 << 63) <= settings.salt < 1 << 63:
        raise ValueError(f"salt must be an int64; got {settings.salt}")
    if not 0 <= settings.offset < 1 << 62:
        raise ValueError(f"offset must be a position, from 0 to 2^62; got {settings.offset}")
