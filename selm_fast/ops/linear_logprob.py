"""Log-probability of each target token straight from hidden states, without the logits standing in memory.

The vocabulary is walked in tiles. Every mode cuts the same tiles and folds them in the same order, so that the
forward result has the same bits whether or not a gradient is wanted: step 0 is exact because of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Mode = Literal["auto", "keep", "recompute"]

TILE_ROWS = {"cpu": 1024, "cuda": 4096}
TILE_VOCAB = {"cpu": 1024, "cuda": 8192}
# `auto` keeps the logits up to this size. A constant, not a share of free memory: the same command must take the same
# path.
KEEP_BUDGET_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class _Head:
    """The linear head and the function of its output: z = softcap * tanh(scale * (h W^T + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor, v0: int, v1: int, out: Tensor) -> Tensor:
        """z for a tile: hidden (R, D), vocabulary [v0, v1) -> (R, v1 - v0) fp32, written into `out`."""
        weight = self.weight[v0:v1]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.t(), out=out)
        elif hidden.is_cuda:
            out.copy_(torch.mm(hidden, weight.t(), out_dtype=torch.float32))
        else:
            # torch has no 16-bit GEMM with fp32 results on the CPU: the tile is rounded once, to 2^-9 (bf16) of a
            # logit.
            out.copy_(torch.mm(hidden, weight.t()))
        return self._finish(out, None if self.bias is None else self.bias[v0:v1])

    def target_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """z of the target alone, as an fp32 dot product: (R, D), (R,) -> (R,) fp32."""
        z = torch.linalg.vecdot(hidden.float(), self.weight[targets].float())
        return self._finish(z, None if self.bias is None else self.bias[targets])

    def _finish(self, z: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor) -> Tensor | float:
        """dz / d(h W^T), from the capped logits."""
        return self.scale if self.softcap is None else (1 - (z / self.softcap).square()).mul_(self.scale)


