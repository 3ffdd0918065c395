"""The Triton row kernels against `rows_torch`, both against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import rows_torch
from tests.ops.triton_cases import DEVICE, FLOOR, ON_GPU, anywhere, assert_as_accurate, everywhere, poisoned_memory

rows_triton = pytest.importorskip("selm_fast.ops.rows_triton")

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.4},
    "everything": {"with_bias": True, "softcap": 2.5, "scale": 1.7},
}
# Each setting alone, where all together are in CI.
EACH_HEAD = [head if head in ("plain", "everything") else pytest.param(head, marks=pytest.mark.slow) for head in HEADS]
# Both sides of every block edge, below and above one program's share of a row.
WIDTHS = [1, 2, 31, 32, 33, 127, 128, 129, 517, 2049]
SIZES = [1, 31, 32, 33, 1023, 1025, 2500]
LEVELS = {"near -200": (-200.0, 1.0), "offset +20": (20.0, 1.0), "+-1e4": (0.0, 1e4), "peaked": (0.0, 12.0)}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """A kernel that reads what nobody wrote shows it."""
    with poisoned_memory():
        yield


def make(
    width: int,
    device: str = DEVICE,
    *,
    rows: int = 7,
    with_bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    level: tuple[float, float] = (0.0, 2.5),
    bias_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """A tile of logits, its targets, its first token, and the head's settings."""
    generator = torch.Generator().manual_seed(width)
    v0 = 64
    tile = level[0] + level[1] * torch.randn(rows, width, generator=generator)
    targets = torch.randint(v0 - width // 2, v0 + width, (rows,), generator=generator)  # some before the tile
    if rows > 3:
        targets[:4] = torch.tensor([v0, v0 + width - 1, v0 + width, -100])  # its first, its last, behind it, ignored
    bias = torch.randn(2 * width, generator=generator).to(bias_dtype).to(device)[::2] if with_bias else None
    return tile.to(device), targets.to(device), v0, {"bias": bias, "scale": scale, "softcap": softcap}


def double(settings: dict[str, Any]) -> dict[str, Any]:
    """The same in float64."""
    return {**settings, "bias": None if settings["bias"] is None else settings["bias"].double()}


def state_before(tile: Tensor, peak: float = 0.5) -> tuple[Tensor, Tensor]:
    """A running peak and total: of nothing in the first row, of other tokens in the rest."""
    state = torch.tensor([[peak], [1.3]], device=tile.device).repeat(1, tile.shape[0])
    state[:, :1] = torch.tensor([[-torch.inf], [0.0]])
    return state[0], state[1]


def nothing_before(tile: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A running peak and total before the first tile."""
    nothing = torch.zeros(tile.shape[0], dtype=dtype, device=tile.device)
    return nothing - torch.inf, nothing


def assert_folded(got: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Peaks by themselves, and totals as they are under the exact peak."""
    assert_as_accurate(got[0], peer[0], exact[0])

    def under_exact_peak(peak: Tensor, total: Tensor) -> Tensor:
        return total.double() * torch.where(peak == exact[0], 0.0, peak.double() - exact[0]).exp()

    assert_as_accurate(under_exact_peak(*got), under_exact_peak(*peer), exact[1], FLOOR[torch.float32])


@pytest.mark.parametrize("keeps", ["nothing", "tile", "buffer", "tops"])
@pytest.mark.parametrize("head", EACH_HEAD)
@everywhere
def test_fold(head: str, keeps: str, device: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and keeps in ("tile", "buffer"):
        pytest.skip("16 bits are kept with tops")
    for width in WIDTHS:
        tile, targets, v0, settings = make(width, device, bias_dtype=dtype, **HEADS[head])
        states, stored = [], []
        for rows, fp in ((rows_triton, torch.float32), (rows_torch, torch.float32), (rows_torch, torch.float64)):
            x, state = tile.to(fp, copy=True), tuple(t.to(fp) for t in state_before(tile))
            kept_dtype = fp if keeps != "tops" or fp == torch.float64 else dtype
            kept = {"nothing": None, "tile": x}.get(keeps, torch.empty_like(x, dtype=kept_dtype))
            tops = torch.empty_like(state[0]) if keeps == "tops" else None
            given = double(settings) if fp == torch.float64 else settings
            rows.fold(x, targets, v0, *state, **given, kept=kept, tops=tops)
            states.append(state)
            stored.append([t for t in (kept, tops) if t is not None])
        assert_folded(*states)
        for got, peer, exact in zip(*stored, strict=True):
            assert_as_accurate(got, peer, exact)


@pytest.mark.parametrize("keeps", ["nothing", "buffer", "tops"])
@pytest.mark.parametrize("head", EACH_HEAD)
@everywhere
def test_softmax(head: str, keeps: str, device: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and keeps == "buffer":
        pytest.skip("16 bits are kept with tops")
    finished = keeps != "nothing"
    for width in [*WIDTHS, 6144]:
        rows = 7 if width < 6144 else 2
        tile, targets, v0, settings = make(width, device, rows=rows, bias_dtype=dtype, **HEADS[head])
        peak, log_total = nothing_before(tile)
        none = torch.full_like(targets, -100)
        rows_torch.fold(tile.clone(), none, v0, peak, log_total, **settings, kept=None, tops=None)
        log_total = log_total.log_() + 0.5
        peak += 0.75  # another tile's
        tops = None
        if finished:
            tops = torch.empty_like(peak) if keeps == "tops" else None
            kept = torch.empty_like(tile, dtype=dtype)
            rows_torch.fold(tile, targets, v0, *state_before(tile), **settings, kept=kept, tops=tops)
            tile = kept
        before = tile.clone()
        results = []
        for module, fp in ((rows_triton, dtype), (rows_torch, dtype), (rows_torch, torch.float64)):
            exact = fp == torch.float64
            x, *state, tops_fp = (t.double() if exact and t is not None else t for t in (tile, peak, log_total, tops))
            given = double(settings) if exact else settings
            out = torch.empty_like(tile, dtype=fp)
            module.softmax(x.clone(), targets, v0, *state, out, **given, tops=tops_fp, finished=finished)
            results.append(out)
        assert_as_accurate(*results)
        if finished:
            out = torch.empty_like(tile)
            rows_triton.softmax(tile, targets, v0, peak, log_total, out, **settings, tops=tops, finished=True)
            assert torch.equal(tile, before), "a kept tile is left as it is"


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("level", LEVELS)
class TestLevels:
    """Logits far from 0: hazards of online maxima that begin at 0, and of softmax without a shift."""

    pytestmark = anywhere

    def test_fold(self, level: str, head: str) -> None:
        for width in (33, 517):
            tile, targets, v0, settings = make(width, level=LEVELS[level], **HEADS[head])
            states = []
            for rows, fp in ((rows_triton, torch.float32), (rows_torch, torch.float32), (rows_torch, torch.float64)):
                state = nothing_before(tile, fp)
                given = double(settings) if fp == torch.float64 else settings
                for first in (0, width // 2):  # two tiles, so that a running value meets a new one
                    part = slice(first, width if first else width // 2)
                    bias = None if given["bias"] is None else given["bias"][part]
                    x = tile[:, part].to(fp, copy=True).contiguous()
                    rows.fold(x, targets, v0 + first, *state, **given | {"bias": bias}, kept=None, tops=None)
                states.append(state)
            assert_folded(*states)

    def test_softmax(self, level: str, head: str) -> None:
        for width in (33, 517):
            tile, targets, v0, settings = make(width, level=LEVELS[level], **HEADS[head])
            peak, log_total = nothing_before(tile)
            none = torch.full_like(targets, -100)
            rows_torch.fold(tile.clone(), none, v0, peak, log_total, **settings, kept=None, tops=None)
            log_total.log_()
            got, peer, exact = torch.empty_like(tile), torch.empty_like(tile), torch.empty_like(tile).double()
            rest = {"tops": None, "finished": False}
            rows_triton.softmax(tile.clone(), targets, v0, peak, log_total, got, **settings, **rest)
            rows_torch.softmax(tile.clone(), targets, v0, peak, log_total, peer, **settings, **rest)
            state = peak.double(), log_total.double()
            rows_torch.softmax(tile.double(), targets, v0, *state, exact, **double(settings), **rest)
            assert_as_accurate(got, peer, exact)


class TestFold:
    pytestmark = anywhere

    def fold(self, tile: Tensor, targets: Tensor, peak: Tensor, total: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        settings = {"bias": None, "scale": 1.0, "softcap": None, "kept": None, "tops": None} | given
        rows_triton.fold(tile, targets, 0, peak, total, **settings)
        return peak, total

    def test_columns_beyond_the_tile_never_count__verl_2899(self) -> None:
        """The row's end lies within a block, and the next row's numbers lie behind it."""
        tile = torch.full((3, 33), -50.0, device=DEVICE)
        tile[1:] = 50.0
        ignored = torch.full((3,), -100, device=DEVICE)
        for given in ({}, {"scale": -1.0}, {"bias": torch.full((33,), -5.0, device=DEVICE)}, {"softcap": 60.0}):
            exact = nothing_before(tile, torch.float64)
            settings = double({"bias": None, "scale": 1.0, "softcap": None, **given})
            rows_torch.fold(tile.double(), ignored, 0, *exact, **settings, kept=None, tops=None)
            peak, total = self.fold(tile.clone(), ignored, *nothing_before(tile), **given)
            assert torch.allclose(peak.double(), exact[0], rtol=2e-7, atol=0)
            assert total.tolist() == [33.0] * 3

    def test_a_tile_that_a_bias_rules_out(self) -> None:
        tile, targets = torch.randn(4, 40, device=DEVICE), torch.tensor([3, -100, 39, 200], device=DEVICE)
        bias = torch.full((40,), -torch.inf, device=DEVICE)
        kept, tops = torch.empty_like(tile), torch.empty(4, device=DEVICE)
        peak = torch.tensor([-torch.inf, 1.5, -3.0, -torch.inf], device=DEVICE)
        total = torch.tensor([0.0, 1.25, 0.0, 0.0], device=DEVICE)
        state = self.fold(tile, targets, peak.clone(), total.clone(), bias=bias, kept=kept, tops=tops)
        assert torch.equal(state[0], peak) and torch.equal(state[1], total)
        assert tops.eq(0).all() and kept.eq(-torch.inf).all()

    def test_single_columns_that_a_bias_rules_out(self) -> None:
        tile, targets = torch.randn(4, 40, device=DEVICE), torch.full((4,), -100, device=DEVICE)
        bias = torch.zeros(40, device=DEVICE)
        bias[::3] = -torch.inf
        peak, total = self.fold(tile, targets, *nothing_before(tile), bias=bias)
        rest = tile[:, bias == 0].double()
        assert torch.equal(peak, rest.amax(1).float())
        assert torch.allclose(total.double(), (rest - peak.unsqueeze(1)).exp().sum(1), rtol=4e-7, atol=0)

    def test_all_rows_ignored__liger_1338(self) -> None:
        tile, ignored = torch.randn(5, 70, device=DEVICE), torch.full((5,), -100, device=DEVICE)
        peak, total = self.fold(tile.clone(), ignored, *nothing_before(tile))
        assert torch.equal(peak, tile.amax(1))
        assert torch.allclose(total.double(), (tile.double() - peak.unsqueeze(1)).exp().sum(1), rtol=4e-7, atol=0)

    def test_a_target_alone_leaves_nothing(self) -> None:
        tile = torch.tensor([[3.0], [-7.0]], device=DEVICE)
        peak, total = self.fold(tile, torch.zeros(2, dtype=torch.long, device=DEVICE), *nothing_before(tile))
        assert peak.tolist() == [3.0, -7.0] and total.tolist() == [0.0, 0.0]

    def test_the_peak_counts_the_target_and_the_total_does_not(self) -> None:
        tile = torch.tensor([[0.0, 2.0, 0.0]], device=DEVICE)
        before = torch.tensor([2.0], device=DEVICE), torch.tensor([4.0], device=DEVICE)
        peak, total = self.fold(tile, torch.tensor([1], device=DEVICE), *before)
        assert peak.item() == 2.0
        assert total.item() == pytest.approx(4 + 2 * math.exp(-2), rel=2e-7)

    @pytest.mark.parametrize("column", [0, 7, 39])
    def test_a_nan_stays_one(self, column: int) -> None:
        """Also at the target, whose share is left out, and whatever the running value."""
        tile = torch.randn(4, 40, device=DEVICE)
        tile[0, column] = torch.nan
        targets = torch.tensor([7, 7, 7, 7], device=DEVICE)
        peak = torch.tensor([0.0, torch.nan, 0.0, 0.0], device=DEVICE)
        total = torch.tensor([0.0, 0.0, torch.nan, 0.0], device=DEVICE)
        _, total = self.fold(tile, targets, peak, total)
        assert total.isnan().tolist() == [True, True, True, False]

    def test_the_kept_tile_is_the_tile(self) -> None:
        tile = torch.randn(3, 40, device=DEVICE)
        before, none = tile.clone(), torch.full((3,), -100, device=DEVICE)
        self.fold(tile, none, *nothing_before(tile), kept=tile)
        assert torch.equal(tile, before)
        self.fold(tile, none, *nothing_before(tile), kept=tile, scale=2.0)
        assert torch.equal(tile, before * 2)

    def test_a_tile_wider_than_the_registers_is_refused(self) -> None:
        wide = torch.zeros(1, rows_triton.MAX_TILE_VOCAB + 1, device=DEVICE)
        with pytest.raises(AssertionError):
            self.fold(wide, torch.zeros(1, dtype=torch.long, device=DEVICE), *nothing_before(wide))


class TestTanh:
    """The softcap's tanh by itself, through a fold that keeps z."""

    pytestmark = anywhere

    @pytest.mark.parametrize("center", [0.0, 1e-30, 1e-6, 1e-3, 0.3, 0.62499, 0.625, 0.7, 2.0, 8.0, 20.0, 1e4])
    def test_error(self, center: float) -> None:
        signs = torch.tensor([-1.0, 1.0]).repeat(200)
        x = (signs * center * (1 + 0.05 * torch.rand(400, generator=torch.Generator().manual_seed(0)))).to(DEVICE)
        kept = torch.empty(1, 400, device=DEVICE)
        rows_triton.fold(
            x.unsqueeze(0), torch.tensor([-100], device=DEVICE), 0, *nothing_before(kept),
            bias=None, scale=1.0, softcap=1.0, kept=kept, tops=None,
        )  # fmt: skip
        exact = x.double().tanh()
        # Each number by itself, in 2^-23 of it: numpy's exp leaves 1.5, the GPU's approximate exp and division add 2.
        bound = (4 if DEVICE == "cuda" else 2) * 2.0**-23
        assert ((kept[0].double() - exact).abs() <= bound * exact.abs()).all()


@pytest.mark.parametrize("head", HEADS)
@everywhere
def test_target_logits(head: str, device: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        hidden, weight, targets, settings = linear(size, device, dtype, **HEADS[head])
        got = rows_triton.target_logits(hidden, weight, targets, **settings)
        peer = rows_torch.target_logits(hidden, weight, targets, **settings)
        exact = rows_torch.target_logits(hidden.double(), weight.double(), targets, **double(settings))
        assert_as_accurate(got, peer, exact)


def linear(
    size: int,
    device: str,
    dtype: torch.dtype,
    *,
    rows: int = 9,
    vocab: int = 40,
    with_bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Hidden states (stored by columns), weights (every other row and column of a larger matrix), targets, settings."""
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(size, rows, generator=generator).to(device, dtype).t()
    weight = (torch.randn(2 * vocab, 2 * size, generator=generator) * size**-0.5).to(device, dtype)[::2, ::2]
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[: rows // 2] = vocab - 1
    bias = torch.randn(vocab, generator=generator).to(device, dtype) if with_bias else None
    return hidden, weight, targets.to(device), {"bias": bias, "scale": scale, "softcap": softcap}


def apart(t: Tensor) -> Tensor:
    """The same numbers, each with a stranger between it and the next."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("in_place", [False, True])
@everywhere
def test_hidden_gradient(in_place: bool, device: str, dtype: torch.dtype) -> None:
    if in_place and dtype != torch.float32:
        pytest.skip("only fp32 totals can become the result")
    for size in SIZES:
        hidden, weight, targets, _ = linear(size, device, dtype)
        total = torch.randn(hidden.shape, device=device)
        coef, grad = torch.rand(9, device=device), torch.randn(18, device=device)[::2]
        results = []
        for rows, fp in ((rows_triton, dtype), (rows_torch, dtype), (rows_torch, torch.float64)):
            exact = fp == torch.float64
            mine = total.to(torch.float64 if exact else torch.float32, copy=True)
            out = mine if in_place else apart(torch.empty_like(mine, dtype=fp))
            mine = mine if in_place else apart(mine)
            numbers = [t.double() if exact else t for t in (coef, grad)]
            rows.hidden_gradient(mine, weight.to(fp), targets, *numbers, out)
            results.append(out)
        assert_as_accurate(*results)


@pytest.mark.parametrize("in_place", [False, True])
@everywhere
def test_weight_gradient(in_place: bool, device: str, dtype: torch.dtype) -> None:
    """Tokens with no row, with one, and with more rows than are read at once; a tile within the vocabulary."""
    if in_place and dtype != torch.float32:
        pytest.skip("only fp32 totals can become the result")
    vocab, num_rows, v0, width = 40, 61, 5, 30
    for size in SIZES:
        hidden, _, targets, _ = linear(size, device, dtype, rows=num_rows, vocab=vocab)
        counts = targets.bincount(minlength=vocab)
        targets[targets == vocab - 1] = 7
        assert counts.max() > rows_triton.ROWS_IN_FLIGHT and counts.min() == 0
        order, bounds = sorted_targets(targets, vocab)
        total, coef = torch.randn(width, size, device=device), torch.randn(num_rows, device=device)
        results = []
        for rows, fp in ((rows_triton, dtype), (rows_torch, dtype), (rows_torch, torch.float64)):
            exact = fp == torch.float64
            mine = total.to(torch.float64 if exact else torch.float32, copy=True)
            out = mine if in_place else apart(torch.empty_like(mine, dtype=fp))
            mine = mine if in_place else apart(mine)
            rows.weight_gradient(mine, v0, hidden.to(fp), coef.double() if exact else coef, order, bounds, out)
            results.append(out)
        assert_as_accurate(*results)


def sorted_targets(targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """`order` and `bounds` of weight_gradient."""
    order = torch.argsort(targets, stable=True)
    return order, torch.searchsorted(targets[order], torch.arange(vocab + 1, device=targets.device))


class TestWeightGradient:
    pytestmark = anywhere

    def test_of_a_bias(self) -> None:
        """Hidden states are then one 1, read by every row."""
        targets = torch.tensor([3, 0, 3, 3, 9], device=DEVICE)
        coef = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=DEVICE)
        total = torch.full((10, 1), 0.5, device=DEVICE)
        ones = torch.ones(1, 1, device=DEVICE).expand(5, 1)
        out = torch.empty(10, device=DEVICE)
        rows_triton.weight_gradient(total, 0, ones, coef, *sorted_targets(targets, 10), out.unsqueeze(1))
        assert out.tolist() == [2.5, 0.5, 0.5, 13.5, 0.5, 0.5, 0.5, 0.5, 0.5, 16.5]

    def test_rows_are_added_in_order(self) -> None:
        """Sums of very different sizes tell: 2^24 swallows each 1 that comes after it."""
        hidden = torch.tensor([[2.0**24, 1.0], [1.0, 1.0], [1.0, 2.0**24]], device=DEVICE)
        targets, coef = torch.zeros(3, dtype=torch.long, device=DEVICE), torch.ones(3, device=DEVICE)
        out = torch.empty(1, 2, device=DEVICE)
        rows_triton.weight_gradient(torch.zeros_like(out), 0, hidden, coef, *sorted_targets(targets, 1), out)
        assert out.tolist() == [[2.0**24, 2.0**24 + 2]]

    def test_without_rows(self) -> None:
        total, out = torch.randn(4, 5, device=DEVICE), torch.empty(4, 5, device=DEVICE)
        none = torch.empty(0, dtype=torch.long, device=DEVICE)
        rows_triton.weight_gradient(
            total, 2, torch.empty(0, 5, device=DEVICE), torch.empty(0, device=DEVICE), *sorted_targets(none, 9), out
        )
        assert torch.equal(out, total)


class TestEverything:
    pytestmark = anywhere

    @pytest.mark.parametrize("num_rows", [0, 1])
    def test_few_rows(self, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One row gives numbers, and none launches nothing."""
        launched = []
        run = type(rows_triton._fold_kernel).run

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            launched.append(kernel.__name__)
            return run(kernel, *args, **kwargs)

        monkeypatch.setattr(type(rows_triton._fold_kernel), "run", counted)
        tile, targets, v0, settings = make(50, rows=num_rows)
        (peak, total), shares = nothing_before(tile), torch.empty_like(tile)
        rows_triton.fold(tile, targets, v0, peak, total, **settings, kept=None, tops=None)
        rows_triton.softmax(tile, targets, v0, peak, total, shares, **settings, tops=None, finished=True)
        hidden, weight, targets, settings = linear(33, DEVICE, torch.float32, rows=num_rows)
        logits = rows_triton.target_logits(hidden, weight, targets, **settings)
        out = torch.empty(num_rows, 33, device=DEVICE)
        rows_triton.hidden_gradient(torch.zeros_like(out), weight, targets, logits, logits, out)
        assert len(launched) == 4 * num_rows
        assert peak.shape == logits.shape == (num_rows,)
        assert all(t.isfinite().all() for t in (peak, total, shares, logits, out))

    def test_the_same_bits_from_run_to_run(self) -> None:
        def run() -> list[Tensor]:
            tile, targets, v0, settings = make(517, **HEADS["everything"])
            state, tops, kept = state_before(tile), torch.empty(7, device=DEVICE), torch.empty_like(tile)
            rows_triton.fold(tile, targets, v0, *state, **settings, kept=kept, tops=tops)
            shares = torch.empty_like(tile)
            rows_triton.softmax(kept, targets, v0, *state, shares, **settings, tops=tops, finished=True)
            hidden, weight, targets, settings = linear(1025, DEVICE, torch.float32, **HEADS["everything"])
            logits = rows_triton.target_logits(hidden, weight, targets, **settings)
            d_hidden, d_weight = torch.empty(9, 1025, device=DEVICE), torch.empty(40, 1025, device=DEVICE)
            rows_triton.hidden_gradient(torch.ones_like(d_hidden), weight, targets, logits, logits, d_hidden)
            order_and_bounds = sorted_targets(targets, 40)
            rows_triton.weight_gradient(torch.ones_like(d_weight), 0, hidden, logits, *order_and_bounds, d_weight)
            return [*state, tops, kept, shares, logits, d_hidden, d_weight]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))

    def test_offsets_above_32_bits(self, tmp_path: Path) -> None:
        """Rows of 2^30 elements, of which a sparse file stores what is touched; on a GPU see the next test."""
        if DEVICE == "cuda":
            pytest.skip("a sparse file is no memory of the GPU")
        stride, size = 2**30, 40
        far, out = (
            torch.from_file(str(tmp_path / name), shared=True, size=3 * stride + size).as_strided(
                (4, size), (stride, 1)
            )
            for name in ("far", "out")
        )
        near = torch.randn(4, size)
        far.copy_(near)
        targets, coef, rest = torch.tensor([3, 0, 3, 2]), torch.rand(4), {"bias": None, "scale": 1.0, "softcap": None}
        assert torch.equal(
            rows_triton.target_logits(far, far, targets, **rest), rows_triton.target_logits(near, near, targets, **rest)
        )
        expected = torch.empty(4, size)
        rows_triton.hidden_gradient(near, near, targets, coef, coef, expected)
        rows_triton.hidden_gradient(far, far, targets, coef, coef, out)
        assert torch.equal(out, expected)
        order_and_bounds = sorted_targets(targets, 4)
        rows_triton.weight_gradient(near, 0, near, coef, *order_and_bounds, expected)
        rows_triton.weight_gradient(far, 0, far, coef, *order_and_bounds, out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=ON_GPU, id="bf16")])
def test_a_tile_of_more_than_2_31_elements(dtype: torch.dtype) -> None:
    width = 8192
    num_rows = 2**31 // width + 2
    tile = torch.zeros(num_rows, width, device="cuda")
    tile[-1] = 1.0
    none = torch.full((num_rows,), -100, device="cuda")
    peak, total = nothing_before(tile)
    kept, tops = torch.empty_like(tile, dtype=dtype), torch.empty_like(peak)
    rest = {"bias": None, "scale": 1.0, "softcap": None}
    rows_triton.fold(tile, none, 0, peak, total, **rest, kept=kept, tops=tops)
    assert kept.eq(0).all() and total.eq(width).all()
    assert peak[-2:].tolist() == tops[-2:].tolist() == [0.0, 1.0]
    out = torch.empty_like(kept)
    rows_triton.softmax(kept, none, 0, peak, total.log(), out, **rest, tops=tops, finished=True)
    assert torch.allclose(out[-3:].float(), torch.full((3, width), 1 / width, device="cuda"), rtol=2**-8)
