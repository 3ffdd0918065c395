"""The gated feed-forward layer of a decoder, down(act(gate(x)) * up(x)), in one autograd node.

It walks over blocks of rows. What lies between the matmuls of a block stays in the caches, and of all that is as wide
as the hidden layer only act's argument and its factor are kept: their product is made again in the backward pass, which
reads both anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selm_fast.ops.backend import resolve
from selm_fast.ops.gemm import matmul
from selm_fast.ops.head import accumulator
from selm_fast.ops.linear_logprob import wants_gradient
from selm_fast.ops.rows_torch import accurate

Activation = Literal["silu", "gelu_tanh"]
BLOCK_ROWS = 1024  # 128 rows cost a tenth more, all at once as much (256 x 768 fp32, Zen 4), and memory


def _share(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """s with act(x) = x s, and x ds/dx: silu is x sigmoid(x), gelu's tanh form x sigmoid(2 sqrt(2 / pi) (x + ...))."""
    if activation == "silu":
        return x.sigmoid(), x * x.sigmoid() * (-x).sigmoid()
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    bent = scale * x * (1 + cubic * x * x)
    return bent.sigmoid(), scale * x * (1 + 3 * cubic * x * x) * bent.sigmoid() * (-bent).sigmoid()


def _gated(gate: Tensor, up: Tensor, activation: str, out: Tensor, backend: str) -> None:
    """out = act(gate) * up; act(gate) is rounded before it is multiplied, as it is between two modules."""
    if backend == "cpp":
        torch.ops.selm_fast_cpp.gated(gate, up, activation, out)
        return
    x = accurate(gate)
    out.copy_(accurate((x * _share(x, activation)[0]).to(gate.dtype)) * accurate(up))


def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor, out: Tensor, backend: str
) -> None:
    """The gradients of `_gated` by gate and up, and what it gave."""
    if backend == "cpp":
        torch.ops.selm_fast_cpp.gated_backward(grad, gate, up, activation, d_gate, d_up, out)
        return
    x, d = accurate(gate), accurate(grad)
    share, slope = _share(x, activation)
    d_gate.copy_(d * accurate(up) * (share + slope))
    d_up.copy_(d * (x * share))
    out.copy_(accurate((x * share).to(gate.dtype)) * accurate(up))


def _blocks(num_rows: int) -> Iterator[tuple[slice, slice]]:
    """The one cut of the rows, with and without gradients and backward: a block's rows, and its part of a scratch."""
    for start in range(0, num_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, num_rows)
        yield slice(start, stop), slice(stop - start)


def _scratch(like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for the largest block of rows."""
    return like.new_empty(min(like.shape[0], BLOCK_ROWS), width, dtype=dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


@torch.library.custom_op("selm_fast::gated_mlp", mutates_args=())
def _op(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D) -> out (T, D), and of each row gate(x) and up(x), both (T, I), or (0, I) where they are not kept."""
    served = resolve(backend, x.device, x.dtype, triton=False)
    width = gate.shape[0]
    out = x.new_empty(x.shape[0], down.shape[0])
    gates, ups = (x.new_empty(x.shape[0], width) if keep else _scratch(x, width) for _ in range(2))
    product = _scratch(x, width)
    for rows, block in _blocks(x.shape[0]):
        place = rows if keep else block
        _linear(x[rows], gate, gate_bias, gates[place])
        _linear(x[rows], up, up_bias, ups[place])
        _gated(gates[place], ups[place], activation, product[block], served)
        _linear(product[block], down, down_bias, out[rows])
    return (out, gates, ups) if keep else (out, x.new_empty(0, width), x.new_empty(0, width))


@_op.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.shape[0] if keep else 0, gate.shape[0])
    return x.new_empty(x.shape[0], down.shape[0]), x.new_empty(kept), x.new_empty(kept)


class _Sums:
    """The gradient of a weight and of its bias, summed over blocks of rows in fp32 and rounded once."""

    def __init__(self, weight: Tensor, need_weight: bool, need_bias: bool, backend: str) -> None:
        high = accumulator(weight.dtype)
        self.backend = backend
        self.weight = torch.zeros_like(weight, dtype=high) if need_weight else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=high) if need_bias else None

    def add(self, grad: Tensor, inputs: Tensor) -> None:
        """Of a block: the gradient of what came out, and what went in."""
        if self.weight is not None:
            matmul(grad.t(), inputs, self.weight, accumulate=True, backend=self.backend)
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)


