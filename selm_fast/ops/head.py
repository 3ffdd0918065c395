"""The language-model head, a tile at a time: log-probs of the targets, and the gradients that go with them.

The vocabulary is walked in tiles, a matmul and a row kernel each. Every mode cuts the same tiles and folds them in the
same order, so that the forward result has the same bits whether or not a gradient is wanted: step 0 is exact because
of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from selm_fast.ops.backend import resolve
from selm_fast.ops.gemm import matmul
from selm_fast.ops.rows import row_kernels

# CUDA: GEMMs of 4096 x 6144 (768 tiles of 128 x 256 over 132 multiprocessors: 5.8 waves) leave little of the last wave
# empty, and `recompute` stays below half a GB at D = 4096. CPU: a tile of 8 MiB lies in a last-level cache.
TILE_ROWS = {"cpu": 1024, "cuda": 4096}
TILE_VOCAB = {"cpu": 2048, "cuda": 6144}
BIAS_ROWS = 512  # of a tile, widened to fp32 at a time for the gradient of a bias
# `auto` keeps the logits up to this size. A constant, not a share of free memory: the same command must take the same
# path.
KEEP_BUDGET_BYTES = 2 * 2**30


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keeps(mode: str, num_rows: int, weight: Tensor) -> bool:
    """Are the logits of this many rows kept for the backward pass?"""
    return mode == "keep" or (mode == "auto" and num_rows * weight.shape[0] * weight.itemsize <= KEEP_BUDGET_BYTES)


@dataclass(frozen=True, slots=True)
class Head:
    """The head and the function of its output: z = softcap * tanh(scale * (h W^T + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    scale: float
    backend: str = "auto"

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    def kernels(self) -> tuple[str, ModuleType]:
        """The back end by name, and the module of its row kernels."""
        backend = resolve(self.backend, self.weight.device, self.weight.dtype)
        return backend, row_kernels(backend)

    def bias_of(self, v0: int, v1: int) -> Tensor | None:
        """The bias of a tile."""
        return None if self.bias is None else self.bias[v0:v1]


@dataclass(frozen=True, slots=True)
class Folded:
    """What the forward pass leaves for the backward pass."""

    z_target: Tensor  # (N,) fp32, each target's own logit
    peak: Tensor  # (N,) fp32, the largest logit
    total: Tensor  # (N,) fp32, sum of exp(z - peak) over all *other* tokens
    kept: Tensor  # (N * V,) the logits, tile after tile, in the dtype of the matmuls; or (0,)
    tops: Tensor  # (tiles, N) fp32, what a `kept` of 16 bits leaves out: see rows_torch.fold; or (0, N)

    def odds_against(self) -> Tensor:
        """log((1 - p) / p) of each target, (N,) fp32: the target is left out of the sum, so that p near 1 costs no
        digit."""
        return self.total.log().add_(self.peak - self.z_target)

    def log_total(self) -> Tensor:
        """Log of the sum of exp(z - peak) over all tokens, (N,) fp32."""
        return (self.total + torch.exp(self.z_target - self.peak)).log_()

    def logps(self) -> Tensor:
        """Log-prob of each target, (N,) fp32; never above 0."""
        return -torch.nn.functional.softplus(self.odds_against())


def kept_shapes(num_rows: int, weight: Tensor, keep: bool) -> tuple[int, tuple[int, int]]:
    """The sizes of `Folded.kept` and `.tops`."""
    num_tiles = -(-weight.shape[0] // _tile_vocab(weight)) if keep and weight.itemsize < 4 else 0
    return num_rows * weight.shape[0] if keep else 0, (num_tiles, num_rows)


def fold_forward(hidden: Tensor, head: Head, targets: Tensor, keep: bool) -> Folded:
    """Walk the tiles once: hidden (N, D), targets (N,) int64 within [0, V)."""
    backend, rows = head.kernels()
    num_rows = hidden.shape[0]
    kept_size, tops_shape = kept_shapes(num_rows, head.weight, keep)
    high = accumulator(hidden.dtype)
    state = Folded(
        rows.target_logits(hidden, head.weight, targets, bias=head.bias, scale=head.scale, softcap=head.softcap),
        torch.full((num_rows,), -torch.inf, dtype=high, device=hidden.device),
        torch.zeros(num_rows, dtype=high, device=hidden.device),
        hidden.new_empty(kept_size),
        hidden.new_empty(tops_shape, dtype=high),
    )
    row_tiles, vocab_tiles = _tiles(num_rows, head.weight)
    in_place = keep and hidden.dtype == high  # the matmul writes where the logits are kept
    scratch = None if in_place else _scratch(row_tiles, vocab_tiles, hidden, high)
    for r0, r1 in row_tiles:
        for nth, (v0, v1) in enumerate(vocab_tiles):
            kept = _kept_tile(state.kept, head.vocab, r0, r1, v0, v1) if keep else None
            tile = kept if scratch is None else _view(scratch, r1 - r0, v1 - v0)
            assert tile is not None
            matmul(hidden[r0:r1], head.weight[v0:v1].t(), tile, accumulate=False, backend=backend)
            rows.fold(
                tile,
                targets[r0:r1],
                v0,
                state.peak[r0:r1],
                state.total[r0:r1],
                bias=head.bias_of(v0, v1),
                scale=head.scale,
                softcap=head.softcap,
                kept=kept,
                tops=state.tops[nth, r0:r1] if tops_shape[0] else None,
            )
    return state


def fold_backward(
    grad: Tensor, hidden: Tensor, head: Head, targets: Tensor, state: Folded, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for an upstream gradient per token, grad (N,) fp32; empty where not needed.

    With P~ the softmax rows whose target is zeroed (and each logit's slope multiplied in):
    dH = g o ((1 - p_y) W[y] - P~ W),  dW = scatter_y(g (1 - p_y) h) - P~^T (g o h).
    Vocabulary tiles are outermost, so that each block of dW is final when it is left; dH gathers in fp32.
    """
    backend, rows = head.kernels()
    weight, dtype, high = head.weight, hidden.dtype, accumulator(hidden.dtype)
    need_hidden, need_weight, need_bias = needs
    row_tiles, vocab_tiles = _tiles(hidden.shape[0], weight)
    log_total = state.log_total()
    # (1 - p_y) from the odds themselves: 1 minus a rounded p has no correct digit once p > .999.
    target_coef = torch.sigmoid(state.odds_against()) * _slope(state.z_target, head)
    scaled = (hidden * grad.neg().unsqueeze(1)).to(dtype) if need_weight else None
    order = torch.argsort(targets, stable=True)
    bounds = torch.searchsorted(targets[order], torch.arange(head.vocab + 1, device=targets.device))
    row_coef = grad * target_coef

    d_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=high, device=hidden.device)
    d_weight = torch.empty(weight.shape if need_weight else (0,), dtype=dtype, device=weight.device)
    d_bias = torch.empty(head.vocab if need_bias else 0, dtype=dtype, device=weight.device)
    shares = _scratch(row_tiles, vocab_tiles, hidden, dtype)
    logits = _scratch(row_tiles, vocab_tiles, hidden, high) if not state.kept.numel() else None
    ones = torch.ones(1, 1, dtype=dtype, device=hidden.device).expand(hidden.shape[0], 1)
    width = max(v1 - v0 for v0, v1 in vocab_tiles)
    d_weight_block = torch.empty(
        width if need_weight and dtype != high else 0, weight.shape[1], dtype=high, device=weight.device
    )
    for nth, (v0, v1) in enumerate(vocab_tiles):
        dw = d_weight_block[: v1 - v0] if dtype != high else d_weight[v0:v1]
        db = torch.zeros(v1 - v0, 1, dtype=high, device=weight.device) if need_bias else None
        for r0, r1 in row_tiles:
            tile = _kept_tile(state.kept, head.vocab, r0, r1, v0, v1) if logits is None else None
            if logits is not None:
                tile = _view(logits, r1 - r0, v1 - v0)
                matmul(hidden[r0:r1], weight[v0:v1].t(), tile, accumulate=False, backend=backend)
            share = _view(shares, r1 - r0, v1 - v0)
            rows.softmax(
                tile,
                targets[r0:r1],
                v0,
                state.peak[r0:r1],
                log_total[r0:r1],
                share,
                bias=head.bias_of(v0, v1),
                scale=head.scale,
                softcap=head.softcap,
                tops=state.tops[nth, r0:r1] if logits is None and dtype != high else None,
                finished=logits is None,
            )
            if need_hidden:
                matmul(share, weight[v0:v1], d_hidden[r0:r1], accumulate=nth > 0, backend=backend)
            if scaled is not None:
                matmul(share.t(), scaled[r0:r1], dw, accumulate=r0 > 0, backend=backend)
            if db is not None:
                for s0, s1 in _edges(r1 - r0, BIAS_ROWS):
                    db -= share[s0:s1].t().to(high) @ grad[r0 + s0 : r0 + s1].unsqueeze(1)
        if need_weight:
            if not row_tiles:
                dw.zero_()
            rows.weight_gradient(dw, v0, hidden, row_coef, order, bounds, d_weight[v0:v1])
        if db is not None:
            rows.weight_gradient(db, v0, ones, row_coef, order, bounds, d_bias[v0:v1].unsqueeze(1))
    out = d_hidden if dtype == high else torch.empty(d_hidden.shape, dtype=dtype, device=d_hidden.device)
    if need_hidden:
        for r0, r1 in row_tiles:
            rows.hidden_gradient(d_hidden[r0:r1], weight, targets[r0:r1], target_coef[r0:r1], grad[r0:r1], out[r0:r1])
    return out, d_weight, d_bias


def _slope(z: Tensor, head: Head) -> Tensor | float:
    """dz / d(h W^T), from the capped logits."""
    return head.scale if head.softcap is None else (1 - (z / head.softcap).square()).mul_(head.scale)


def _tile_vocab(weight: Tensor) -> int:
    return TILE_VOCAB.get(weight.device.type, TILE_VOCAB["cuda"])


def _tiles(num_rows: int, weight: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The one cut of (N, V) into tiles that every mode uses: ranges of rows, ranges of the vocabulary."""
    tile_rows = TILE_ROWS.get(weight.device.type, TILE_ROWS["cuda"])
    return _edges(num_rows, tile_rows), _edges(weight.shape[0], _tile_vocab(weight))


def _edges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _kept_tile(kept: Tensor, vocab: int, r0: int, r1: int, v0: int, v1: int) -> Tensor:
    """A tile's place in the kept logits, which lie tile after tile."""
    return _view(kept[r0 * vocab + (r1 - r0) * v0 :], r1 - r0, v1 - v0)


def _scratch(
    row_tiles: list[tuple[int, int]], vocab_tiles: list[tuple[int, int]], like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Room for the largest tile."""
    height, width = (max((stop - start for start, stop in tiles), default=0) for tiles in (row_tiles, vocab_tiles))
    return like.new_empty(height * width, dtype=dtype)


def _view(buffer: Tensor, height: int, width: int) -> Tensor:
    return buffer[: height * width].view(height, width)
