"""The C++ matmul of 16-bit operands with fp32 results, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from selm_fast.ops import extension
from tests.ops.cpp_cases import CPP

pytestmark = CPP

# Below, at and above a block (64), the unit of its depth (32) and the depth that is done at once (512); odd depths.
ROWS, COLUMNS, DEPTHS = (1, 3, 64, 65, 200), (1, 5, 64, 130), (1, 2, 31, 33, 64, 512, 545, 1090)


@pytest.fixture(autouse=True, params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The operands' dtype, where the processor can multiply it."""
    if not extension.mm_serves(request.param):
        pytest.skip(f"this processor has no matmul of {request.param} with fp32 results")
    given: torch.dtype = request.param
    return given


def mm(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out (+)= a b."""
    torch.ops.selm_fast_cpp.mm_(out, a, b, accumulate)
    return out


def integers(rows: int, columns: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Small integers, whose products and sums every format here holds exactly."""
    if layout == "rows":
        return torch.randint(-8, 9, (rows, columns)).to(dtype)
    if layout == "part of rows":
        return torch.randint(-8, 9, (rows + 2, columns + 7)).to(dtype)[1:-1, 5:-2]
    if layout == "columns":
        return torch.randint(-8, 9, (columns, rows)).to(dtype).t()
    if layout == "part of columns":
        return torch.randint(-8, 9, (columns + 2, rows + 5)).to(dtype).t()[2:-3, 1:-1]
    if layout == "neither":
        return torch.randint(-8, 9, (2 * rows, 3 * columns)).to(dtype)[::2, ::3]
    return torch.randint(-8, 9, (rows, 1)).to(dtype).expand(rows, columns)


LAYOUTS = ["rows", "part of rows", "columns", "part of columns", "neither", "expanded"]


@pytest.mark.parametrize(
    ("layout_a", "layout_b"),
    [
        # Each layout of either with three of the other's in CI.
        pytest.param(a, b, marks=[pytest.mark.slow] if (nth + other) % 2 else [])
        for nth, a in enumerate(LAYOUTS)
        for other, b in enumerate(LAYOUTS)
    ],
)
def test_every_layout_and_size(layout_a: str, layout_b: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for M, N, K in product(ROWS, COLUMNS, DEPTHS):
        a, b = integers(M, K, layout_a, dtype), integers(K, N, layout_b, dtype)
        exact = (a.double() @ b.double()).float()
        wide = torch.full((M, N + 7), torch.nan)
        assert torch.equal(mm(wide[:, :N], a, b), exact), (M, N, K)
        assert torch.equal(mm(wide[:, :N], a, b, accumulate=True), 2 * exact), (M, N, K)
        assert wide[:, N:].isnan().all(), (M, N, K)


def test_a_size_of_the_head(dtype: torch.dtype) -> None:
    """More of b than is packed at once; results in fp32, not rounded to 16 bits on the way."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(130, 2048).to(dtype), torch.randn(1300, 2048).to(dtype)
    got = mm(torch.empty(130, 1300), hidden, weight.t())
    exact, peer = hidden.double() @ weight.double().t(), hidden.float() @ weight.float().t()
    assert (got - exact).norm() <= 2 * (peer - exact).norm()


@pytest.mark.parametrize("size", ["rows", "columns", "depth"])
def test_nothing_to_multiply(size: str, dtype: torch.dtype) -> None:
    M, N, K = (0 if size == name else 3 for name in ("rows", "columns", "depth"))
    a, b, out = torch.zeros(M, K, dtype=dtype), torch.zeros(K, N, dtype=dtype), torch.ones(M, N)
    assert mm(out, a, b, accumulate=True).eq(1).all()
    assert mm(out, a, b).eq(0).all()


def test_the_same_bits_from_run_to_run_on_any_number_of_threads_and_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 1100).to(dtype), torch.randn(1100, 300).to(dtype)
    one, again = (mm(torch.empty(200, 300), a, b) for _ in range(2))
    torch.set_num_threads(2)
    two = mm(torch.empty(200, 300), a, b)
    torch.set_num_threads(1)
    assert torch.equal(one, again) and torch.equal(one, two)
    assert torch.equal(mm(torch.empty(7, 5), a[3:10], b[:, 90:95]), one[3:10, 90:95])
    assert torch.equal(mm(torch.empty(300, 200).t().contiguous(), a.t().contiguous().t(), b.t().contiguous().t()), one)


def test_nan_and_inf_stay_in_their_row(dtype: torch.dtype) -> None:
    a, b = torch.ones(70, 33, dtype=dtype), torch.ones(33, 5, dtype=dtype)
    a[3, 32], a[68, 0] = torch.nan, torch.inf
    out = mm(torch.empty(70, 5), a, b)
    assert out[3].isnan().all() and out[68].eq(torch.inf).all()
    assert out.eq(33).sum() == 68 * 5


def test_operands_that_do_not_fit_are_refused(dtype: torch.dtype) -> None:
    a, b, out = torch.ones(4, 5, dtype=dtype), torch.ones(5, 6, dtype=dtype), torch.ones(4, 6)
    for bad in (
        (out, a, b[:4]),
        (out, a, b.float()),
        (out, a[0], b),
        (out.double(), a, b),
        (out[:3], a, b),
        (torch.ones(6, 4).t(), a, b),
        (out, a.float(), b.float()),
    ):
        with pytest.raises(ValueError, match="must be|has no matmul"):
            mm(*bad)


def test_the_schema_tells_what_is_written(dtype: torch.dtype) -> None:
    args = torch.zeros(4, 6), torch.ones(4, 5, dtype=dtype), torch.ones(5, 6, dtype=dtype), True
    torch.library.opcheck(torch.ops.selm_fast_cpp.mm_.default, args, test_utils="test_schema")


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_it_is_refused_where_onednn_is_off(dtype: torch.dtype) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not extension.mm_serves(dtype)
        with pytest.raises(ValueError, match="has no matmul"):
            mm(torch.ones(1, 1), torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    assert extension.mm_serves(dtype)
