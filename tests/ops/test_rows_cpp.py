"""The C++ row kernels against `rows_torch`, both against float64, for every instruction set that the processor has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from selm_fast.ops import rows_cpp, rows_torch
from tests.ops.cpp_cases import CPP, variant
from tests.ops.triton_cases import FLOOR, assert_as_accurate

__all__ = ["variant"]
pytestmark = [CPP, pytest.mark.usefixtures("variant")]

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.4},
    "everything": {"with_bias": True, "softcap": 2.5, "scale": 1.7},
}
# Both sides of every vector and of four of them, and tiles as the head cuts them.
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 1024]
LEVELS = {"near -200": (-200.0, 1.0), "offset +20": (20.0, 1.0), "+-1e4": (0.0, 1e4), "peaked": (0.0, 12.0)}
# What a fold keeps, and in which dtype: 16 bits with tops, fp32 without.
KEPT = {
    "nothing": (None, torch.float32),
    "tile": ("tile", torch.float32),
    "fp32": ("buffer", torch.float32),
    "bf16": ("tops", torch.bfloat16),
    "fp16": ("tops", torch.float16),
}
V0 = 64


def make(
    width: int,
    *,
    rows: int = 7,
    with_bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    level: tuple[float, float] = (0.0, 2.5),
    bias_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A tile of logits that begins at token V0, its targets, and the head's settings."""
    generator = torch.Generator().manual_seed(width)
    tile = level[0] + level[1] * torch.randn(rows, width, generator=generator)
    targets = torch.randint(V0 - width // 2, V0 + width, (rows,), generator=generator)  # some before the tile
    edges = torch.tensor([V0, V0 + width - 1, V0 + width, V0 - 1, -100])
    targets[: min(rows, 5)] = edges[:rows]
    bias = torch.randn(2 * width, generator=generator).to(bias_dtype)[::2] if with_bias else None
    return tile, targets, {"bias": bias, "scale": scale, "softcap": softcap}


def double(settings: dict[str, Any]) -> dict[str, Any]:
    """The same in float64."""
    return {**settings, "bias": None if settings["bias"] is None else settings["bias"].double()}


def state_before(tile: Tensor, fp: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A running peak and total: of nothing in the first row, of other tokens in the rest."""
    state = torch.tensor([[0.5], [1.3]]).repeat(1, tile.shape[0])
    state[:, :1] = torch.tensor([[-torch.inf], [0.0]])
    return state[0].to(fp), state[1].to(fp)


def nothing_before(tile: Tensor, fp: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A running peak and total before the first tile."""
    nothing = torch.zeros(tile.shape[0], dtype=fp)
    return nothing - torch.inf, nothing


def fold(rows: Any, tile: Tensor, targets: Tensor, state: tuple[Tensor, Tensor], **given: Any) -> tuple[Tensor, Tensor]:
    """Fold a tile into a state, in place, and return it."""
    rest = {"bias": None, "scale": 1.0, "softcap": None, "kept": None, "tops": None} | given
    rows.fold(tile, targets, V0, *state, **rest)
    return state


def in_a_larger_one(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous tensor of NaN, and the memory that it is the middle of."""
    whole = torch.full((shape.numel() + 128,), torch.nan, dtype=dtype)
    return whole[64:-64].view(shape), whole


def assert_nothing_around(whole: Tensor) -> None:
    """No number was written outside the tensor of `in_a_larger_one`."""
    assert whole[:64].isnan().all() and whole[-64:].isnan().all()


def assert_folded(got: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    """Peaks by themselves, and totals as they are under the exact peak."""
    assert_as_accurate(got[0], peer[0], exact[0])

    def under_exact_peak(peak: Tensor, total: Tensor) -> Tensor:
        return total.double() * torch.where(peak == exact[0], 0.0, peak.double() - exact[0]).exp()

    assert_as_accurate(under_exact_peak(*got), under_exact_peak(*peer), exact[1], FLOOR[torch.float32])


THREE = ((rows_cpp, torch.float32), (rows_torch, torch.float32), (rows_torch, torch.float64))


@pytest.mark.parametrize(("keeps", "dtype"), KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("head", HEADS)
def test_fold(head: str, keeps: str | None, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        tile, targets, settings = make(width, bias_dtype=dtype, **HEADS[head])
        states, stored = [], []
        for rows, fp in THREE:
            x, around = in_a_larger_one(tile.shape, fp)
            x.copy_(tile)
            kept_dtype = fp if keeps != "tops" or fp == torch.float64 else dtype
            buffer, around_buffer = in_a_larger_one(tile.shape, kept_dtype)
            kept = {None: None, "tile": x}.get(keeps, buffer)
            tops = torch.empty(7, dtype=fp) if keeps == "tops" else None
            given = double(settings) if fp == torch.float64 else settings
            states.append(fold(rows, x, targets, state_before(tile, fp), **given, kept=kept, tops=tops))
            stored.append([t for t in (kept, tops) if t is not None])
            assert_nothing_around(around)
            assert_nothing_around(around_buffer)
        assert_folded(*states)
        for got, peer, exact in zip(*stored, strict=True):
            assert_as_accurate(got, peer, exact)
            if settings["softcap"] is None:  # then the same roundings happen in the same order
                assert torch.equal(got, peer)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("keeps", "dtype"), KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("head", HEADS)
def test_softmax(head: str, keeps: str | None, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for width in WIDTHS:
        tile, targets, settings = make(width, bias_dtype=dtype, **HEADS[head])
        tops = torch.empty(7) if keeps == "tops" else None
        kept = {None: None, "tile": tile}.get(keeps, torch.empty_like(tile, dtype=dtype))
        ignored = torch.full_like(targets, -100)
        x = tile if keeps == "tile" else tile.clone()
        state = fold(rows_torch, x, ignored, nothing_before(tile), **settings, kept=kept, tops=tops)
        tile = tile if kept is None else kept
        results = []
        for rows, fp in ((rows_cpp, out_dtype), (rows_torch, out_dtype), (rows_torch, torch.float64)):
            exact = fp == torch.float64
            x, peak, log_total, given_tops = (
                None if t is None else t.to(torch.float64 if exact else t.dtype, copy=True)
                for t in (tile, state[0], state[1].log() + 0.5, tops)
            )
            out, around = in_a_larger_one(tile.shape, fp)
            given = double(settings) if exact else settings
            rows.softmax(x, targets, V0, peak, log_total, out, **given, tops=given_tops, finished=keeps is not None)
            results.append(out)
            assert_nothing_around(around)
            if rows is rows_cpp:
                assert torch.equal(x, tile), "the tile is left as it is"
                own_target = (targets - V0).unsqueeze(1) == torch.arange(width)
                assert out[own_target].eq(0).all() and own_target.any()
        assert_as_accurate(*results)


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("level", LEVELS)
def test_logits_far_from_0(level: str, head: str) -> None:
    """Hazards of online maxima that begin at 0, and of softmax without a shift."""
    for width in (33, 517):
        tile, targets, settings = make(width, level=LEVELS[level], **HEADS[head])
        states, shares = [], []
        for rows, fp in THREE:
            state = nothing_before(tile, fp)
            given = double(settings) if fp == torch.float64 else settings
            for first in (0, width // 2):  # two tiles, so that a running value meets a new one
                part = slice(first, width if first else width // 2)
                bias = None if given["bias"] is None else given["bias"][part]
                x = tile[:, part].to(fp, copy=True).contiguous()
                rows.fold(x, targets, V0 + first, *state, **given | {"bias": bias}, kept=None, tops=None)
            states.append(state)
            out = torch.empty_like(tile, dtype=fp)
            peak, log_total = states[0][0].to(fp), (states[0][1] + 1).log().to(fp)
            rows.softmax(tile.to(fp, copy=True), targets, V0, peak, log_total, out, **given, tops=None, finished=False)
            shares.append(out)
        assert_folded(*states)
        assert_as_accurate(*shares)


class TestExp:
    """exp by itself, through a softmax whose peak and log_total are 0."""

    def exp(self, x: Tensor) -> Tensor:
        tile, zero, out = x.view(1, -1), torch.zeros(1), torch.empty(1, x.numel())
        rest = {"bias": None, "scale": 1.0, "softcap": None, "tops": None, "finished": True}
        rows_cpp.softmax(tile, torch.tensor([-100]), V0, zero, zero, out, **rest)
        return out[0]

    @pytest.mark.parametrize(("low", "high"), [(-87.33, 88.37), (-1.0, 1.0), (-1e-6, 1e-6)])
    def test_error(self, low: float, high: float) -> None:
        x = torch.linspace(low, high, 100_001)
        exact = x.double().exp()
        ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
        assert ((self.exp(x).double() - exact).abs() <= ulp).all()

    def test_ends(self) -> None:
        x = torch.tensor([0.0, -0.0, -87.4, -104.0, -1e4, -1e38, -torch.inf, 88.8, 1e4, torch.inf, torch.nan])
        exact = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, torch.inf, torch.inf, torch.inf, torch.nan])
        assert torch.equal(self.exp(x).nan_to_num(nan=-1, posinf=torch.inf), exact.nan_to_num(nan=-1, posinf=torch.inf))


@pytest.mark.parametrize("center", [0.0, 1e-30, 1e-6, 1e-3, 0.3, 0.62499, 0.625, 0.7, 2.0, 8.0, 20.0, 1e4, math.inf])
def test_tanh_error(center: float) -> None:
    """tanh by itself, through a fold that keeps z: each number within 2 units of its last place."""
    signs = torch.tensor([-1.0, 1.0]).repeat(200)
    x = (signs * center * (1 + 0.05 * torch.rand(400, generator=torch.Generator().manual_seed(0)))).unsqueeze(0)
    kept = torch.empty_like(x)
    fold(rows_cpp, x.clone(), torch.tensor([-100]), nothing_before(x), softcap=1.0, kept=kept)
    exact = x.double().tanh()
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((kept.double() - exact).abs() <= 2 * ulp).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestSixteenBits:
    def test_numbers_are_rounded_as_torch_rounds_them(self, dtype: torch.dtype) -> None:
        """Every kind of number below 0, through a fold whose largest logit is 0: ties, subnormals, infinity, NaNs."""
        bits = torch.cat([torch.arange(0, 2**31, 4093), torch.arange(2**12, 2**31, 2**12), torch.tensor([2**31 - 1])])
        x = (bits - 2**31).int().view(torch.float32).unsqueeze(0)
        kept, tops = torch.empty_like(x, dtype=dtype), torch.empty(1)
        fold(rows_cpp, x.clone(), torch.tensor([-100]), nothing_before(x), kept=kept, tops=tops)
        assert tops.item() == 0
        exact = x.to(dtype)
        assert torch.equal(kept.isnan(), exact.isnan()) and exact.isnan().any()
        assert torch.equal(kept.nan_to_num(), exact.nan_to_num())

    def test_numbers_are_read(self, dtype: torch.dtype) -> None:
        """All below 0, through a softmax whose peak and log_total are 0."""
        x = torch.arange(-(2**15), 0).short().view(dtype).unsqueeze(0)
        zero, out = torch.zeros(1), torch.empty(x.shape)
        rest = {"bias": None, "scale": 1.0, "softcap": None, "tops": zero, "finished": True}
        rows_cpp.softmax(x, torch.tensor([-100]), V0, zero, zero, out, **rest)
        exact = x.float().exp()
        assert torch.equal(out.isnan(), exact.isnan()) and exact.isnan().any()
        # exp is 0 here below the least normal number.
        assert torch.allclose(out.nan_to_num(), exact.nan_to_num(), rtol=3e-7, atol=1.2e-38)


class TestFold:
    def test_columns_beyond_the_tile_never_count__verl_2899(self) -> None:
        """The row's end lies within a vector, and the next row's numbers lie behind it."""
        tile = torch.full((3, 33), -50.0)
        tile[1:] = 50.0
        ignored = torch.full((3,), -100)
        for given in ({}, {"scale": -1.0}, {"bias": torch.full((33,), -5.0)}, {"softcap": 60.0}):
            exact = fold(rows_torch, tile.double(), ignored, nothing_before(tile, torch.float64), **given)
            peak, total = fold(rows_cpp, tile.clone(), ignored, nothing_before(tile), **given)
            assert torch.allclose(peak.double(), exact[0], rtol=2e-7, atol=0)
            assert total.tolist() == [33.0] * 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_tile_that_a_bias_rules_out(self, dtype: torch.dtype) -> None:
        tile, targets = torch.randn(4, 40), V0 + torch.tensor([3, -100, 39, 200])
        kept, tops = torch.empty_like(tile, dtype=dtype), torch.empty(4)
        peak = torch.tensor([-torch.inf, 1.5, -3.0, -torch.inf])
        total = torch.tensor([0.0, 1.25, 0.0, 0.0])
        bias = torch.full((40,), -torch.inf)
        state = fold(rows_cpp, tile, targets, (peak.clone(), total.clone()), bias=bias, kept=kept, tops=tops)
        assert torch.equal(state[0], peak) and torch.equal(state[1], total)
        assert tops.eq(0).all() and kept.eq(-torch.inf).all()
        out = torch.empty_like(kept)
        rest = {"bias": None, "scale": 1.0, "softcap": None, "tops": tops, "finished": True}
        rows_cpp.softmax(kept, targets, V0, torch.zeros(4), torch.zeros(4), out, **rest)
        assert out.eq(0).all()

    def test_single_columns_that_a_bias_rules_out(self) -> None:
        tile, targets = torch.randn(4, 40), torch.full((4,), -100)
        bias = torch.zeros(40)
        bias[::3] = -torch.inf
        peak, total = fold(rows_cpp, tile.clone(), targets, nothing_before(tile), bias=bias)
        rest = tile[:, bias == 0].double()
        assert torch.equal(peak, rest.amax(1).float())
        assert torch.allclose(total.double(), (rest - peak.unsqueeze(1)).exp().sum(1), rtol=4e-7, atol=0)

    def test_a_target_alone_leaves_nothing(self) -> None:
        tile = torch.tensor([[3.0], [-7.0]])
        peak, total = fold(rows_cpp, tile, torch.tensor([V0, V0]), nothing_before(tile))
        assert peak.tolist() == [3.0, -7.0] and total.tolist() == [0.0, 0.0]

    def test_the_peak_counts_the_target_and_the_total_does_not(self) -> None:
        before = torch.tensor([2.0]), torch.tensor([4.0])
        peak, total = fold(rows_cpp, torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([V0 + 1]), before)
        assert peak.item() == 2.0
        assert total.item() == pytest.approx(4 + 2 * math.exp(-2), rel=2e-7)

    @pytest.mark.parametrize("column", [0, 7, 39])
    def test_a_nan_stays_one(self, column: int) -> None:
        """Also at the target, whose share is left out, and whatever the running value."""
        tile = torch.randn(4, 40)
        tile[0, column] = torch.nan
        peak = torch.tensor([0.0, torch.nan, 0.0, 0.0])
        total = torch.tensor([0.0, 0.0, torch.nan, 0.0])
        kept, tops = torch.empty_like(tile, dtype=torch.bfloat16), torch.empty(4)
        _, total = fold(rows_cpp, tile, torch.tensor([V0 + 7] * 4), (peak, total), kept=kept, tops=tops)
        assert total.isnan().tolist() == [True, True, True, False]
        assert kept.isnan().nonzero().tolist() == [[0, column]]

    def test_the_kept_tile_is_the_tile(self) -> None:
        tile = torch.randn(3, 40)
        before, none = tile.clone(), torch.full((3,), -100)
        fold(rows_cpp, tile, none, nothing_before(tile), kept=tile)
        assert torch.equal(tile, before)
        fold(rows_cpp, tile, none, nothing_before(tile), kept=tile, scale=2.0)
        assert torch.equal(tile, before * 2)


class TestEverything:
    @pytest.mark.parametrize("shape", [(0, 50), (1, 50), (3, 0)])
    def test_few_rows_and_no_columns(self, shape: tuple[int, int]) -> None:
        tile, targets = torch.randn(shape), torch.full(shape[:1], -100)
        peak, total = fold(rows_cpp, tile, targets, state_before(tile))
        out = torch.empty_like(tile)
        rest = {"bias": None, "scale": 1.0, "softcap": None, "tops": None, "finished": True}
        rows_cpp.softmax(tile, targets, V0, peak, total, out, **rest)
        assert not out.isnan().any()
        assert shape[1] > 0 or torch.equal(torch.stack([peak, total]), torch.stack(state_before(tile)))

    def results(self, tile: Tensor, targets: Tensor, settings: dict[str, Any]) -> list[Tensor]:
        state, tops = state_before(tile), torch.empty(tile.shape[0])
        kept, shares = torch.empty_like(tile, dtype=torch.bfloat16), torch.empty_like(tile)
        fold(rows_cpp, tile.clone(), targets, state, **settings, kept=kept, tops=tops)
        rows_cpp.softmax(kept, targets, V0, *state, shares, **settings, tops=tops, finished=True)
        return [*state, tops, kept, shares]

    def test_the_same_bits_from_run_to_run_on_any_number_of_threads_and_in_any_company(self) -> None:
        tile, targets, settings = make(517, rows=401, **HEADS["everything"])
        one = self.results(tile, targets, settings)
        torch.set_num_threads(2)
        two = self.results(tile, targets, settings)
        torch.set_num_threads(1)
        part = slice(3, 37)
        some = [*self.results(tile[part].clone(), targets[part], settings)]
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert all(torch.equal(a[part][1:], b[1:]) for a, b in zip(one, some, strict=True)), "row 0 begins with nothing"

    def test_schemas_tell_what_is_written(self) -> None:
        tile, targets, settings = make(33, **HEADS["everything"])
        bias, scale, softcap = settings["bias"].contiguous(), settings["scale"], settings["softcap"]
        kept, tops = torch.zeros_like(tile, dtype=torch.bfloat16), torch.zeros(7)
        state = torch.zeros(7), torch.zeros(7)
        for op, args in (
            (torch.ops.selm_fast_cpp.fold, (tile, targets, V0, *state, bias, scale, softcap, kept, tops)),
            (torch.ops.selm_fast_cpp.softmax, (kept, targets, V0, *state, tile, bias, scale, softcap, tops, True)),
        ):
            torch.library.opcheck(op.default, args, test_utils="test_schema")

    def test_tensors_that_do_not_fit_are_refused(self) -> None:
        tile, targets, settings = make(33)
        state = torch.zeros(7), torch.zeros(7)
        for bad, name in (
            ({"tile": tile.double()}, "tile"),
            ({"tile": tile[:, ::2]}, "tile"),
            ({"targets": targets.int()}, "targets"),
            ({"targets": targets[1:]}, "targets"),
            ({"peak": state[0].double()}, "peak"),
            ({"total": state[1][:3]}, "total"),
            ({"bias": torch.zeros(32)}, "bias"),
            ({"kept": tile[:3]}, "kept"),
            ({"kept": tile.double()}, "kept"),
            ({"kept": tile.bfloat16()}, "tops"),
            ({"tops": torch.zeros(7)}, "tops"),
            ({"kept": tile.bfloat16(), "tops": torch.zeros(6)}, "tops"),
        ):
            given = {"tile": tile, "targets": targets, "peak": state[0], "total": state[1], "kept": None, "tops": None}
            with pytest.raises(ValueError, match=name):
                rows_cpp.fold(v0=V0, **given | settings | bad)
        for bad, name in (
            ({"tile": tile.half()}, "tops"),
            ({"tile": tile.half(), "tops": torch.zeros(7), "finished": False}, "unfinished"),
            ({"tops": torch.zeros(7)}, "tops"),
            ({"log_total": state[0][:3]}, "log_total"),
            ({"peak": state[0][:3]}, "peak"),
            ({"out": tile[:, :3]}, "out"),
            ({"out": tile.double()}, "out"),
        ):
            given = {"tile": tile, "targets": targets, "peak": state[0], "log_total": state[1], "out": tile.clone()}
            given |= {"tops": None, "finished": True}
            with pytest.raises(ValueError, match=name):
                rows_cpp.softmax(v0=V0, **given | settings | bad)

    def test_a_variant_that_there_is_not_is_refused(self) -> None:
        with pytest.raises(ValueError, match="avx1024"):
            torch.ops.selm_fast_cpp.set_variant("avx1024")
