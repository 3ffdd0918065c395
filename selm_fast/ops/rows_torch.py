"""The row kernels of the log-prob head in plain torch: the reference that `rows_triton` and `rows_cpp` are held to.

Between the matmuls of a tile, everything that happens to its rows happens here. All row modules have these functions,
with these signatures; R rows, a tile of Vt tokens of the vocabulary that begins at token v0. Logits are
z = softcap * tanh(scale * (x + bias) / softcap) for a matmul's result x = h W^T. What is fp32 here is fp64 for fp64
inputs, which this module alone takes: the algorithm is then checked against finite differences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """z of each row's target as an fp32 dot product: hidden (R, D), weight (V, D), targets (R,) int64 -> (R,) fp32."""
    x = torch.linalg.vecdot(accurate(hidden), accurate(weight[targets]))
    return _finish(x, None if bias is None else bias[targets], scale, softcap)


def fold(
    tile: Tensor,
    targets: Tensor,
    v0: int,
    peak: Tensor,
    total: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    kept: Tensor | None,
    tops: Tensor | None,
) -> None:
    """Fold a tile into the running softmax: total = sum of exp(z - peak) over all tokens but the target.

    Peak and total stay apart: a logsumexp of 200 in fp32 is off by 1e-5, and so would every probability be.

    tile: (R, Vt) fp32, contiguous, x; scratch afterwards.
    targets: (R,) int64.
    peak: (R,) fp32, in and out: the largest z so far, the target's among them; -inf before the first tile.
    total: (R,) fp32, in and out; 0 before the first tile.
    bias: (Vt,) or None, the tile's part.
    kept: None, or (R, Vt) contiguous, filled with z (fp32; it may be `tile` itself) or with z - tops (16 bits).
    tops: (R,) fp32, given with a `kept` of 16 bits: filled with each row's largest z (0 where all are -inf). A likely
        token's probability then comes back with an error of 2^-9 (bf16) of that difference, not of z.
    """
    z = _finish(tile, bias, scale, softcap)
    top = z.amax(1)
    finite_top = top.masked_fill(top == -torch.inf, 0.0)  # a bias of -inf may rule a whole tile out
    exps = z - finite_top.unsqueeze(1)
    if kept is not None and tops is not None:
        kept.copy_(exps)
        tops.copy_(finite_top)
    elif kept is not None and kept.data_ptr() != z.data_ptr():
        kept.copy_(z)
    exps.exp_()
    _zero_targets(exps, targets, v0)
    higher = torch.maximum(peak, top)
    total.mul_(_weight_under(peak, higher)).add_(exps.sum(1) * _weight_under(top, higher))
    peak.copy_(higher)


def softmax(
    tile: Tensor,
    targets: Tensor,
    v0: int,
    peak: Tensor,
    log_total: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    tops: Tensor | None,
    finished: bool,
) -> None:
    """Each token's share in the gradient: out = exp(z - peak - log_total) * dz/dx, 0 at the target.

    dz/dx comes from the capped z.

    tile: (R, Vt), contiguous: what `fold` kept (finished, with its tops where it has 16 bits), or x in fp32, which
        becomes scratch. A kept tile is left as it is.
    peak, log_total: (R,) fp32; log of the sum of exp(z - peak) over all tokens, the target among them.
    out: (R, Vt) contiguous, in the dtype of the matmuls.
    """
    if not finished:
        z = _finish(tile, bias, scale, softcap)
        above_peak = z - peak.unsqueeze(1)
    elif tops is None:
        z = tile
        above_peak = z - peak.unsqueeze(1)
    else:
        z = accurate(tile)
        above_peak = z + (tops - peak).unsqueeze(1)
        z = z + tops.unsqueeze(1)
    shares = above_peak.sub_(log_total.unsqueeze(1)).exp_()
    if softcap is not None:
        shares *= 1 - (z / softcap).square()
    if scale != 1.0:
        shares *= scale
    _zero_targets(shares, targets, v0)
    out.copy_(shares)


def hidden_gradient(total: Tensor, weight: Tensor, targets: Tensor, coef: Tensor, grad: Tensor, out: Tensor) -> None:
    """out = grad o (coef o W[y] - total), rounded once.

    total: (R, D) fp32, P~ W; scratch afterwards.  coef, grad: (R,) fp32.
    out: (R, D), dtype of weight; in fp32 it may be `total` itself.
    """
    target_term = accurate(weight[targets]).mul_(coef.unsqueeze(1))
    out.copy_(target_term.sub_(total).mul_(grad.unsqueeze(1)))


def weight_gradient(
    total: Tensor, v0: int, hidden: Tensor, coef: Tensor, order: Tensor, bounds: Tensor, out: Tensor
) -> None:
    """out[v] = total[v] + sum over the rows i whose target is v of coef[i] h[i]; summed in order, rounded once.

    total: (Vt, D) fp32, -P~^T (g o h) of the tile that begins at token v0; scratch afterwards.
    hidden: (N, D), all rows.  coef: (N,) fp32.  order: (N,) int64, rows sorted by target, stable.
    bounds: (V+1,) int64; the rows whose target is v are order[bounds[v]:bounds[v+1]].
    out: (Vt, D), dtype of hidden; in fp32 it may be `total` itself.
    """
    first, last = bounds[v0].item(), bounds[v0 + total.shape[0]].item()
    here = order[first:last]
    tokens = torch.repeat_interleave(bounds[v0 : v0 + total.shape[0] + 1].diff())
    total.index_add_(0, tokens, accurate(hidden[here]).mul_(coef[here].unsqueeze(1)))
    if out.data_ptr() != total.data_ptr():
        out.copy_(total)


def accurate(t: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is."""
    return t if t.dtype == torch.float64 else t.float()


def _finish(x: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """z, in place."""
    if bias is not None:
        x += bias
    if scale != 1.0:
        x *= scale
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x


def _weight_under(top: Tensor, higher: Tensor) -> Tensor:
    """exp(top - higher), and 1 where both are -inf."""
    return torch.where(top == higher, 1.0, torch.exp(top - higher))


def _zero_targets(tile: Tensor, targets: Tensor, v0: int) -> None:
    """Write 0 at each row's target where the tile holds it; no data-dependent shape, so no host sync."""
    width = tile.shape[1]
    inside = (targets >= v0) & (targets < v0 + width)
    column = (targets - v0).clamp_(0, width - 1).unsqueeze(1)
    tile.scatter_(1, column, tile.gather(1, column).masked_fill_(inside.unsqueeze(1), 0.0))