@torch.library.custom_op("selm_fast::gated_mlp_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gates: Tensor,
    ups: Tensor,
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """-> gradients of x, the three weights and the three biases; (0,) where one is not needed."""
    served = resolve(backend, x.device, x.dtype, triton=False)
    need_x, need_gate, need_up, need_down, *need_biases = needs
    needed = (need_gate, need_up, need_down)
    sums = [_Sums(*each, served) for each in zip((gate, up, down), needed, need_biases, strict=True)]
    dx = x.new_empty(x.shape if need_x else (0,))
    dx_block = _scratch(x, x.shape[1], accumulator(x.dtype)) if need_x and x.dtype != accumulator(x.dtype) else None
    d_product, d_gate, d_up, product = (_scratch(x, gate.shape[0]) for _ in range(4))
    for rows, block in _blocks(x.shape[0]):
        torch.mm(grad[rows], down, out=d_product[block])
        _gated_backward(
            d_product[block], gates[rows], ups[rows], activation, d_gate[block], d_up[block], product[block], served
        )
        for total, d, inputs in zip(
            sums, (d_gate[block], d_up[block], grad[rows]), (x[rows], x[rows], product[block]), strict=True
        ):
            total.add(d, inputs)
        if need_x:
            target = dx[rows] if dx_block is None else dx_block[block]
            matmul(d_gate[block], gate, target, accumulate=False, backend=served)
            matmul(d_up[block], up, target, accumulate=True, backend=served)
            if dx_block is not None:
                dx[rows] = target
    none = x.new_empty(0)
    found = [total.weight for total in sums] + [total.bias for total in sums]
    return [dx, *(none.clone() if g is None else g.to(x.dtype) for g in found)]


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gates: Tensor,
    ups: Tensor,
    activation: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    weights = (gate, up, down)
    shapes = [x.shape, *(w.shape for w in weights), *(w.shape[:1] for w in weights)]
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, activation, _, backend = inputs
    ctx.save_for_backward(*tensors[:4], *output[1:])
    ctx.activation, ctx.backend = activation, backend
    ctx.set_materialize_grads(False)  # zeros for gates and ups would cost as much as they do


@once_differentiable
def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:7]
    unasked = (None,) * (len(ctx.needs_input_grad) - len(needs))
    if grad is None:
        return (*(None,) * len(needs), *unasked)
    grads = _backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.activation, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *unasked)


_op.register_autograd(_autograd, setup_context=_setup_context)


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    activation: Activation,
    backend: Literal["auto", "torch", "cpp"] = "auto",
) -> Tensor:
    """(act(x gate^T) * (x up^T)) down^T, with the biases of the three where there are any (arXiv 2002.05202).

    x: (..., D) fp32|bf16|fp16 (fp64, for checks, is computed in fp64), any strides.
    gate, up: (I, D), down: (D, I), dtype and device of x; biases: (I,), (I,), (D,) or None.
    activation: "silu", or "gelu_tanh", the form of gelu with a tanh.
    Returns (..., D), dtype of x; differentiable in x, weights and biases, which may be frozen one by one. Between the
    passes x, x gate^T and x up^T are kept, and nothing where no gradient is asked for; the result has the same bits.
    Gradients are summed in fp32 and rounded once.
    Raises ValueError for tensors that do not fit, an activation that is not served or a back end that cannot run.
    """
    tensors = [t for t in (x, gate, up, down, *biases) if t is not None]
    shapes = [None if b is None else tuple(b.shape) for b in biases]
    D, width = x.shape[-1], gate.shape[0]
    expected = ((width, D), (width, D), (D, width))
    if tuple(tuple(w.shape) for w in (gate, up, down)) != expected or any(
        shape not in (None, weight[:1]) for shape, weight in zip(shapes, expected, strict=True)
    ):
        raise ValueError(
            f"x must be (..., D), gate and up (I, D), down (D, I) and biases (I,), (I,), (D,) or None; got "
            f"{tuple(x.shape)}, {tuple(gate.shape)}, {tuple(up.shape)}, {tuple(down.shape)} and {shapes}"
        )
    if len({(t.dtype, t.device) for t in tensors}) > 1 or not x.dtype.is_floating_point:
        raise ValueError(
            "x, weights and biases must share a floating-point dtype and a device; got "
            f"{', '.join(f'{t.dtype} on {t.device}' for t in tensors)}"
        )
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}; got {activation!r}")
    keep = wants_gradient(*tensors)
    out: Tensor = _op(x.reshape(-1, D), gate, up, down, *biases, activation, keep, backend)[0]
    return out.view(x.shape)
