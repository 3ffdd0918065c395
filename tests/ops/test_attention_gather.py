"""The gather of keys and values, and its backward: a segment sum in fp32, in order, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selm_fast.ops.kv_gather import _segment_sum, gather, gather_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton", "cuda"])
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Back end and device: plain torch and Triton's interpreter on the CPU; both on a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is not used where there is a GPU")
    return ("auto", "cuda") if request.param == "cuda" else (request.param, "cpu")


def case(dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor, int]:
    """Gradients of copies, which row each is of, and how many rows there are; some have none, one has 40."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.randint(50, (80,), generator=generator), torch.full((40,), 7)])
    index = index[torch.randperm(120, generator=generator)]
    index[index == 3] = 4
    return [torch.randn(120, 3, 8, generator=generator).to(dtype) for _ in range(2)], index, 51


def exact(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return torch.nn.functional.one_hot(index, num_rows).double().T @ grad.double().flatten(1)


def on(place: tuple[str, str], grads: list[Tensor], index: Tensor, num_rows: int, dtype: torch.dtype) -> list[Tensor]:
    backend, device = place
    return [
        total.cpu()
        for total in gather_backward(
            [grad.to(device) for grad in grads], index.to(device), num_rows, dtype, backend=backend
        )
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_float64_and_rounded_once(place: tuple[str, str], dtype: torch.dtype) -> None:
    grads, index, num_rows = case(dtype)
    if place == ("triton", "cpu") and dtype != torch.float32:
        pytest.skip("Triton's interpreter truncates where hardware rounds")
    for grad, total in zip(grads, on(place, grads, index, num_rows, dtype), strict=True):
        expected = exact(grad, index, num_rows)
        assert (total.dtype, total.shape) == (dtype, (num_rows, 3, 8))
        unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
        slack = 1e-5 * exact(grad.abs(), index, num_rows)
        assert ((total.double().flatten(1) - expected).abs() <= unit * expected.abs() + slack).all()
        assert not total[3].any() and not total[50].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sorted_path_adds_in_the_order_of_the_index(dtype: torch.dtype) -> None:
    """Equal bits to the plain path: what a GPU without Triton computes."""
    grads, index, num_rows = case(dtype)
    in_order, order = torch.sort(index, stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(num_rows + 1))
    plain = gather_backward(grads, index, num_rows, torch.float32, backend="torch")
    for grad, total in zip(grads, plain, strict=True):
        assert torch.equal(_segment_sum(grad, order, bounds), total)


def test_triton_adds_in_the_order_of_the_index(place: tuple[str, str]) -> None:
    grads, index, num_rows = case(torch.float32)
    plain = gather_backward(grads, index, num_rows, torch.float32, backend="torch")
    for one, other in zip(on(place, grads, index, num_rows, torch.float32), plain, strict=True):
        assert torch.equal(one, other)


def test_the_order_matters_and_is_kept(place: tuple[str, str]) -> None:
    """1 + 2^24 - 2^24 is 0 or 1 by the order; copies of one row come in that of the index, first to last."""
    grad = torch.tensor([1.0, 2.0**24, -(2.0**24), 5.0]).view(4, 1, 1)
    index = torch.tensor([1, 1, 1, 0])
    for times, expected in ((slice(None), 0.0), ([1, 2, 0, 3], 1.0)):
        (total,) = on(place, [grad[times].contiguous()], index, 2, torch.float32)
        assert total.flatten().tolist() == [5.0, expected]


def test_the_same_call_gives_the_same_bits(place: tuple[str, str]) -> None:
    grads, index, num_rows = case(torch.float32)
    for one, other in zip(*(on(place, grads, index, num_rows, torch.float32) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_float64_is_added_in_float64() -> None:
    grads, index, num_rows = case(torch.float64)
    for grad, total in zip(grads, gather_backward(grads, index, num_rows, torch.float64), strict=True):
        torch.testing.assert_close(total.flatten(1), exact(grad, index, num_rows), rtol=1e-14, atol=1e-14)


def test_the_gather_is_contiguous_whatever_the_rows_are() -> None:
    rows, index = torch.randn(3, 5, 8).transpose(0, 1), torch.tensor([4, 0, 0, 2])
    assert torch.equal(gather(rows, index), rows[index]) and gather(rows, index).is_contiguous()
