"""Log-probability of each target token straight from hidden states, without the logits standing in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selm_fast.ops.backend import BACKENDS, Backend
from selm_fast.ops.head import Folded, Head, accumulator, fold_backward, fold_forward, keeps, kept_shapes
from selm_fast.ops.rows_torch import accurate

Mode = Literal["auto", "keep", "recompute"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("auto", "keep", "recompute")


@torch.library.custom_op("selm_fast::linear_logprob", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, D), targets (N,) int64 -> logps (N,) fp32 and the fields of `Folded`. softcap 0: none."""
    check_targets(targets, weight.shape[0], ignore_index)
    ignored = targets == ignore_index
    head = Head(weight, bias, softcap or None, scale, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        state = fold_forward(hidden, head, targets.masked_fill(ignored, 0), keep)
        logps = state.logps().masked_fill_(ignored, 0.0)
    return logps, state.z_target, state.peak, state.total, state.kept, state.tops


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    folded = fake_folded(hidden, weight, keep)
    return torch.empty_like(folded[0]), *folded


def fake_folded(hidden: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Folded` by shape and dtype."""
    kept_size, tops_shape = kept_shapes(hidden.shape[0], weight, keep)
    high = accumulator(hidden.dtype)
    z_target, peak, total = (hidden.new_empty(hidden.shape[0], dtype=high) for _ in range(3))
    return z_target, peak, total, hidden.new_empty(kept_size), hidden.new_empty(tops_shape, dtype=high)


@torch.library.custom_op("selm_fast::linear_logprob_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    z_target: Tensor,
    peak: Tensor,
    total: Tensor,
    kept: Tensor,
    tops: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (N,) -> gradients of hidden, weight and bias; (0,) where one is not needed."""
    ignored = targets == ignore_index
    head = Head(weight, bias, softcap or None, scale, backend)
    state = Folded(z_target, peak, total, kept, tops)
    with torch.autocast(hidden.device.type, enabled=False):
        grad = accurate(grad).masked_fill(ignored, 0.0)
        needs = (need_hidden, need_weight, need_bias)
        return fold_backward(grad, hidden, head, targets.masked_fill(ignored, 0), state, needs)


@backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    z_target: Tensor,
    peak: Tensor,
    total: Tensor,
    kept: Tensor,
    tops: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, softcap, scale, ignore_index, _, backend = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, *output[1:])
    ctx.settings = (softcap, scale, ignore_index)
    ctx.backend = backend
    ctx.set_materialize_grads(False)  # zeros in the shape of `kept` would cost as much as it does


@once_differentiable
def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    return head_gradients(ctx, grad, ctx.saved_tensors)


def head_gradients(ctx: Any, grad: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of an op whose first inputs are hidden, weight and bias: grad (N,), saved from hidden to tops."""
    needs = ctx.needs_input_grad[:3]
    grads = backward_op(grad, *saved, *ctx.settings, *needs, ctx.backend)
    unasked = len(ctx.needs_input_grad) - len(needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * unasked)


_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mode: Mode = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Log-probability (nats) of each target under softmax(z), z = softcap * tanh(logit_scale * (h W^T + bias) /
    softcap).

    hidden: (..., D) fp32|bf16|fp16, any strides (fp64, for checks, goes through plain torch and comes out in fp64).
    weight: (V, D), dtype and device of `hidden`; under autocast both, and the bias, are cast to its dtype.
    targets: (...) integer, in [0, V) or `ignore_index`.
    bias: (V,) or None.  softcap: > 0 or None (no cap).  logit_scale: multiplies the logits before the cap.
    mode: what is kept for the backward pass: "keep" the logits, N * V * itemsize bytes; "recompute" nothing of that
        size, for one matmul more; "auto" keeps up to 2 GiB. The result has the same bits in each, and without
        gradients.
    backend: "auto" | "torch" | "triton" | "cpp": what computes the rows between the matmuls.
    Returns (...) fp32, 0 where ignored; differentiable in hidden, weight and bias, which may be frozen one by one.
    Accuracy: logsumexp and target logit from fp32; on a CPU without a GEMM of 16-bit operands and fp32 results (see
    `selm-fast doctor`) each *other* logit, and each tile's part of a gradient, is rounded to the inputs' dtype.
    Raises ValueError for shapes, dtypes or settings that do not fit, for a sharded weight (DTensor) and for a back end
    that cannot run; IndexError (on the CPU; a device-side assertion on CUDA) for a target outside [0, V).
    """
    check_head(softcap, logit_scale, mode, backend)
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_tensors(hidden, weight, targets, bias)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    logps: Tensor = _op(
        flat_hidden,
        weight,
        bias,
        targets.reshape(-1).long(),
        softcap or 0.0,
        float(logit_scale),
        ignore_index,
        wants_gradient(hidden, weight, bias) and keeps(mode, flat_hidden.shape[0], weight),
        backend,
    )[0]
    return logps.view(targets.shape)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Will autograd come back for one of these?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def cast_for_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do to a linear layer's operands; unchanged where it is off."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for tensors that do not fit together."""
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "weight is a DTensor, a shard of the head: call this inside the forward of the module that FSDP gathers it "
            "for (other methods: register_fsdp_forward_method), or pass weight.full_tensor()"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden must be (..., D) and weight (V, D); got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden and weight must share one of fp32, bf16, fp16 (or fp64); got {hidden.dtype} and {weight.dtype}"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype.is_floating_point:
        raise ValueError(
            f"targets must be integers of shape {tuple(hidden.shape[:-1])}; got {targets.dtype} {tuple(targets.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be ({weight.shape[0]},) {weight.dtype}; got {tuple(bias.shape)} {bias.dtype}")
    if len({t.device for t in (hidden, weight, targets, bias) if t is not None}) > 1:
        raise ValueError(
            f"hidden, weight, targets and bias must be on one device; got {hidden.device}, {weight.device}, "
            f"{targets.device}{'' if bias is None else f', {bias.device}'}"
        )


def check_head(softcap: float | None, logit_scale: float, mode: str, backend: str) -> None:
    """Raise ValueError for settings outside their range."""
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be finite and > 0, or None; got {softcap}")
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite and not 0; got {logit_scale}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")


def check_targets(targets: Tensor, vocab: int, ignore_index: int | None) -> None:
    """Refuse a target outside [0, vocab) that is not ignored: targets (N,) int64.

    Raises IndexError naming the first on the CPU; on CUDA, where reading it would stop the device, the kernel asserts.
    """
    bad = (targets < 0) | (targets >= vocab)
    if ignore_index is not None:
        bad &= targets != ignore_index
    if targets.device.type != "cpu":
        torch._assert_async(~bad.any(), "a target lies outside the vocabulary")
    elif bad.any():
        row = int(bad.nonzero()[0])
        allowed = "" if ignore_index is None else f" and not ignore_index ({ignore_index})"
        raise IndexError(
            f"targets[{row}] (flattened) is {int(targets[row])}, outside the vocabulary [0, {vocab}){allowed}"
        )