def _edges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _tiles(hidden: Tensor, vocab: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The one cut of (N, V) into tiles that every mode uses: ranges of rows, ranges of the vocabulary."""
    kind = hidden.device.type
    return _edges(hidden.shape[0], TILE_ROWS.get(kind, 4096)), _edges(vocab, TILE_VOCAB.get(kind, 8192))


def _mask_targets(tile: Tensor, targets: Tensor, v0: int, v1: int) -> None:
    """Write 0 at each row's target where the tile holds it; no data-dependent shape, so no host sync."""
    inside = (targets >= v0) & (targets < v1)
    column = (targets - v0).clamp_(0, v1 - v0 - 1).unsqueeze(1)
    tile.scatter_(1, column, tile.gather(1, column).masked_fill_(inside.unsqueeze(1), 0.0))


def _forward(
    hidden: Tensor, head: _Head, targets: Tensor, kept: Tensor | None, tops: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> z of the target and logsumexp over all *other* tokens, both (N,) fp32; fills `kept` (N * V,) with the logits.

    With the target left out, logp = -softplus(lse_others - z) never exceeds 0 and keeps its digits as p nears 1.
    tops: (tiles, N) fp32, given where `kept` has 16 bits: the logits are then kept as z minus the largest of their
    tile, so that a likely token's probability comes back with an error of 2^-9 (bf16) of that difference, not of z.
    """
    rows, blocks = _tiles(hidden, head.weight.shape[0])
    z_target = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    lse_others = torch.full_like(z_target, -torch.inf)
    buffer = _scratch(hidden, rows, blocks)
    for r0, r1 in rows:
        h, t, lse = hidden[r0:r1], targets[r0:r1], lse_others[r0:r1]
        z_target[r0:r1] = head.target_logits(h, t)
        for nth, (v0, v1) in enumerate(blocks):
            exps = tile = _view(buffer, r1 - r0, v1 - v0)
            if kept is not None and kept.dtype == torch.float32:
                tile = _kept_tile(kept, head, r0, r1, v0, v1)
            head.logits(h, v0, v1, out=tile)
            top = tile.amax(1)
            top.masked_fill_(top == -torch.inf, 0.0)  # a bias of -inf may rule a whole tile out
            torch.sub(tile, top.unsqueeze(1), out=exps)
            if kept is not None and tops is not None:
                _kept_tile(kept, head, r0, r1, v0, v1).copy_(exps)
                tops[nth, r0:r1] = top
            exps.exp_()
            _mask_targets(exps, t, v0, v1)
            lse.copy_(torch.logaddexp(lse, exps.sum(1).log_().add_(top)))
    return z_target, lse_others


def _kept_tile(kept: Tensor, head: _Head, r0: int, r1: int, v0: int, v1: int) -> Tensor:
    """A tile's place in the kept logits, which lie tile after tile."""
    start = r0 * head.weight.shape[0] + (r1 - r0) * v0
    return kept[start : start + (r1 - r0) * (v1 - v0)].view(r1 - r0, v1 - v0)


def _scratch(hidden: Tensor, rows: list[tuple[int, int]], blocks: list[tuple[int, int]]) -> Tensor:
    size = max((r1 - r0 for r0, r1 in rows), default=0) * max(v1 - v0 for v0, v1 in blocks)
    return hidden.new_empty(size, dtype=torch.float32)


def _view(buffer: Tensor, height: int, width: int) -> Tensor:
    return buffer[: height * width].view(height, width)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    head: _Head,
    targets: Tensor,
    z_target: Tensor,
    lse_others: Tensor,
    kept: Tensor | None,
    tops: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias for an upstream gradient per token, grad (N,) fp32.

    With P~ the softmax rows whose target is zeroed (and each logit's slope multiplied in):
    dH = g o ((1 - p_y) W[y] - P~ W),  dW = scatter_y(g (1 - p_y) h) - P~^T (g o h).
    Vocabulary blocks are outermost, so that each block of dW is final when it is left; dH gathers in fp32.
    """
    weight, dtype = head.weight, hidden.dtype
    rows, blocks = _tiles(hidden, weight.shape[0])
    need_hidden, need_weight, need_bias = needs
    lse = torch.logaddexp(lse_others, z_target)
    # (1 - p_y) from the difference itself: 1 minus a rounded p has no correct digit once p > .999.
    target_coef = torch.sigmoid(lse_others - z_target) * head.slope(z_target)
    scaled = (hidden * grad.unsqueeze(1)).to(dtype) if need_weight else None
    order = torch.argsort(targets, stable=True)
    bounds = torch.searchsorted(
        targets[order], torch.tensor([b[0] for b in blocks] + [weight.shape[0]], device=targets.device)
    )
    cuts: list[int] = bounds.tolist()

    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = torch.empty_like(head.bias) if need_bias and head.bias is not None else None
    buffer = _scratch(hidden, rows, blocks)
    for nth, ((v0, v1), first, last) in enumerate(zip(blocks, cuts[:-1], cuts[1:], strict=True)):
        dw = torch.zeros(v1 - v0, weight.shape[1], dtype=torch.float32, device=weight.device) if need_weight else None
        db = torch.zeros(v1 - v0, dtype=torch.float32, device=weight.device) if d_bias is not None else None
        for r0, r1 in rows:
            h = hidden[r0:r1]
            tile = _view(buffer, r1 - r0, v1 - v0)
            if kept is None:
                head.logits(h, v0, v1, out=tile)
            elif tops is None:
                # In place: the logits are not needed again, and autograd refuses a second pass over a changed tensor.
                tile = _kept_tile(kept, head, r0, r1, v0, v1)
            else:
                tile.copy_(_kept_tile(kept, head, r0, r1, v0, v1)).add_(tops[nth, r0:r1].unsqueeze(1))
            slope = head.slope(tile)
            tile.sub_(lse[r0:r1].unsqueeze(1)).exp_()
            if isinstance(slope, Tensor) or slope != 1.0:
                tile *= slope
            _mask_targets(tile, targets[r0:r1], v0, v1)
            p = tile.to(dtype)
            if d_hidden is not None:
                _add_mm(d_hidden[r0:r1], p, weight[v0:v1])
            if dw is not None and scaled is not None:
                _add_mm(dw, p.t(), scaled[r0:r1])
            if db is not None:
                db += tile.t() @ grad[r0:r1]
        here = order[first:last]
        if dw is not None and d_weight is not None:
            coef = (grad[here] * target_coef[here]).unsqueeze(1)
            d_weight[v0:v1] = dw.neg_().index_add_(0, targets[here] - v0, hidden[here].float() * coef)
        if db is not None and d_bias is not None:
            d_bias[v0:v1] = db.neg_().index_add_(0, targets[here] - v0, grad[here] * target_coef[here])
    if d_hidden is not None:
        for r0, r1 in rows:
            target_term = weight[targets[r0:r1]].float().mul_(target_coef[r0:r1].unsqueeze(1))
            d_hidden[r0:r1].neg_().add_(target_term).mul_(grad[r0:r1].unsqueeze(1))
        d_hidden = d_hidden.to(dtype)
    return d_hidden, d_weight, d_bias


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (fp32) += a @ b, with fp32 results where the device has such a GEMM."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total += torch.mm(a, b)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        keep: bool,
    ) -> Tensor:
        kept = hidden.new_empty(hidden.shape[0] * weight.shape[0]) if keep else None
        head = _Head(weight, bias, softcap, scale)
        tops = None
        if keep and hidden.dtype != torch.float32:
            tops = hidden.new_empty(len(_tiles(hidden, weight.shape[0])[1]), hidden.shape[0], dtype=torch.float32)
        z_target, lse_others = _forward(hidden, head, targets, kept, tops)
        ctx.save_for_backward(hidden, weight, bias, targets, z_target, lse_others, kept, tops)
        ctx.head_settings = (softcap, scale)
        return _logps(z_target, lse_others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, z_target, lse_others, kept, tops = ctx.saved_tensors
        head = _Head(weight, bias, *ctx.head_settings)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        grads = _backward(grad.float(), hidden, head, targets, z_target, lse_others, kept, tops, needs)
        return (*grads, None, None, None, None)


def _logps(z_target: Tensor, lse_others: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(lse_others - z_target)


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
    backend: Literal["auto", "torch"] = "auto",
) -> Tensor:
    """Log-probability (nats) of each target under softmax(z), z = softcap * tanh(logit_scale * (h W^T + bias) /
    softcap).

    hidden: (..., D) fp32|bf16|fp16, any strides.
    weight: (V, D), dtype and device of `hidden`.
    targets: (...) integer, in [0, V) or `ignore_index`.
    bias: (V,) or None.  softcap: > 0 or None (no cap).  logit_scale: multiplies the logits before the cap.
    mode: what is kept for the backward pass: "keep" the logits, N * V * itemsize bytes; "recompute" nothing of that
        size, for one matmul more; "auto" keeps up to 2 GiB. The result has the same bits in each, and without
        gradients.
    Returns (...) fp32, 0 where ignored; differentiable in hidden, weight and bias, which may be frozen one by one.
    Accuracy: logsumexp and target logit from fp32; 16-bit inputs on a CPU have each *other* logit rounded to that
    dtype.
    Raises ValueError for shapes, dtypes or settings that do not fit, IndexError (CPU) for a target outside [0, V).
    """
    _check(hidden, weight, targets, bias, softcap, logit_scale, mode, backend)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = targets.reshape(-1).long()
    ignored = flat_targets == ignore_index
    if hidden.device.type == "cpu":
        _check_range(flat_targets, ignored, weight.shape[0], ignore_index)
    safe_targets = flat_targets.masked_fill(ignored, 0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        keep = mode == "keep" or (
            mode == "auto" and flat_hidden.shape[0] * weight.shape[0] * hidden.itemsize <= KEEP_BUDGET_BYTES
        )
        logps: Tensor = _LinearLogprob.apply(flat_hidden, weight, bias, safe_targets, softcap, float(logit_scale), keep)  # type: ignore[no-untyped-call]
    else:
        head = _Head(weight.detach(), bias, softcap, float(logit_scale))
        logps = _logps(*_forward(flat_hidden, head, safe_targets, None, None))
    return logps.masked_fill(ignored, 0.0).view(targets.shape)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    mode: str,
    backend: str,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden must be (..., D) and weight (V, D); got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden and weight must share one of fp32, bf16, fp16; got {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:-1] or targets.dtype.is_floating_point:
        raise ValueError(
            f"targets must be integers of shape {tuple(hidden.shape[:-1])}; got {targets.dtype} {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},); got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None; got {softcap}")
    if not 0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be finite and not 0; got {logit_scale}")
    if mode not in ("auto", "keep", "recompute"):
        raise ValueError(f"mode must be 'auto', 'keep' or 'recompute'; got {mode!r}")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend must be 'auto' or 'torch'; got {backend!r}")


def _check_range(targets: Tensor, ignored: Tensor, vocab: int, ignore_index: int) -> None:
    bad = ((targets < 0) | (targets >= vocab)) & ~ignored
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"targets[{row}] (flattened) is {int(targets[row])}, outside the vocabulary [0, {vocab}) and not "
            f"ignore_index ({ignore_index})"
        )
