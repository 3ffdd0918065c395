"""What `linear_logprob` allocates in each mode."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from selm_fast.ops import linear_logprob
from tests.ops.head_cases import TILE_ROWS, TILE_VOCAB, D, V, make, run
from tests.ops.memory import Allocated, allocated

head_module = importlib.import_module("selm_fast.ops.head")
ROWS, WIDE = 80, 1600  # large enough that a matrix of one by the other stands out
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# A test of each kind in CI; the sizes are counted in the same way.
ONE_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the logits."""
    monkeypatch.setitem(head_module.TILE_ROWS, "cpu", TILE_ROWS)
    monkeypatch.setitem(head_module.TILE_VOCAB, "cpu", TILE_VOCAB)


def step(dtype: torch.dtype = torch.float32, vocab: int = V, rows: int = ROWS, **extra: Any) -> Allocated:
    """What forward and backward of the plain head allocate."""
    inputs = make(dtype, vocab=vocab, rows=rows)
    return allocated(lambda: run(linear_logprob, inputs, **extra))


@DTYPES
def test_auto_keeps_the_logits_within_the_budget_and_recomputes_above_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = ROWS * V * dtype.itemsize
    for missing, keeps in ((0, True), (1, False)):
        monkeypatch.setattr(head_module, "KEEP_BUDGET_BYTES", logits - missing)
        assert (logits in step(dtype).sizes) == keeps


@ONE_DTYPE
def test_recompute_holds_nothing_that_grows_with_rows_times_vocabulary(dtype: torch.dtype) -> None:
    """Invariant 8: with V, only the gradient of the weight grows, and 24 bytes a token beside it (a sorted index)."""
    small, large = (step(dtype, vocab, mode="recompute") for vocab in (160, WIDE))
    growth = (large.peak - small.peak) / (WIDE - 160)
    assert growth <= D * dtype.itemsize + 24
    assert max(size for size in large.sizes if size != WIDE * D * dtype.itemsize) < ROWS * WIDE


@ONE_DTYPE
def test_keep_holds_the_logits_once_in_their_own_dtype(dtype: torch.dtype) -> None:
    """The rest is what `recompute` holds: no gradient, no second copy in that shape."""
    logits = ROWS * WIDE * dtype.itemsize
    kept, recomputed = (step(dtype, WIDE, mode=mode) for mode in ("keep", "recompute"))
    assert kept.sizes.count(logits) == 1
    tops = 4 * ROWS * WIDE // TILE_VOCAB
    assert kept.peak <= recomputed.peak + logits + tops


def test_no_grad_holds_a_tile_at_a_time() -> None:
    inputs = make(rows=ROWS, vocab=WIDE)
    with torch.no_grad():
        spent = allocated(lambda: linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"]))
    rows_alone = ROWS * (D * 4 + 8 * 8)  # a gathered copy of the targets' weights, and a few numbers a row
    assert spent.peak <= 3 * 4 * TILE_ROWS * TILE_VOCAB + rows_alone


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_gradients_that_nobody_asked_for_are_not_made(mode: str) -> None:
    inputs = make(rows=ROWS, vocab=WIDE)
    leaf = inputs["hidden"].requires_grad_()

    def frozen_head() -> None:
        linear_logprob(leaf, inputs["weight"], inputs["targets"], mode=mode).sum().backward()

    assert WIDE * D * 4 not in allocated(frozen_head).sizes
