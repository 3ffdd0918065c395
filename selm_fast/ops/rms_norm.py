"""Root-mean-square norm of rows, in one pass forward and one backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selm_fast.ops.backend import resolve
from selm_fast.ops.rows_torch import accurate


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    """x (R, D) -> out (R, D), 1 / rms (R,) fp32."""
    high = accurate(x)
    inverse = torch.rsqrt(high.square().mean(1) + eps)
    normalised = high * inverse.unsqueeze(1)
    if rounds_first:
        normalised = normalised.to(x.dtype)
    return (accurate(normalised) * (accurate(weight) + offset)).to(x.dtype), inverse


def _backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """-> dx in the dtype of x, d_weight fp32; nothing is rounded before them."""
    normalised = accurate(x) * inverse.unsqueeze(1)
    d = accurate(grad) * (accurate(weight) + offset)
    dx = (d - normalised * (d * normalised).mean(1, keepdim=True)) * inverse.unsqueeze(1)
    return dx.to(x.dtype), (accurate(grad) * normalised).sum(0)


@torch.library.custom_op("selm_fast::rms_norm", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """x (R, D) -> out (R, D), 1 / rms (R,) fp32."""
    if resolve(backend, x.device, x.dtype, triton=False) == "torch":
        return _forward(x, weight, eps, offset, rounds_first)
    x = x.contiguous()
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    torch.ops.selm_fast_cpp.rms_norm(x, weight.contiguous(), eps, offset, rounds_first, out, inverse)
    return out, inverse


@_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("selm_fast::rms_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    offset: float,
    need_x: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight; (0,) where one is not needed."""
    grad, x = grad.contiguous(), x.contiguous()
    dx, d_weight = x.new_empty(0), weight.new_empty(0)
    if resolve(backend, x.device, x.dtype, triton=False) == "torch":
        all_dx, all_d_weight = _backward(grad, x, weight, inverse, offset)
        return all_dx if need_x else dx, all_d_weight.to(weight.dtype) if need_weight else d_weight
    if need_x:
        dx = torch.empty_like(x)
    if need_weight:
        d_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    torch.ops.selm_fast_cpp.rms_norm_backward(
        grad,
        x,
        weight.contiguous(),
        inverse,
        offset,
        dx if need_x else None,
        d_weight if need_weight else None,
    )
    return dx, d_weight.to(weight.dtype)


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    offset: float,
    need_x: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset, _, backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.offset, ctx.backend = offset, backend
    ctx.set_materialize_grads(False)


@once_differentiable
def _autograd(ctx: Any, grad: Tensor | None, _grad_inverse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    unasked = (None,) * (len(ctx.needs_input_grad) - 2)
    if grad is None:
        return (None, None, *unasked)
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.offset, *needs, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *unasked)


_op.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
    backend: Literal["auto", "torch", "cpp"] = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension (arXiv 1910.07467), computed in fp32.

    x: (..., D) fp32|bf16|fp16, any strides (fp64, for checks, is computed in fp64).
    weight: (D,), dtype and device of x.  eps: of the same unit as x^2.
    offset: 0, or 1 for weights that are kept as their distance from 1 (Gemma).
    rounds_first: round x / rms to the dtype of x before it is multiplied (Llama), or the product alone (Gemma, OLMo 2).
    Returns (..., D), dtype of x; differentiable in x and weight, which may be frozen one by one. x and one fp32 number
    a row are kept; gradients are rounded once, that of the weight summed in an order that the number of threads does
    not change.
    Raises ValueError for tensors that do not fit or a back end that cannot run.
    """
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x must be (..., D) and weight (D,); got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.dtype.is_floating_point or x.device != weight.device:
        raise ValueError(
            f"x and weight must share a floating-point dtype and a device; got {x.dtype} on {x.device} and "
            f"{weight.dtype} on {weight.device}"
        )
    out: Tensor = _op(x.reshape(-1, x.shape[-1]), weight, eps, offset, rounds_first, backend)[0]
    return out.view(x.shape)
